"""Triton kernels for the selective scan: one program a sequence and block of channels, its states in registers.

A program is a warp, or several where channels have many states, and each thread has a channel with all its states: sums
over states stay inside a thread, and nothing passes through shared memory between two tokens. The compiler would rather
give a thread neighbouring channels, to load several at once; ``tl.multiple_of(channel, 1)``, which forbids to take them
for aligned, keeps it from that.

``EVERY`` tokens, counted from token 0 in either direction, form an interval. The forward pass keeps the state that the
scan brings to each; the backward pass runs through the intervals against the scan and computes their states again.
Tokens are taken ``UNROLL`` at a time, a tile, which divides an interval. The forward pass loads a tile while it
computes the one before: nothing else hides the memory's latency where a program is but a warp.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.channel_sums import sum_channels
from linvision.ops.backends.triton.tiles import sigmoid


@triton.jit
def _token(place, num_places, REVERSE: tl.constexpr):
    """Return the token at a place in scan order; places after the last one give tokens that do not exist."""
    if REVERSE:
        return num_places - 1 - place
    return place


@triton.jit
def _below(number, limit, token, num_tokens):
    """Tell which numbers are below a limit, none of them for a token that does not exist."""
    return number < tl.where((token >= 0) & (token < num_tokens), limit, 0)


@triton.jit
def _nearest(token, num_tokens):
    return tl.minimum(tl.maximum(token, 0), num_tokens - 1).to(tl.int64)


@triton.jit
def _row(x, token, stride, column, num_tokens):
    """Load some columns of a token, of the nearest one for a token that does not exist.

    That one is next to it in the scan: what it holds, NaN as well, reaches nothing that it does not reach anyway.
    """
    return tl.load(x + _nearest(token, num_tokens) * stride + column)


@triton.jit
def _states_row(BC, token, state, num_tokens, STATES: tl.constexpr, ROWS: tl.constexpr):
    """Load B or C of a token like ``_row``: zeros for states that pad the others to a power of two."""
    at = BC + _nearest(token, num_tokens) * (2 * STATES) + state
    if STATES == ROWS:
        return tl.load(at)
    return tl.load(at, state < STATES, other=0.0)


@triton.jit
def _load_tile(
    u, delta, BC, z, residual, first, column, state, num_tokens, num_places,
    u_token, delta_token, z_token, residual_token,
    STATES: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, REVERSE: tl.constexpr,
    GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Load u, delta, B, C, z and the residual of each token of a tile."""
    values = ()
    for step in tl.static_range(UNROLL):
        token = _token(first + step, num_places, REVERSE)
        of_u = _row(u, token, u_token, column, num_tokens)
        of_delta = _row(delta, token, delta_token, column, num_tokens)
        of_B = _states_row(BC, token, state, num_tokens, STATES, ROWS)
        of_C = _states_row(BC + STATES, token, state, num_tokens, STATES, ROWS)
        of_z = of_u
        if GATED:
            of_z = _row(z, token, z_token, column, num_tokens)
        of_residual = of_u
        if ADDED:
            of_residual = _row(residual, token, residual_token, column, num_tokens)
        values = values + ((of_u, of_delta, of_B, of_C, of_z, of_residual),)  # noqa: RUF005 - Triton knows no unpacking
    return values


