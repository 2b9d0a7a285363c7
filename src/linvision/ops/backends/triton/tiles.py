"""What Triton kernels share: where a program stands, rows of a tile of tokens, matrix products, the sigmoid."""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def place(num_tokens, num_blocks, TOKENS: tl.constexpr):
    """Return which piece of all tokens a program has, its first token, its block of channels and its sequence."""
    num_pieces = tl.cdiv(num_tokens, TOKENS)
    piece = tl.program_id(0) // num_blocks
    return piece, (piece % num_pieces) * TOKENS, tl.program_id(0) % num_blocks, (piece // num_pieces).to(tl.int64)


@triton.jit
def rows(x, token, stride, valid, column, width):
    """Load some channels of some tokens; what is not valid, or beyond the width, is zero."""
    return tl.load(x + token[:, None] * stride + column[None, :], valid[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(y, tile, token, stride, valid, column, width):
    """Store what ``rows`` loads."""
    at = y + token[:, None] * stride + column[None, :]
    tl.store(at, tile.to(y.dtype.element_ty), valid[:, None] & (column < width)[None, :])


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """Add a matrix product to float32 sums; Triton's interpreter cannot multiply bfloat16 and has it widened."""
    if PRECISION == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x)) of float32 numbers; by powers of two, whose unit flushes what is too small anyway."""
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))
