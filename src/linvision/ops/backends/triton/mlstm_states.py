"""Triton kernel for the mLSTM's states: the recurrence over chunks, of the states and of their gradients.

One program holds one tile of one head's (D, D) state, in float32, and walks over the chunks; head widths need not be
powers of two, and no program ever holds a whole state of a wide head.
"""

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import dot


@triton.jit
def states_kernel(
    x, y, keys, decay_in, carry, inverse_norm, d_norm,
    start_S, start_n, states, vectors, final_S, final_n,
    num_tokens, num_heads, num_chunks, scale,
    x_batch, x_token, x_head, y_batch, y_token, y_head,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Run S <- carry S + sum of x_t^T w_t y_t and n <- carry n + sum of w'_t x_t over the chunks.

    Forward x, y = k, v and S = C^T, with w = w' = scale * decay_out: chunks in scan order, what enters each is kept.
    Backward x, y = q, dh and S = dC^T, with w = decay_in / norm and w' = decay_in * d_norm: against scan order, the
    gradients of what leaves each are kept. Kept are states (chunks, B H, D, D) and vectors (chunks, B H, D).
    """
    ROW_TILES: tl.constexpr = (HEAD_DIM + ROWS - 1) // ROWS
    COLUMN_TILES: tl.constexpr = (HEAD_DIM + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    head = (tl.program_id(0) // (ROW_TILES * COLUMN_TILES)).to(tl.int64)
    num_all_heads = (tl.num_programs(0) // (ROW_TILES * COLUMN_TILES)).to(tl.int64)
    row = (tile // COLUMN_TILES) * ROWS + tl.arange(0, ROWS)
    column = (tile % COLUMN_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    x += (head // num_heads) * x_batch + (head % num_heads) * x_head
    y += (head // num_heads) * y_batch + (head % num_heads) * y_head
    padded = head * num_chunks * CHUNK
    in_rows, in_columns = row < HEAD_DIM, column < HEAD_DIM
    in_tile = in_rows[:, None] & in_columns[None, :]
    in_vector = row + (tile % COLUMN_TILES) * HEAD_DIM < HEAD_DIM  # by the first tile of columns alone
    at = row[:, None] * HEAD_DIM + column[None, :]

    S = tl.zeros((ROWS, COLUMNS), tl.float32)
    n = tl.zeros((ROWS,), tl.float32)
    if START:
        S = tl.load(start_S + head * HEAD_DIM * HEAD_DIM + at, in_tile, other=0.0)
        n = tl.load(start_n + head * HEAD_DIM + row, in_rows, other=0.0)
    num_steps = num_chunks
    if not FINAL:
        num_steps = num_chunks - 1
    for step in range(0, num_steps):
        chunk = step
        if BACKWARD:
            chunk = num_chunks - 1 - step
        slot = chunk * num_all_heads + head
        tl.store(states + slot * HEAD_DIM * HEAD_DIM + at, S.to(states.dtype.element_ty), in_tile)
        tl.store(vectors + slot * HEAD_DIM + row, n, in_vector)
        decay = tl.load(carry + head * num_chunks + chunk)
        S *= decay
        n *= decay
        for first in range(0, CHUNK, TOKENS):
            position = chunk * CHUNK + first + tl.arange(0, TOKENS)
            valid = position < num_tokens
            token = position.to(tl.int64)
            if REVERSE:
                token = num_tokens - 1 - token
            x_t = tl.load(x + token[None, :] * x_token + row[:, None], in_rows[:, None] & valid[None, :], other=0.0)
            of_y = token[:, None] * y_token + column[None, :]
            y_t = tl.load(y + of_y, valid[:, None] & in_columns[None, :], other=0.0)
            if BACKWARD:
                decay_t = tl.load(decay_in + padded + position, valid, other=0.0)
                weight = decay_t * tl.load(inverse_norm + padded + position, valid, other=0.0)
                vector_weight = decay_t * tl.load(d_norm + padded + position, valid, other=0.0)
            else:
                weight = scale * tl.exp2(tl.load(keys + padded + position, valid, other=-float("inf")))
                vector_weight = weight
            x_t = x_t.to(tl.float32)
            weighted = (x_t * weight[None, :]).to(OPERAND)
            S = dot(weighted, y_t.to(OPERAND), S, PRECISION)
            n += tl.sum(x_t * vector_weight[None, :], 1)
    if FINAL:
        tl.store(final_S + head * HEAD_DIM * HEAD_DIM + at, S, in_tile)
        tl.store(final_n + head * HEAD_DIM + row, n, in_vector)
    else:
        chunk = num_chunks - 1
        if BACKWARD:
            chunk = 0
        slot = chunk * num_all_heads + head
        tl.store(states + slot * HEAD_DIM * HEAD_DIM + at, S.to(states.dtype.element_ty), in_tile)
        tl.store(vectors + slot * HEAD_DIM + row, n, in_vector)