@triton.jit
def _softplus(x):
    """Compute log(1 + exp(x)) to float32's relative precision: log(1 + e) = 2 atanh(e / (2 + e)) for e = exp(-|x|)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    e = tl.exp2(-LOG2E * tl.abs(x))
    t = e / (2.0 + e)
    square = t * t
    series = square * (1 / 13) + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    series = series * square + 1.0
    return 2.0 * t * series + tl.where(x > 0.0, x, 0.0)


@triton.jit
def _step_size(raw, bias, mask, SOFTPLUS: tl.constexpr):
    """Compute delta in float32, after bias and softplus; a token that does not exist takes no step."""
    x = raw.to(tl.float32) + bias
    if SOFTPLUS:
        x = _softplus(x)
    return tl.where(mask, x, 0.0)


@triton.jit
def _decay(size, rate):
    LOG2E: tl.constexpr = 1.4426950408889634
    return tl.exp2((size * LOG2E)[None, :] * rate)


@triton.jit
def _advance(s, size, x, of_B, rate):
    """Bring the states through a token."""
    return _decay(size, rate) * s + of_B[:, None] * (size * x)[None, :]


@triton.jit
def _scan_tile(
    s, values, y, first, channel, rate, bias, skip, num_tokens, num_places, width,
    UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Bring the states through a tile and store its outputs."""
    for step in tl.static_range(UNROLL):
        token = _token(first + step, num_places, REVERSE)
        mask = _below(channel, width, token, num_tokens)
        x, raw, of_B, of_C, gate, added = values[step]
        x = x.to(tl.float32)
        size = _step_size(raw, bias, mask, SOFTPLUS)
        s = _advance(s, size, x, of_B, rate)
        out = tl.sum(of_C[:, None] * s, 0) + skip * x
        if ADDED:
            out += added.to(tl.float32)
        if GATED:
            gate = gate.to(tl.float32)
            out *= gate * sigmoid(gate)
        tl.store(y + token.to(tl.int64) * width + channel, out.to(y.dtype.element_ty), mask)
    return s


