"""Triton kernels for depthwise convolutions of tokens: one program a tile of tokens and channels.

All that they do is to move numbers: a token's neighbours are read again for every tap, from the cache.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import place


@triton.jit
def _neighbours(
    x, token, channel, tap, num_tokens, columns, channels, x_row, x_column,
    KERNEL_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Load what tokens see through a tap, in float32: zeros outside of the grid."""
    down, right = tap // KERNEL_COLUMNS - TOP, tap % KERNEL_COLUMNS - LEFT
    if REVERSE:
        down, right = -down, -right
    row, column = token // columns + down, token % columns + right
    inside = (token < num_tokens) & (row >= 0) & (row < num_tokens // columns) & (column >= 0) & (column < columns)
    at = row.to(tl.int64) * x_row + column.to(tl.int64) * x_column
    return tl.load(x + at[:, None] + channel[None, :], inside[:, None] & (channel < channels)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _convolve(
    x, weight, bias, token, channel, num_tokens, columns, channels, x_row, x_column,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Compute the sums of a tile: bias and all taps."""
    sums = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if BIASED:
        sums += tl.load(bias + channel, channel < channels, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        seen = _neighbours(
            x, token, channel, tap, num_tokens, columns, channels, x_row, x_column, KERNEL_COLUMNS, TOP, LEFT, REVERSE
        )
        of_tap = tl.load(weight + channel * TAPS + tap, channel < channels, other=0.0).to(tl.float32)
        sums += of_tap[None, :] * seen
    return sums


@triton.jit
def forward_kernel(
    x, weight, bias, y, num_tokens, columns, channels, x_batch, x_row, x_column,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, C) of a grid x (B, rows, columns, C) of S tokens."""
    _, first, block, batch = place(num_tokens, tl.cdiv(channels, CHANNELS), TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    token = first + tl.arange(0, TOKENS)
    sums = _convolve(
        x + batch * x_batch, weight, bias, token, channel, num_tokens, columns, channels, x_row, x_column,
        TOKENS, CHANNELS, TAPS, KERNEL_COLUMNS, TOP, LEFT, REVERSE, BIASED,
    )  # fmt: skip
    if SILU:
        sums /= 1.0 + tl.exp(-sums)
    at = (batch * num_tokens + token)[:, None] * channels + channel[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), (token < num_tokens)[:, None] & (channel < channels)[None, :])


@triton.jit
def sums_kernel(
    dy, x, weight, bias, d_sum, parts, num_tokens, columns, channels,
    dy_batch, dy_row, dy_column, x_batch, x_row, x_column,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr, BIASED: tl.constexpr, SILU: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Compute d_sum (B, S, C), the gradients of the sums before the activation, and from these the parameters'.

    The latter in parts (programs by tokens, taps and 1, C), to be added: of weights, then of the bias.
    """
    group, first, block, batch = place(num_tokens, tl.cdiv(channels, CHANNELS), TILES * TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    dy += batch * dy_batch
    x += batch * x_batch
    in_block = channel < channels
    gradients = ()
    for _ in tl.static_range(TAPS + 1):
        gradients = gradients + (tl.zeros((TOKENS, CHANNELS), tl.float32),)  # noqa: RUF005 - no unpacking in Triton
    for tile in range(0, TILES):
        token = first + tile * TOKENS + tl.arange(0, TOKENS)
        d = _neighbours(dy, token, channel, 0, num_tokens, columns, channels, dy_row, dy_column, 1, 0, 0, False)
        if SILU:
            sums = _convolve(
                x, weight, bias, token, channel, num_tokens, columns, channels, x_row, x_column,
                TOKENS, CHANNELS, TAPS, KERNEL_COLUMNS, TOP, LEFT, REVERSE, BIASED,
            )  # fmt: skip
            sigmoid = 1.0 / (1.0 + tl.exp(-sums))
            d *= sigmoid * (1.0 + sums * (1.0 - sigmoid))
            at = (batch * num_tokens + token)[:, None] * channels + channel[None, :]
            tl.store(d_sum + at, d.to(d_sum.dtype.element_ty), (token < num_tokens)[:, None] & in_block[None, :])
        following = ()
        for tap in tl.static_range(TAPS):
            seen = _neighbours(
                x, token, channel, tap, num_tokens, columns, channels, x_row, x_column,
                KERNEL_COLUMNS, TOP, LEFT, REVERSE,
            )  # fmt: skip
            following = following + (gradients[tap] + d * seen,)  # noqa: RUF005
        gradients = following + (gradients[TAPS] + d,)  # noqa: RUF005
    for tap in tl.static_range(TAPS + 1):
        at = (group.to(tl.int64) * (TAPS + 1) + tap) * channels + channel
        tl.store(parts + at, tl.sum(gradients[tap], 0), in_block)
