"""Triton kernels for the mLSTM's gates: decays from pre-activations, and the gradients of these.

One program walks over one head's sequence, in blocks of whole chunks. Cumulated gates are float64; what the other
kernels read is float32 and relative to the token's chunk, so that nothing is lost. All arrays are laid out
(B H, positions), padded to whole chunks, positions counting tokens in scan order.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import triton
import triton.language as tl


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def gates_kernel(
    i, f, initial_m,
    keys, queries, decay_in, floor, carry, final_m,
    num_tokens, num_heads, num_chunks,
    i_batch, i_token, i_head, f_batch, f_token, f_head,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Compute, with a_s = i_s - F_s, M_t = max(m_0, a_1, ..., a_t) and M' and M'' before and after t's chunk:

    keys: a - M'' and queries: M - M'', to base 2; decay_in: exp(M' - M); floor: exp(-m) = exp(-F - M);
    carry, a chunk each: exp(M' - M''); final_m: F + M of the last token.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0).to(tl.int64)
    i += (head // num_heads) * i_batch + (head % num_heads) * i_head
    f += (head // num_heads) * f_batch + (head % num_heads) * f_head
    padded = head * num_chunks * CHUNK
    total = tl.zeros((), tl.float64)
    m = tl.zeros((), tl.float64) - float("inf")
    if INITIAL:
        m = tl.load(initial_m + head).to(tl.float64)
    rows = tl.arange(0, CHUNKS)
    for first in range(0, num_chunks, CHUNKS):
        position = (first + rows)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        valid = position < num_tokens
        token = position.to(tl.int64)
        if REVERSE:
            token = num_tokens - 1 - token
        x = tl.load(f + token * f_token, valid, other=0.0).to(tl.float64)
        log_f = tl.where(valid, tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x))), 0.0)
        sums = tl.sum(log_f, 1)
        F = total + (tl.cumsum(sums, 0) - sums)[:, None] + tl.cumsum(log_f, 1)
        x = tl.load(i + token * i_token, valid, other=0.0).to(tl.float64)
        a = tl.where(valid, x - F, -float("inf"))
        largest = tl.max(a, 1)
        earlier = tl.where(rows[None, :] < rows[:, None], largest[None, :], -float("inf"))
        before = tl.maximum(tl.max(earlier, 1), m)
        after = tl.maximum(before, largest)
        M = tl.maximum(tl.associative_scan(a, 1, _maximum), before[:, None])
        inside = position < num_chunks * CHUNK
        tl.store(keys + padded + position, ((a - after[:, None]) * LOG2E).to(tl.float32), inside)
        tl.store(queries + padded + position, ((M - after[:, None]) * LOG2E).to(tl.float32), inside)
        tl.store(decay_in + padded + position, tl.exp(before[:, None] - M).to(tl.float32), inside)
        tl.store(floor + padded + position, tl.exp(-F - M).to(tl.float32), inside)
        known = first + rows < num_chunks
        tl.store(carry + head * num_chunks + first + rows, tl.exp(before - after).to(tl.float32), known)
        total += tl.sum(sums, 0)
        m = tl.maximum(m, tl.max(largest, 0))
    tl.store(final_m + head, (total + m).to(tl.float32))


@triton.jit
def gate_gradients_kernel(
    f, of_queries, of_keys, of_final, di, df,
    num_tokens, num_heads, num_parts, stride_parts,
    f_batch, f_token, f_head, d_batch, d_token, d_head,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Compute di = k . dk and df = sigmoid(-f) times the sum of q . dq - k . dk over this token and all later ones.

    The products come in parts (parts, B H, S), one for each tile of channels, that are added here.
    """
    head = tl.program_id(0).to(tl.int64)
    f += (head // num_heads) * f_batch + (head % num_heads) * f_head
    di += (head // num_heads) * d_batch + (head % num_heads) * d_head
    df += (head // num_heads) * d_batch + (head % num_heads) * d_head
    of_queries += head * num_tokens
    of_keys += head * num_tokens
    later = tl.zeros((), tl.float64)
    if FINAL:
        later = tl.load(of_final + head).to(tl.float64)
    num_blocks = tl.cdiv(num_tokens, BLOCK)
    for block in range(0, num_blocks):
        position = (num_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        valid = position < num_tokens
        token = position
        if REVERSE:
            token = num_tokens - 1 - position
        d_query = tl.zeros((BLOCK,), tl.float64)
        d_key = tl.zeros((BLOCK,), tl.float64)
        at = position
        for _ in range(0, num_parts):
            d_query += tl.load(of_queries + at, valid, other=0.0).to(tl.float64)
            d_key += tl.load(of_keys + at, valid, other=0.0).to(tl.float64)
            at += stride_parts
        d_cumulated = d_query - d_key
        of_block = tl.sum(d_cumulated, 0)
        d_log_f = later + (of_block - tl.cumsum(d_cumulated, 0)) + d_cumulated
        later += of_block
        x = tl.load(f + token * f_token, valid, other=0.0).to(tl.float64)
        tl.store(di + token * d_token, d_key.to(tl.float32).to(di.dtype.element_ty), valid)
        d_f = (d_log_f / (1.0 + tl.exp(x))).to(tl.float32)
        tl.store(df + token * d_token, d_f.to(df.dtype.element_ty), valid)
