"""Triton kernels for depthwise convolutions of tokens: one program a tile of tokens and channels.

All that they do is to move numbers: a token's neighbours are read again for every tap, from the cache.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import place, sigmoid, store_rows


@triton.jit
def _grid(token, num_tokens, columns):
    """Return the rows and columns of tokens; those of a token that does not exist are far outside of any grid."""
    row = token // columns
    column = token - row * columns
    return tl.where(token < num_tokens, row, -(1 << 16)), column


@triton.jit
def _at(x, row, column, channel, x_row, X_COLUMN: tl.constexpr):
    """Return where channels of tokens lie."""
    return x + (row.to(tl.int64) * x_row + column.to(tl.int64) * X_COLUMN)[:, None] + channel[None, :]


@triton.jit
def _inside(place, count):
    """Tell which places are neither negative nor beyond, in one comparison."""
    return place.to(tl.uint32) < tl.cast(count, tl.uint32)


@triton.jit
def _seen(
    at, row, column, channel, num_tokens, columns, x_row, X_COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    TAP: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Load what tokens at certain places see through a tap, in float32: zeros outside of the grid."""
    down: tl.constexpr = (TOP - TAP // KERNEL_COLUMNS) if REVERSE else (TAP // KERNEL_COLUMNS - TOP)
    right: tl.constexpr = (LEFT - TAP % KERNEL_COLUMNS) if REVERSE else (TAP % KERNEL_COLUMNS - LEFT)
    inside = (_inside(row + down, num_tokens // columns) & _inside(column + right, columns))[:, None]
    if tl.constexpr(WIDTH) % channel.shape[0] != 0:
        inside &= (channel < WIDTH)[None, :]
    return tl.load(at + (tl.cast(x_row, tl.int64) * down + right * X_COLUMN), inside, other=0.0).to(tl.float32)


@triton.jit
def _of_channels(x, channel, WIDTH: tl.constexpr):
    """Load a number a channel, in float32."""
    if tl.constexpr(WIDTH) % channel.shape[0] == 0:
        return tl.load(x + channel).to(tl.float32)
    return tl.load(x + channel, channel < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _convolve(
    at, weight, bias, row, column, channel, num_tokens, columns, x_row, X_COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute the sums of a tile: bias and all taps."""
    sums = tl.zeros((row.shape[0], channel.shape[0]), tl.float32)
    if bias is not None:
        sums += _of_channels(bias, channel, WIDTH)[None, :]
    for tap in tl.static_range(TAPS):
        seen = _seen(
            at, row, column, channel, num_tokens, columns, x_row, X_COLUMN, WIDTH,
            tap, KERNEL_COLUMNS, TOP, LEFT, REVERSE,
        )  # fmt: skip
        sums += _of_channels(weight + tap * WIDTH, channel, WIDTH)[None, :] * seen
    return sums


@triton.jit
def forward_kernel(
    x, weight, bias, y, num_tokens, columns, x_batch, x_row, X_COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, C) of a grid x (B, rows, columns, C) of S tokens; weight is (taps, C)."""
    _, first, block, batch = place(num_tokens, tl.cdiv(WIDTH, CHANNELS), TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    token = first + tl.arange(0, TOKENS)
    row, column = _grid(token, num_tokens, columns)
    at = _at(x + batch * x_batch, row, column, channel, x_row, X_COLUMN)
    sums = _convolve(
        at, weight, bias, row, column, channel, num_tokens, columns, x_row, X_COLUMN, WIDTH,
        TAPS, KERNEL_COLUMNS, TOP, LEFT, REVERSE,
    )  # fmt: skip
    if SILU:
        sums *= sigmoid(sums)
    store_rows(y, sums, batch * num_tokens + token, WIDTH, token < num_tokens, channel, WIDTH)


@triton.jit
def sums_kernel(
    dy, x, weight, bias, d_sum, parts, num_tokens, columns, dy_batch, dy_row, x_batch, x_row,
    DY_COLUMN: tl.constexpr, X_COLUMN: tl.constexpr, WIDTH: tl.constexpr,
    TAPS: tl.constexpr, KERNEL_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Compute d_sum (B, S, C), the gradients of the sums before the activation, and from these the parameters'.

    The latter in parts (programs by tokens, taps and 1, C), to be added: of weights, then of the bias.
    """
    group, first, block, batch = place(num_tokens, tl.cdiv(WIDTH, CHANNELS), TILES * TOKENS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    gradients = ()
    for _ in tl.static_range(TAPS + 1):
        gradients = gradients + (tl.zeros((TOKENS, CHANNELS), tl.float32),)  # noqa: RUF005 - no unpacking in Triton
    for tile in range(0, TILES):
        token = first + tile * TOKENS + tl.arange(0, TOKENS)
        row, column = _grid(token, num_tokens, columns)
        at = _at(dy + batch * dy_batch, row, column, channel, dy_row, DY_COLUMN)
        d = _seen(at, row, column, channel, num_tokens, columns, dy_row, DY_COLUMN, WIDTH, 0, 1, 0, 0, False)
        at = _at(x + batch * x_batch, row, column, channel, x_row, X_COLUMN)
        if SILU:
            sums = _convolve(
                at, weight, bias, row, column, channel, num_tokens, columns, x_row, X_COLUMN, WIDTH,
                TAPS, KERNEL_COLUMNS, TOP, LEFT, REVERSE,
            )  # fmt: skip
            opened = sigmoid(sums)
            d *= opened * (1.0 + sums * (1.0 - opened))
            store_rows(d_sum, d, batch * num_tokens + token, WIDTH, token < num_tokens, channel, WIDTH)
        following = ()
        for tap in tl.static_range(TAPS):
            seen = _seen(
                at, row, column, channel, num_tokens, columns, x_row, X_COLUMN, WIDTH,
                tap, KERNEL_COLUMNS, TOP, LEFT, REVERSE,
            )  # fmt: skip
            following = following + (gradients[tap] + d * seen,)  # noqa: RUF005
        gradients = following + (gradients[TAPS] + d,)  # noqa: RUF005
    for tap in tl.static_range(TAPS + 1):
        at = (group.to(tl.int64) * (TAPS + 1) + tap) * WIDTH + channel
        tl.store(parts + at, tl.sum(gradients[tap], 0), channel < WIDTH)
