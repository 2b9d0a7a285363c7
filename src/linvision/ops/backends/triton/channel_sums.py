"""Sums over the channels of a warp's threads, many at once, in Triton.

``tl.sum`` over a warp's 32 threads exchanges each row five times, and every thread ends up with every sum. Here two
threads exchange halves of their rows and each goes on with the half that it was given: a row is exchanged but once, and
every thread ends up with a sum of its own.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _halves(x):
    """Split (R, L) into its upper and its lower R / 2 rows."""
    rows: tl.constexpr = x.shape[0]
    return tl.split(tl.permute(tl.reshape(x, (2, rows // 2, x.shape[1])), (1, 2, 0)))


@triton.jit
def sum_channels(a, b, lane):
    """Add the columns of two matrices (R, L); ``lane`` counts their columns, whose number is a power of two.

    Returns sums (R', L), the row that each is the sum of (R', L) where the rows of b follow those of a, and whether it
    is the one to keep of several that are the same.
    """
    ROWS: tl.constexpr = 2 * a.shape[0]
    LANES: tl.constexpr = a.shape[1]
    x = tl.reshape(tl.permute(tl.join(a, b), (2, 0, 1)), (ROWS, LANES))
    first_row = tl.zeros_like(lane)
    keep = lane >= 0
    for bit in tl.static_range(0, 31):
        if 1 << bit < LANES:
            upper = (lane >> bit) % 2 == 1
            if x.shape[0] > 1:
                top, bottom = _halves(x)
                given = tl.where(upper[None, :], top, bottom)
                x = tl.where(upper[None, :], bottom, top)
                first_row += tl.where(upper, x.shape[0], 0)
            else:
                given = x
                keep = keep & ((lane >> bit) % 2 == 0)
            partner = tl.broadcast_to((lane ^ (1 << bit))[None, :], given.shape)
            x += tl.gather(given, partner, 1)
    row = first_row[None, :] + tl.arange(0, x.shape[0])[:, None]
    return x, row, tl.broadcast_to(keep[None, :], x.shape)
