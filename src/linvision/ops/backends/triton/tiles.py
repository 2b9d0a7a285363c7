"""Where a program stands, in Triton kernels that cut sequences into tiles of tokens and of columns."""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def place(num_tokens, num_columns, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the number of this program's piece of tokens in the batch, its first token, its columns, its sequence."""
    num_pieces, num_blocks = tl.cdiv(num_tokens, TOKENS), tl.cdiv(num_columns, COLUMNS)
    column = (tl.program_id(0) % num_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    piece = tl.program_id(0) // num_blocks
    return piece, (piece % num_pieces) * TOKENS, column, (piece // num_pieces).to(tl.int64)
