"""Triton kernels for the selective scan: one program a sequence and block of channels, its states in registers.

A program takes its tokens one after the other, ``UNROLL`` of them to a tile: a tile's numbers are asked for while the
tile before is computed, since nothing else hides the memory's latency where a program is but a warp. States are
(N, channels), channels last, one to a thread: with blocks as wide as a warp, sums over states stay inside a thread.

``EVERY`` tokens, counted from token 0 in either direction, form an interval. The forward pass keeps the state that the
scan brings to each; the backward pass runs through the intervals against the scan and computes their states again.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def _token(tile, step: tl.constexpr, num_intervals, EVERY: tl.constexpr, UNROLL: tl.constexpr, REVERSE: tl.constexpr):
    """Return the step-th token of a tile, tiles counted in scan order; -1 if it lies outside of its interval."""
    TILES: tl.constexpr = (EVERY + UNROLL - 1) // UNROLL
    interval, within = tile // TILES, (tile % TILES) * UNROLL + step
    inside = within < EVERY
    if REVERSE:
        interval, within = num_intervals - 1 - interval, EVERY - 1 - within
    return tl.where(inside, interval * EVERY + within, -1)


@triton.jit
def _row(x, token, stride, column, width, num_tokens):
    """Load some columns of a token, in float32: zeros for a token that does not exist."""
    exists = (token >= 0) & (token < num_tokens)
    mask = column < tl.where(exists, width, 0)
    return tl.load(x + token.to(tl.int64) * stride + column, mask, other=0.0).to(tl.float32)


@triton.jit
def _log1p(x):
    """Compute log(1 + x) for x >= 0 to float32's relative precision."""
    sum = 1.0 + x
    return tl.where(sum == 1.0, x, tl.log(sum) * (x / tl.where(sum == 1.0, 1.0, sum - 1.0)))


@triton.jit
def _step_size(raw, SOFTPLUS: tl.constexpr):
    if SOFTPLUS:
        return tl.where(raw > 20.0, raw, _log1p(tl.exp(tl.where(raw > 20.0, 20.0, raw))))  # a minimum would lose NaN
    return raw


