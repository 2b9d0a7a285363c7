"""Triton kernels for what ViL's mLSTM is fed: q, k and v by matrices of 4 x 4 blocks, and the gates.

All that they do is to move numbers, so that the 4 x 4 blocks of some channels are multiplied as one matrix, zeros and
all: matrix cores do so in less time than the numbers take to arrive. Both gates are columns of one product, first those
of i, one a head, then those of f.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import dot, place, rows, store_rows


@triton.jit
def _matrix(weight, channel, WIDTH: tl.constexpr):
    """Load a part of a projection (G, 4, 4) as a matrix (channels in, channels out)."""
    into, out = channel[:, None], channel[None, :]
    return tl.load(weight + out * 4 + into % 4, (into // 4 == out // 4) & (out < WIDTH), other=0.0)


@triton.jit
def _project(x, weight, bias, channel, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Compute some channels of q, k or v from those of its tokens, in their type."""
    sums = tl.zeros((x.shape[0], channel.shape[0]), tl.float32)
    sums = dot(x, _matrix(weight, channel, WIDTH).to(x.dtype), sums, PRECISION)
    return (sums + _load_bias(bias, channel, WIDTH)[None, :]).to(x.dtype)


@triton.jit
def _load_bias(bias, channel, WIDTH: tl.constexpr):
    values = tl.zeros((channel.shape[0],), tl.float32)
    if bias is not None:
        values += tl.load(bias + channel, channel < WIDTH, other=0.0).to(tl.float32)
    return values


@triton.jit
def _load_gates(i, f, at, column, inside, NUM_HEADS: tl.constexpr):
    """Load numbers of i for its columns and of f for those that follow, from the same places, in float32."""
    of_i = tl.load(i + at, inside & (column < NUM_HEADS), other=0.0).to(tl.float32)
    of_f = tl.load(f + at, inside & (column >= NUM_HEADS) & (column < 2 * NUM_HEADS), other=0.0).to(tl.float32)
    return of_i + of_f


@triton.jit
def _gate_matrix(
    i_weight, f_weight, channel, column, SOURCE: tl.constexpr, WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr
):
    """Load what the gates take of some channels of q, k or v (``SOURCE`` 0, 1, 2): (channels, columns)."""
    at = (column % NUM_HEADS)[None, :] * (3 * WIDTH) + (SOURCE * WIDTH + channel)[:, None]
    return _load_gates(i_weight, f_weight, at, column[None, :], (channel < WIDTH)[:, None], NUM_HEADS)