@triton.jit
def forward_kernel(
    u, delta, A, BC, D, z, bias, residual, start, y, final, kept,
    num_tokens, num_intervals, u_batch, delta_batch, z_batch, residual_batch,
    WIDTH: tl.constexpr, U_TOKEN: tl.constexpr, DELTA_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr,
    RESIDUAL_TOKEN: tl.constexpr,
    STATES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, START: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, E), the final states (B, N, E) and those before each interval, (intervals, B, N, E).

    An iteration takes two tiles, so that none of their registers has to be copied.
    """
    num_blocks = tl.cdiv(WIDTH, CHANNELS)
    batch_size = (tl.num_programs(0) // num_blocks).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    channel = tl.multiple_of((tl.program_id(0) % num_blocks) * CHANNELS + tl.arange(0, CHANNELS), 1)
    column = tl.minimum(channel, WIDTH - 1)
    state = tl.arange(0, ROWS)
    in_block = channel < WIDTH
    in_all = (state < STATES)[:, None] & in_block[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    BC += batch * num_tokens * (2 * STATES)
    z += batch * z_batch
    residual += batch * residual_batch
    y += batch * num_tokens * WIDTH
    num_places = num_intervals * EVERY
    all_states = batch_size * STATES * WIDTH
    rate = tl.load(A + state[:, None] * WIDTH + channel[None, :], in_all, other=0.0)
    s = tl.zeros((ROWS, CHANNELS), tl.float32)
    of_states = (batch * STATES + state[:, None]) * WIDTH + channel[None, :]
    if START:
        s = tl.load(start + of_states, in_all, other=0.0)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if SKIP:
        skip = tl.load(D + column)
    bias_value = tl.zeros((CHANNELS,), tl.float32)
    if BIASED:
        bias_value = tl.load(bias + column)
    values = _load_tile(
        u, delta, BC, z, residual, 0, column, state, num_tokens, num_places,
        U_TOKEN, DELTA_TOKEN, Z_TOKEN, RESIDUAL_TOKEN, STATES, ROWS, UNROLL, REVERSE, GATED, ADDED,
    )  # fmt: skip
    for first in range(0, num_places, 2 * UNROLL):
        following = _load_tile(
            u, delta, BC, z, residual, first + UNROLL, column, state, num_tokens, num_places,
            U_TOKEN, DELTA_TOKEN, Z_TOKEN, RESIDUAL_TOKEN, STATES, ROWS, UNROLL, REVERSE, GATED, ADDED,
        )  # fmt: skip
        if KEEP and first % EVERY == 0:
            interval = first // EVERY
            if REVERSE:
                interval = num_intervals - 1 - interval
            tl.store(kept + interval * all_states + of_states, s, in_all)
        s = _scan_tile(
            s, values, y, first, channel, rate, bias_value, skip, num_tokens, num_places, WIDTH,
            UNROLL, SOFTPLUS, REVERSE, GATED, ADDED,
        )  # fmt: skip
        values = _load_tile(
            u, delta, BC, z, residual, first + 2 * UNROLL, column, state, num_tokens, num_places,
            U_TOKEN, DELTA_TOKEN, Z_TOKEN, RESIDUAL_TOKEN, STATES, ROWS, UNROLL, REVERSE, GATED, ADDED,
        )  # fmt: skip
        s = _scan_tile(
            s, following, y, first + UNROLL, channel, rate, bias_value, skip, num_tokens, num_places, WIDTH,
            UNROLL, SOFTPLUS, REVERSE, GATED, ADDED,
        )  # fmt: skip
    tl.store(final + of_states, s, in_all)


@triton.jit
def backward_kernel(
    u, delta, A, BC, D, z, bias, residual, kept, dy, d_final,
    du, d_delta, dA, dBC, dD, dz, d_bias, d_residual, d_start, scratch,
    num_tokens, num_intervals, u_batch, delta_batch, z_batch, residual_batch, dy_batch,
    WIDTH: tl.constexpr, U_TOKEN: tl.constexpr, DELTA_TOKEN: tl.constexpr, Z_TOKEN: tl.constexpr,
    RESIDUAL_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr,
    STATES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, EVERY: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of tokens (B, S, E) and those of d_start (B, N, E); the others in parts, to be added.

    Parts: dA (B, N, E), dD and d_bias (B, E), dBC (blocks of channels, B, S, 2, N). ``scratch``: (tiles of an
    interval, B, N, E), the state before each tile of the interval at hand.
    """
    num_blocks = tl.cdiv(WIDTH, CHANNELS)
    batch_size = (tl.num_programs(0) // num_blocks).to(tl.int64)
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    block = tl.program_id(0) % num_blocks
    lane = tl.arange(0, CHANNELS)
    channel = tl.multiple_of(block * CHANNELS + lane, 1)
    column = tl.minimum(channel, WIDTH - 1)
    state = tl.arange(0, ROWS)
    in_block = channel < WIDTH
    in_all = (state < STATES)[:, None] & in_block[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    BC += batch * num_tokens * (2 * STATES)
    z += batch * z_batch
    residual += batch * residual_batch
    dy += batch * dy_batch
    du += batch * num_tokens * WIDTH
    d_delta += batch * num_tokens * WIDTH
    dz += batch * num_tokens * WIDTH
    d_residual += batch * num_tokens * WIDTH
    dBC += (block * batch_size + batch) * num_tokens * (2 * STATES)
    num_places = num_intervals * EVERY
    of_states = (batch * STATES + state[:, None]) * WIDTH + channel[None, :]
    all_states = batch_size * STATES * WIDTH
    rate = tl.load(A + state[:, None] * WIDTH + channel[None, :], in_all, other=0.0)
    skip = tl.zeros((CHANNELS,), tl.float32)
    if SKIP:
        skip = tl.load(D + column)
    bias_value = tl.zeros((CHANNELS,), tl.float32)
    if BIASED:
        bias_value = tl.load(bias + column)
    G = tl.load(d_final + of_states, in_all, other=0.0)
    sum_A = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_D = tl.zeros((CHANNELS,), tl.float32)
    sum_bias = tl.zeros((CHANNELS,), tl.float32)
    for back in range(0, num_intervals):
        interval = num_intervals - 1 - back
        start = interval * EVERY
        if REVERSE:
            interval = back
        s = tl.load(kept + interval * all_states + of_states, in_all, other=0.0)
        for first in range(0, EVERY - UNROLL, UNROLL):
            tl.store(scratch + (first // UNROLL) * all_states + of_states, s, in_all)
            for step in tl.static_range(UNROLL):
                token = _token(start + first + step, num_places, REVERSE)
                x = _row(u, token, U_TOKEN, column, num_tokens).to(tl.float32)
                raw = _row(delta, token, DELTA_TOKEN, column, num_tokens)
                of_B = _states_row(BC, token, state, num_tokens, STATES, ROWS)
                size = _step_size(raw, bias_value, _below(channel, WIDTH, token, num_tokens), SOFTPLUS)
                s = _advance(s, size, x, of_B, rate)
        tl.store(scratch + (EVERY // UNROLL - 1) * all_states + of_states, s, in_all)
        tl.debug_barrier()
        for index in range(0, EVERY // UNROLL):
            tile = EVERY // UNROLL - 1 - index
            first = start + tile * UNROLL
            values = _load_tile(
                u, delta, BC, z, residual, first, column, state, num_tokens, num_places,
                U_TOKEN, DELTA_TOKEN, Z_TOKEN, RESIDUAL_TOKEN, STATES, ROWS, UNROLL, REVERSE, GATED, ADDED,
            )  # fmt: skip
            s = tl.load(scratch + tile * all_states + of_states, in_all, other=0.0)
            known = ()
            for step in tl.static_range(UNROLL):
                token = _token(first + step, num_places, REVERSE)
                x, raw, of_B, of_C, gate, added = values[step]
                size = _step_size(raw, bias_value, _below(channel, WIDTH, token, num_tokens), SOFTPLUS)
                known = known + ((s, size),)  # noqa: RUF005
                s = _advance(s, size, x.to(tl.float32), of_B, rate)
            for back_step in tl.static_range(UNROLL):
                token = _token(first + UNROLL - 1 - back_step, num_places, REVERSE)
                mask = _below(channel, WIDTH, token, num_tokens)
                x, raw, of_B, of_C, gate, added = values[UNROLL - 1 - back_step]
                before, size = known[UNROLL - 1 - back_step]
                x = x.to(tl.float32)
                update = size * x
                at = token.to(tl.int64) * WIDTH + channel
                gradient = _row(dy, token, DY_TOKEN, column, num_tokens).to(tl.float32)
                gradient = tl.where(mask, gradient, 0.0)
                if GATED:
                    gate = gate.to(tl.float32)
                    opened = sigmoid(gate)
                    out = tl.sum(of_C[:, None] * s, 0) + skip * x
                    if ADDED:
                        out += added.to(tl.float32)
                    of_z = gradient * out * opened * (1.0 + gate * (1.0 - opened))
                    tl.store(dz + at, of_z.to(dz.dtype.element_ty), mask)
                    gradient *= gate * opened
                if ADDED:
                    tl.store(d_residual + at, gradient.to(d_residual.dtype.element_ty), mask)
                G += of_C[:, None] * gradient[None, :]
                sums, sum_row, whole = sum_channels(G * update[None, :], gradient[None, :] * s, lane)
                of_row = (sum_row // ROWS) * STATES + sum_row % ROWS
                of_token = whole & _below(sum_row % ROWS, STATES, token, num_tokens)
                tl.store(dBC + token.to(tl.int64) * (2 * STATES) + of_row, sums, of_token)
                d_update = tl.sum(of_B[:, None] * G, 0)
                G *= _decay(size, rate)
                d_exponent = G * before
                sum_A += d_exponent * size[None, :]
                d_size = tl.sum(d_exponent * rate, 0) + d_update * x
                if SOFTPLUS:
                    d_size *= sigmoid(raw.to(tl.float32) + bias_value)
                d_size = tl.where(mask, d_size, 0.0)
                sum_bias += d_size
                sum_D += gradient * x
                tl.store(du + at, (d_update * size + gradient * skip).to(du.dtype.element_ty), mask)
                tl.store(d_delta + at, d_size.to(d_delta.dtype.element_ty), mask)
                s = before
        tl.debug_barrier()
    tl.store(dA + of_states, sum_A, in_all)
    tl.store(d_start + of_states, G, in_all)
    if SKIP:
        tl.store(dD + batch * WIDTH + channel, sum_D, in_block)
    if BIASED:
        tl.store(d_bias + batch * WIDTH + channel, sum_bias, in_block)