@triton.jit
def _load_tile(
    u, delta, B, C, z, residual, tile, channel, state,
    num_tokens, num_intervals, width, u_token, delta_token, B_token, C_token, z_token, residual_token,
    STATES: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr, REVERSE: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Load u, delta, B, C, z and the residual of each token of a tile."""
    values = ()
    for step in tl.static_range(UNROLL):
        token = _token(tile, step, num_intervals, EVERY, UNROLL, REVERSE)
        of_u = _row(u, token, u_token, channel, width, num_tokens)
        of_delta = _row(delta, token, delta_token, channel, width, num_tokens)
        of_B = _row(B, token, B_token, state, STATES, num_tokens)
        of_C = _row(C, token, C_token, state, STATES, num_tokens)
        of_z = of_u
        if GATED:
            of_z = _row(z, token, z_token, channel, width, num_tokens)
        of_residual = of_u
        if ADDED:
            of_residual = _row(residual, token, residual_token, channel, width, num_tokens)
        values = values + ((of_u, of_delta, of_B, of_C, of_z, of_residual),)  # noqa: RUF005 - Triton knows no unpacking
    return values


@triton.jit
def forward_kernel(
    u, delta, A, B, C, D, z, bias, residual, start, y, final, kept,
    num_tokens, num_intervals, width,
    u_batch, u_token, delta_batch, delta_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    residual_batch, residual_token,
    STATES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, E), the final states (B, E, N) and those before each interval, (intervals, B, N, E)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    TILES: tl.constexpr = (EVERY + UNROLL - 1) // UNROLL
    num_blocks = tl.cdiv(width, CHANNELS)
    batch_size = (tl.num_programs(0) // num_blocks).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    channel = (tl.program_id(0) % num_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, ROWS)
    in_block = channel < width
    in_states = (state < STATES)[:, None] & in_block[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch
    C += batch * C_batch
    z += batch * z_batch
    residual += batch * residual_batch
    y += batch * num_tokens * width
    rate = tl.load(A + state[:, None] * width + channel[None, :], in_states, other=0.0)
    s = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_final = (batch * width + channel)[None, :] * STATES + state[:, None]
    if START:
        s = tl.load(start + of_final, in_states, other=0.0)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if SKIP:
        skip = tl.load(D + channel, in_block, other=0.0)
    bias_value = tl.zeros((CHANNELS,), tl.float32)
    if BIASED:
        bias_value = tl.load(bias + channel, in_block, other=0.0)
    values = _load_tile(
        u, delta, B, C, z, residual, 0, channel, state, num_tokens, num_intervals, width,
        u_token, delta_token, B_token, C_token, z_token, residual_token,
        STATES, EVERY, UNROLL, REVERSE, GATED, ADDED,
    )  # fmt: skip
    for tile in range(0, num_intervals * TILES):
        following = _load_tile(
            u, delta, B, C, z, residual, tile + 1, channel, state, num_tokens, num_intervals, width,
            u_token, delta_token, B_token, C_token, z_token, residual_token,
            STATES, EVERY, UNROLL, REVERSE, GATED, ADDED,
        )  # fmt: skip
        if KEEP and tile % TILES == 0:
            interval = tile // TILES
            if REVERSE:
                interval = num_intervals - 1 - interval
            of_kept = ((interval * batch_size + batch) * STATES + state[:, None]) * width + channel[None, :]
            tl.store(kept + of_kept, s, in_states)
        for step in tl.static_range(UNROLL):
            token = _token(tile, step, num_intervals, EVERY, UNROLL, REVERSE)
            exists = (token >= 0) & (token < num_tokens)
            mask = channel < tl.where(exists, width, 0)
            x, raw, of_B, of_C, gate, added = values[step]
            size = tl.where(mask, _step_size(raw + bias_value, SOFTPLUS), 0.0)
            s = tl.exp2((size * LOG2E)[None, :] * rate) * s + of_B[:, None] * (size * x)[None, :]
            out = tl.sum(of_C[:, None] * s, 0) + skip * x
            if ADDED:
                out += added
            if GATED:
                out *= gate / (1.0 + tl.exp(-gate))
            tl.store(y + token.to(tl.int64) * width + channel, out.to(y.dtype.element_ty), mask)
        values = following
    tl.store(final + of_final, s, in_states)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, D, z, bias, residual, kept, dy, d_final,
    du, d_delta, dA, dB, dC, dD, dz, d_bias, d_residual, d_start, scratch,
    num_tokens, num_intervals, width,
    u_batch, u_token, delta_batch, delta_token, B_batch, B_token, C_batch, C_token, z_batch, z_token,
    residual_batch, residual_token, dy_batch, dy_token,
    STATES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of tokens (B, S, E) and those of d_start (B, E, N); the others in parts, to be added.

    Parts: dA (B, N, E), dD and d_bias (B, E), dB and dC (blocks of channels, B, S, N). ``scratch``: (tiles of an
    interval, B, N, E), the state before each tile of the interval at hand.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    TILES: tl.constexpr = (EVERY + UNROLL - 1) // UNROLL
    num_blocks = tl.cdiv(width, CHANNELS)
    batch_size = (tl.num_programs(0) // num_blocks).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    state = tl.arange(0, ROWS)
    in_block = channel < width
    in_states = (state < STATES)[:, None] & in_block[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    B += batch * B_batch
    C += batch * C_batch
    z += batch * z_batch
    residual += batch * residual_batch
    dy += batch * dy_batch
    du += batch * num_tokens * width
    d_delta += batch * num_tokens * width
    dz += batch * num_tokens * width
    d_residual += batch * num_tokens * width
    dB += (block * batch_size + batch) * num_tokens * STATES
    dC += (block * batch_size + batch) * num_tokens * STATES
    of_states = (batch * STATES + state[:, None]) * width + channel[None, :]
    all_states = batch_size * STATES * width
    rate = tl.load(A + state[:, None] * width + channel[None, :], in_states, other=0.0)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if SKIP:
        skip = tl.load(D + channel, in_block, other=0.0)
    bias_value = tl.zeros((CHANNELS,), tl.float32)
    if BIASED:
        bias_value = tl.load(bias + channel, in_block, other=0.0)
    of_final = (batch * width + channel)[None, :] * STATES + state[:, None]
    G = tl.load(d_final + of_final, in_states, other=0.0)
    sum_A = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_D = tl.zeros((CHANNELS,), tl.float32)
    sum_bias = tl.zeros((CHANNELS,), tl.float32)
    for back in range(0, num_intervals):
        first = (num_intervals - 1 - back) * TILES
        interval = num_intervals - 1 - back
        if REVERSE:
            interval = back
        s = tl.load(kept + interval * all_states + of_states, in_states, other=0.0)
        for index in range(0, TILES - 1):
            tl.store(scratch + index * all_states + of_states, s, in_states)
            for step in tl.static_range(UNROLL):
                token = _token(first + index, step, num_intervals, EVERY, UNROLL, REVERSE)
                mask = channel < tl.where((token >= 0) & (token < num_tokens), width, 0)
                x = _row(u, token, u_token, channel, width, num_tokens)
                raw = _row(delta, token, delta_token, channel, width, num_tokens)
                of_B = _row(B, token, B_token, state, STATES, num_tokens)
                size = tl.where(mask, _step_size(raw + bias_value, SOFTPLUS), 0.0)
                s = tl.exp2((size * LOG2E)[None, :] * rate) * s + of_B[:, None] * (size * x)[None, :]
        tl.store(scratch + (TILES - 1) * all_states + of_states, s, in_states)
        tl.debug_barrier()
        for index in range(0, TILES):
            tile = first + TILES - 1 - index
            values = _load_tile(
                u, delta, B, C, z, residual, tile, channel, state, num_tokens, num_intervals, width,
                u_token, delta_token, B_token, C_token, z_token, residual_token,
                STATES, EVERY, UNROLL, REVERSE, GATED, ADDED,
            )  # fmt: skip
            s = tl.load(scratch + (TILES - 1 - index) * all_states + of_states, in_states, other=0.0)
            known = ()
            for step in tl.static_range(UNROLL):
                token = _token(tile, step, num_intervals, EVERY, UNROLL, REVERSE)
                mask = channel < tl.where((token >= 0) & (token < num_tokens), width, 0)
                x, raw, of_B, of_C, gate, added = values[step]
                size = tl.where(mask, _step_size(raw + bias_value, SOFTPLUS), 0.0)
                decay = tl.exp2((size * LOG2E)[None, :] * rate)
                known = known + ((s, decay, size),)  # noqa: RUF005
                s = decay * s + of_B[:, None] * (size * x)[None, :]
            for back_step in tl.static_range(UNROLL):
                token = _token(tile, UNROLL - 1 - back_step, num_intervals, EVERY, UNROLL, REVERSE)
                limit = tl.where((token >= 0) & (token < num_tokens), width, 0)
                mask = channel < limit
                state_mask = state < tl.where(limit > 0, STATES, 0)
                x, raw, of_B, of_C, gate, added = values[UNROLL - 1 - back_step]
                before, decay, size = known[UNROLL - 1 - back_step]
                at = token.to(tl.int64) * width + channel
                gradient = _row(dy, token, dy_token, channel, width, num_tokens)
                s = decay * before + of_B[:, None] * (size * x)[None, :]
                if GATED:
                    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
                    out = tl.sum(of_C[:, None] * s, 0) + skip * x
                    if ADDED:
                        out += added
                    of_z = gradient * out * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                    tl.store(dz + at, of_z.to(dz.dtype.element_ty), mask)
                    gradient *= gate * sigmoid
                if ADDED:
                    tl.store(d_residual + at, gradient.to(d_residual.dtype.element_ty), mask)
                of_token = token.to(tl.int64) * STATES + state
                tl.store(dC + of_token, tl.sum(gradient[None, :] * s, 1), state_mask)
                G += of_C[:, None] * gradient[None, :]
                tl.store(dB + of_token, tl.sum(G * (size * x)[None, :], 1), state_mask)
                d_update = tl.sum(of_B[:, None] * G, 0)
                G *= decay
                d_exponent = G * before
                sum_A += d_exponent * size[None, :]
                d_size = tl.sum(d_exponent * rate, 0) + d_update * x
                if SOFTPLUS:
                    d_size /= 1.0 + tl.exp(-(raw + bias_value))
                d_size = tl.where(mask, d_size, 0.0)
                sum_bias += d_size
                sum_D += gradient * x
                tl.store(du + at, (d_update * size + gradient * skip).to(du.dtype.element_ty), mask)
                tl.store(d_delta + at, d_size.to(d_delta.dtype.element_ty), mask)
        tl.debug_barrier()
    tl.store(dA + of_states, sum_A, in_states)
    tl.store(d_start + of_final, G, in_states)
    if SKIP:
        tl.store(dD + batch * width + channel, sum_D, in_block)
    if BIASED:
        tl.store(d_bias + batch * width + channel, sum_bias, in_block)