@triton.jit
def forward_kernel(
    c, x, q, k, v, i, f,
    q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight, i_bias, f_bias,
    num_tokens, c_batch, c_token, x_batch, x_token,
    WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute q, k, v (B, S, E) and i, f (B, S, H) of a tile of tokens, some channels after the other."""
    _, first, _, batch = place(num_tokens, 1, TOKENS)
    token = (first + tl.arange(0, TOKENS)).to(tl.int64)
    valid = token < num_tokens
    at = batch * num_tokens + token
    c += batch * c_batch
    x += batch * x_batch
    column = tl.arange(0, COLUMNS)
    gates = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        from_c = rows(c, token, c_token, valid, channel, WIDTH)
        from_x = rows(x, token, x_token, valid, channel, WIDTH)
        queries = _project(from_c, q_weight, q_bias, channel, WIDTH, PRECISION)
        keys = _project(from_c, k_weight, k_bias, channel, WIDTH, PRECISION)
        values = _project(from_x, v_weight, v_bias, channel, WIDTH, PRECISION)
        store_rows(q, queries, at, WIDTH, valid, channel, WIDTH)
        store_rows(k, keys, at, WIDTH, valid, channel, WIDTH)
        store_rows(v, values, at, WIDTH, valid, channel, WIDTH)
        of_q = _gate_matrix(i_weight, f_weight, channel, column, 0, WIDTH, NUM_HEADS).to(c.dtype.element_ty)
        of_k = _gate_matrix(i_weight, f_weight, channel, column, 1, WIDTH, NUM_HEADS).to(c.dtype.element_ty)
        of_v = _gate_matrix(i_weight, f_weight, channel, column, 2, WIDTH, NUM_HEADS).to(c.dtype.element_ty)
        gates = dot(values, of_v, dot(keys, of_k, dot(queries, of_q, gates, PRECISION), PRECISION), PRECISION)
    head = column % NUM_HEADS
    gates += _load_gates(i_bias, f_bias, head, column, column >= 0, NUM_HEADS)[None, :]
    store_rows(i, gates, at, NUM_HEADS, valid, column, NUM_HEADS)
    of_f = valid[:, None] & ((column >= NUM_HEADS) & (column < 2 * NUM_HEADS))[None, :]
    tl.store(f + at[:, None] * NUM_HEADS + head[None, :], gates, of_f)


@triton.jit
def _store_sums(
    sums, of_matrix, of_bias, gates_by_tokens, gate_sum, weight, bias, channel, column,
    WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a projection (4, E), of its bias (E) and of what the gates take of it (2 H, E).

    The last are sums of the gates' gradients times q, k or v, which come from those times the tokens.
    """
    into, out = channel[:, None], channel[None, :]
    tl.store(sums + into % 4 * WIDTH + out, of_matrix, (into // 4 == out // 4) & (out < WIDTH))
    tl.store(sums + 4 * WIDTH + channel, tl.sum(of_bias, 0), channel < WIDTH)
    of_gates = tl.sum(gate_sum, 0)[:, None] * _load_bias(bias, channel, WIDTH)[None, :]
    of_gates = dot(gates_by_tokens, _matrix(weight, channel, WIDTH).to(tl.float32), of_gates, PRECISION)
    store_rows(sums + 5 * WIDTH, of_gates, column, WIDTH, column < 2 * NUM_HEADS, channel, WIDTH)


@triton.jit
def _gradients(
    dy, tokens, d_gates, to_gates, matrix, d_tokens, of_matrix, of_bias, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """Add what a tile of dq, dk or dv, together with the gates' gradients, gives its tokens and its parameters."""
    gradient = dot(d_gates, to_gates, dy.to(tl.float32), PRECISION)
    d_tokens = dot(gradient.to(OPERAND), matrix, d_tokens, PRECISION)
    of_matrix = dot(tl.trans(tokens), gradient.to(OPERAND), of_matrix, PRECISION)
    return d_tokens, of_matrix, of_bias + gradient


@triton.jit
def backward_kernel(
    dq, dk, dv, di, df, c, x, dc, dx, sums,
    q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight,
    num_tokens, dq_batch, dq_token, dk_batch, dk_token, dv_batch, dv_token, c_batch, c_token, x_batch, x_token,
    WIDTH: tl.constexpr, NUM_HEADS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
    TILES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute dc and dx (B, S, E), and in parts, to be added, the sums over tokens (pieces of tokens, 3, 5 + 2 H, E).

    The latter are those of q, k and v; see ``_store_sums``.
    """
    piece, first, block, batch = place(num_tokens, tl.cdiv(WIDTH, CHANNELS), TILES * TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.arange(0, COLUMNS)
    q_matrix = tl.trans(_matrix(q_weight, channel, WIDTH)).to(OPERAND)
    k_matrix = tl.trans(_matrix(k_weight, channel, WIDTH)).to(OPERAND)
    v_matrix = tl.trans(_matrix(v_weight, channel, WIDTH)).to(OPERAND)
    to_q = tl.trans(_gate_matrix(i_weight, f_weight, channel, column, 0, WIDTH, NUM_HEADS)).to(OPERAND)
    to_k = tl.trans(_gate_matrix(i_weight, f_weight, channel, column, 1, WIDTH, NUM_HEADS)).to(OPERAND)
    to_v = tl.trans(_gate_matrix(i_weight, f_weight, channel, column, 2, WIDTH, NUM_HEADS)).to(OPERAND)
    of_q = tl.zeros((CHANNELS, CHANNELS), tl.float32)
    of_k, of_v = tl.zeros_like(of_q), tl.zeros_like(of_q)
    q_sum = tl.zeros((TOKENS, CHANNELS), tl.float32)
    k_sum, v_sum = tl.zeros_like(q_sum), tl.zeros_like(q_sum)
    gates_by_c = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    gates_by_x = tl.zeros_like(gates_by_c)
    gate_sum = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for tile in range(0, TILES):
        token = (first + tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        valid = token < num_tokens
        at = batch * num_tokens + token
        from_c = rows(c + batch * c_batch, token, c_token, valid, channel, WIDTH).to(OPERAND)
        from_x = rows(x + batch * x_batch, token, x_token, valid, channel, WIDTH).to(OPERAND)
        in_gates = at[:, None] * NUM_HEADS + (column % NUM_HEADS)[None, :]
        d_gates = _load_gates(di, df, in_gates, column[None, :], valid[:, None], NUM_HEADS)
        gate_sum += d_gates
        d_gates = d_gates.to(OPERAND)

        d_c = tl.zeros((TOKENS, CHANNELS), tl.float32)
        d_x = tl.zeros_like(d_c)
        gradient = rows(dq + batch * dq_batch, token, dq_token, valid, channel, WIDTH)
        d_c, of_q, q_sum = _gradients(gradient, from_c, d_gates, to_q, q_matrix, d_c, of_q, q_sum, OPERAND, PRECISION)
        gradient = rows(dk + batch * dk_batch, token, dk_token, valid, channel, WIDTH)
        d_c, of_k, k_sum = _gradients(gradient, from_c, d_gates, to_k, k_matrix, d_c, of_k, k_sum, OPERAND, PRECISION)
        gradient = rows(dv + batch * dv_batch, token, dv_token, valid, channel, WIDTH)
        d_x, of_v, v_sum = _gradients(gradient, from_x, d_gates, to_v, v_matrix, d_x, of_v, v_sum, OPERAND, PRECISION)
        gates_by_c = dot(tl.trans(d_gates), from_c, gates_by_c, PRECISION)
        gates_by_x = dot(tl.trans(d_gates), from_x, gates_by_x, PRECISION)
        store_rows(dc, d_c, at, WIDTH, valid, channel, WIDTH)
        store_rows(dx, d_x, at, WIDTH, valid, channel, WIDTH)
    ROOM: tl.constexpr = (5 + 2 * NUM_HEADS) * WIDTH
    sums += piece.to(tl.int64) * (3 * ROOM)
    _store_sums(sums, of_q, q_sum, gates_by_c, gate_sum, q_weight, q_bias, channel, column, WIDTH, NUM_HEADS, PRECISION)
    _store_sums(
        sums + ROOM, of_k, k_sum, gates_by_c, gate_sum, k_weight, k_bias, channel, column, WIDTH, NUM_HEADS, PRECISION
    )
    _store_sums(
        sums + 2 * ROOM, of_v, v_sum, gates_by_x, gate_sum, v_weight, v_bias, channel, column, WIDTH, NUM_HEADS,
        PRECISION,
    )  # fmt: skip
