"""Triton kernels for what happens inside the mLSTM's chunks: all tiles of all chunks at once, on matrix cores.

Forward and backward are two kernels, one that gathers towards the queries and one towards the keys. With the weight
w_ts = exp(a_s - M_t), and sums over the tokens s <= t of t's chunk beside the state that comes in to it:

    h_t norm_t = sum_s w_ts (q_t . k_s) v_s + decay_in_t q_t C^T
    dq_t       = sum_s w_ts (dh_t . v_s / norm_t + d_norm_t) k_s + decay_in_t (dh_t C / norm_t + d_norm_t n)

so that h and dq are one formula; dv and dk are the other one, with the gradients of the state after the chunk. Scores
are float32; they are rounded to the operands' type only to enter the second product, alike in both kernels: the forget
gates' gradients are sums of q . dq - k . dk, where roundings cancel if they are the same, and else pile up.
"""

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import dot, rows, store_rows


@triton.jit
def _program(num_tokens, TOKENS: tl.constexpr, NUM_PARTS: tl.constexpr):
    """Return this program's part of the channels, tile of tokens and head of all, and the number of these."""
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    part = tl.program_id(0) % NUM_PARTS
    tile = (tl.program_id(0) // NUM_PARTS) % num_tiles
    head = (tl.program_id(0) // (NUM_PARTS * num_tiles)).to(tl.int64)
    return part, tile, head, (tl.num_programs(0) // (NUM_PARTS * num_tiles)).to(tl.int64)


@triton.jit
def _tokens(position, num_tokens, REVERSE: tl.constexpr):
    token = position.to(tl.int64)
    if REVERSE:
        token = num_tokens - 1 - token
    return token


@triton.jit
def _products(
    x, y, first, x_token, y_token, x_stride, y_stride, x_valid, y_valid,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute x . y for all pairs of tokens. ``first``: the first block of channels of x, already loaded."""
    column = tl.arange(0, BLOCK)
    y_block = rows(y, y_token, y_stride, y_valid, column, WIDTH)
    scores = dot(first, tl.trans(y_block), tl.zeros((TOKENS, TOKENS), tl.float32), PRECISION)
    for start in range(BLOCK, WIDTH, BLOCK):
        x_block = rows(x, x_token, x_stride, x_valid, start + column, WIDTH)
        y_block = rows(y, y_token, y_stride, y_valid, start + column, WIDTH)
        scores = dot(x_block, tl.trans(y_block), scores, PRECISION)
    return scores


@triton.jit
def _state_products(
    x, first, x_token, x_stride, x_valid, state, row_stride, column_stride, column,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply tokens by some columns of a (D, D) state."""
    row = tl.arange(0, BLOCK)
    inside = (column < WIDTH)[None, :]
    at = state + column[None, :] * column_stride
    block = tl.load(at + row[:, None] * row_stride, (row < WIDTH)[:, None] & inside, other=0.0)
    zeros = tl.zeros((first.shape[0], column.shape[0]), tl.float32)
    result = dot(first.to(OPERAND), block, zeros, PRECISION)
    for start in range(BLOCK, WIDTH, BLOCK):
        row = start + tl.arange(0, BLOCK)
        x_block = rows(x, x_token, x_stride, x_valid, row, WIDTH).to(OPERAND)
        block = tl.load(at + row[:, None] * row_stride, (row < WIDTH)[:, None] & inside, other=0.0)
        result = dot(x_block, block, result, PRECISION)
    return result


@triton.jit
def _vector_products(x, first, x_token, x_stride, x_valid, vector, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply tokens by a (D,) vector, in float32."""
    column = tl.arange(0, BLOCK)
    result = tl.sum(first.to(tl.float32) * tl.load(vector + column, column < WIDTH, other=0.0)[None, :], 1)
    for start in range(BLOCK, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x_block = rows(x, x_token, x_stride, x_valid, column, WIDTH).to(tl.float32)
        result += tl.sum(x_block * tl.load(vector + column, column < WIDTH, other=0.0)[None, :], 1)
    return result


@triton.jit
def queries_kernel(
    x, y, z, out, own, products,
    keys, queries, decay_in, floor, inverse_norm, d_norm, states, vectors,
    num_tokens, num_heads, num_chunks, scale,
    x_batch, x_token, x_head, y_batch, y_token, y_head, z_batch, z_token, z_head,
    out_batch, out_token, out_head, own_batch, own_token, own_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    EPS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Compute h (x, y, z = q, k, v) or, backward, dq (x, y, z = dh, v, k) for a tile of queries and of channels.

    Backward also writes q . dq, with ``own`` = q, to ``products`` (tiles of channels, B H, S).
    """
    NUM_PARTS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part, tile, head, num_all_heads = _program(num_tokens, TOKENS, NUM_PARTS)
    batch, in_batch = head // num_heads, head % num_heads
    x += batch * x_batch + in_batch * x_head
    y += batch * y_batch + in_batch * y_head
    z += batch * z_batch + in_batch * z_head
    padded = head * num_chunks * CHUNK
    chunk = tile * TOKENS // CHUNK

    position = tile * TOKENS + tl.arange(0, TOKENS)
    valid = position < num_tokens
    token = _tokens(position, num_tokens, REVERSE)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    query = tl.load(queries + padded + position)
    first = rows(x, token, x_token, valid, tl.arange(0, BLOCK), WIDTH)
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    norm = tl.zeros((TOKENS,), tl.float32)
    if BACKWARD:
        inverse = tl.load(inverse_norm + padded + position, valid, other=0.0)
        d_norms = tl.load(d_norm + padded + position, valid, other=0.0)
    for other in range(chunk * CHUNK // TOKENS, tile + 1):
        s = other * TOKENS + tl.arange(0, TOKENS)
        s_valid = s < num_tokens
        s_token = _tokens(s, num_tokens, REVERSE)
        scores = _products(
            x, y, first, token, s_token, x_token, y_token, valid, s_valid, WIDTH, BLOCK, TOKENS, PRECISION
        )
        weight = tl.exp2(tl.load(keys + padded + s)[None, :] - query[:, None])
        if BACKWARD:
            scores = scores * inverse[:, None] + d_norms[:, None]
        scores = tl.where(s[None, :] <= position[:, None], scores * weight, 0.0)
        norm += tl.sum(scores, 1)
        z_block = rows(z, s_token, z_token, s_valid, column, WIDTH)
        sums = dot(scores.to(OPERAND), z_block.to(OPERAND), sums, PRECISION)
    sums *= scale
    norm *= scale
    if START or chunk > 0:
        slot = chunk * num_all_heads + head
        state, vector = states + slot * WIDTH * WIDTH, vectors + slot * WIDTH
        decay = tl.load(decay_in + padded + position)
        if BACKWARD:  # transposed
            from_state = _state_products(
                x, first, token, x_token, valid, state, 1, WIDTH, column, WIDTH, BLOCK, OPERAND, PRECISION
            )
            n = tl.load(vector + column, column < WIDTH, other=0.0)
            sums += decay[:, None] * (from_state * inverse[:, None] + d_norms[:, None] * n[None, :])
        else:
            from_state = _state_products(
                x, first, token, x_token, valid, state, WIDTH, 1, column, WIDTH, BLOCK, OPERAND, PRECISION
            )
            sums += decay[:, None] * from_state
            norm += decay * _vector_products(x, first, token, x_token, valid, vector, WIDTH, BLOCK)
    if BACKWARD:
        own += batch * own_batch + in_batch * own_head
        q = rows(own, token, own_token, valid, column, WIDTH).to(tl.float32)
        at = products + (part * num_all_heads + head) * num_tokens + position
        tl.store(at, tl.sum(q * sums, 1), valid)
    else:
        sums /= (tl.maximum(tl.abs(norm), tl.load(floor + padded + position)) + EPS)[:, None]
    out += batch * out_batch + in_batch * out_head
    store_rows(out, sums, token, out_token, valid, column, WIDTH)


@triton.jit
def keys_kernel(
    x, y, z, out, own, products,
    keys, queries, inverse_norm, d_norm, states, vectors,
    num_tokens, num_heads, num_chunks, scale,
    x_batch, x_token, x_head, y_batch, y_token, y_head, z_batch, z_token, z_head,
    out_batch, out_token, out_head, own_batch, own_token, own_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    OF_KEYS: tl.constexpr, REVERSE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Compute dv (x, y, z = k, q, dh) or dk (OF_KEYS: v, dh, q) for a tile of keys and of channels.

    ``states`` and ``vectors`` are the gradients of those after each chunk. For dk it also writes k . dk, ``own`` = k.
    """
    NUM_PARTS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    num_tiles = tl.cdiv(num_tokens, TOKENS)
    part, tile, head, num_all_heads = _program(num_tokens, TOKENS, NUM_PARTS)
    batch, in_batch = head // num_heads, head % num_heads
    x += batch * x_batch + in_batch * x_head
    y += batch * y_batch + in_batch * y_head
    z += batch * z_batch + in_batch * z_head
    padded = head * num_chunks * CHUNK
    chunk = tile * TOKENS // CHUNK

    position = tile * TOKENS + tl.arange(0, TOKENS)
    valid = position < num_tokens
    token = _tokens(position, num_tokens, REVERSE)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    key = tl.load(keys + padded + position)
    first = rows(x, token, x_token, valid, tl.arange(0, BLOCK), WIDTH)
    sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for other in range(tile, tl.minimum((chunk + 1) * CHUNK // TOKENS, num_tiles)):
        t = other * TOKENS + tl.arange(0, TOKENS)
        t_valid = t < num_tokens
        t_token = _tokens(t, num_tokens, REVERSE)
        scores = _products(
            x, y, first, token, t_token, x_token, y_token, valid, t_valid, WIDTH, BLOCK, TOKENS, PRECISION
        )
        scores *= tl.load(inverse_norm + padded + t, t_valid, other=0.0)[None, :]
        if OF_KEYS:
            scores += tl.load(d_norm + padded + t, t_valid, other=0.0)[None, :]
        weight = tl.exp2(key[:, None] - tl.load(queries + padded + t)[None, :])
        scores = tl.where(t[None, :] >= position[:, None], scores * weight, 0.0)
        z_block = rows(z, t_token, z_token, t_valid, column, WIDTH)
        sums = dot(scores.to(OPERAND), z_block.to(OPERAND), sums, PRECISION)
    if FINAL or chunk < num_chunks - 1:
        slot = chunk * num_all_heads + head
        state, vector = states + slot * WIDTH * WIDTH, vectors + slot * WIDTH
        if OF_KEYS:  # transposed
            from_state = _state_products(
                x, first, token, x_token, valid, state, 1, WIDTH, column, WIDTH, BLOCK, OPERAND, PRECISION
            )
            from_state += tl.load(vector + column, column < WIDTH, other=0.0)[None, :]
        else:
            from_state = _state_products(
                x, first, token, x_token, valid, state, WIDTH, 1, column, WIDTH, BLOCK, OPERAND, PRECISION
            )
        sums += tl.exp2(key)[:, None] * from_state
    sums *= scale
    if OF_KEYS:
        own += batch * own_batch + in_batch * own_head
        k = rows(own, token, own_token, valid, column, WIDTH).to(tl.float32)
        at = products + (part * num_all_heads + head) * num_tokens + position
        tl.store(at, tl.sum(k * sums, 1), valid)
    out += batch * out_batch + in_batch * out_head
    store_rows(out, sums, token, out_token, valid, column, WIDTH)


@triton.jit
def norms_kernel(
    q, k, h, dh, inverse_norm, d_norm,
    keys, queries, decay_in, floor, vectors,
    num_tokens, num_heads, num_chunks, scale,
    q_batch, q_token, q_head, k_batch, k_token, k_head, h_batch, h_token, h_head, dh_batch, dh_token, dh_head,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Compute the norm of a tile of queries again: its inverse, and the gradient of n . q."""
    _, tile, head, num_all_heads = _program(num_tokens, TOKENS, tl.constexpr(1))
    batch, in_batch = head // num_heads, head % num_heads
    q += batch * q_batch + in_batch * q_head
    k += batch * k_batch + in_batch * k_head
    h += batch * h_batch + in_batch * h_head
    dh += batch * dh_batch + in_batch * dh_head
    padded = head * num_chunks * CHUNK
    chunk = tile * TOKENS // CHUNK

    position = tile * TOKENS + tl.arange(0, TOKENS)
    valid = position < num_tokens
    token = _tokens(position, num_tokens, REVERSE)
    query = tl.load(queries + padded + position)
    first = rows(q, token, q_token, valid, tl.arange(0, BLOCK), WIDTH)
    norm = tl.zeros((TOKENS,), tl.float32)
    for other in range(chunk * CHUNK // TOKENS, tile + 1):
        s = other * TOKENS + tl.arange(0, TOKENS)
        s_valid = s < num_tokens
        s_token = _tokens(s, num_tokens, REVERSE)
        scores = _products(
            q, k, first, token, s_token, q_token, k_token, valid, s_valid, WIDTH, BLOCK, TOKENS, PRECISION
        )
        weight = scale * tl.exp2(tl.load(keys + padded + s)[None, :] - query[:, None])
        norm += tl.sum(tl.where(s[None, :] <= position[:, None], scores * weight, 0.0), 1)
    if START or chunk > 0:
        vector = vectors + (chunk * num_all_heads + head) * WIDTH
        products = _vector_products(q, first, token, q_token, valid, vector, WIDTH, BLOCK)
        norm += tl.load(decay_in + padded + position) * products
    dot = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        of_h = rows(h, token, h_token, valid, column, WIDTH).to(tl.float32)
        dot += tl.sum(of_h * rows(dh, token, dh_token, valid, column, WIDTH).to(tl.float32), 1)
    least = tl.load(floor + padded + position)
    inverse = 1.0 / (tl.maximum(tl.abs(norm), least) + EPS)
    sign = tl.where(norm > 0, 1.0, -1.0)
    tl.store(inverse_norm + padded + position, inverse, valid)
    tl.store(d_norm + padded + position, tl.where(tl.abs(norm) > least, -dot * inverse * sign, 0.0), valid)
