"""Triton kernels for block-diagonal layers of 4 x 4 matrices: one program a tile of tokens and channels.

A tile is cut into the four channels of each group, which a thread holds side by side, so that numbers are read and
written in long pieces and only change places inside a thread.
"""

# Kernels are Triton's language: not all of it has Python's types.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from linvision.ops.backends.triton.tiles import place


@triton.jit
def _load_parts(x, batch, token, group, num_tokens, num_groups, x_batch, x_token):
    """Load tokens' channels in float32: the first, second, third and fourth of each group, (T, G) each."""
    at = batch * x_batch + token.to(tl.int64) * x_token
    channel = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = (token < num_tokens)[:, None, None] & (group < num_groups)[None, :, None]
    tile = tl.load(x + at[:, None, None] + channel[None, :, :], inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(tile, (token.shape[0], group.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_parts(y, parts, batch, token, group, num_tokens, num_groups):
    """Store what ``_load_parts`` loads, contiguous."""
    at = (batch * num_tokens + token) * (num_groups * 4)
    channel = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    inside = (token < num_tokens)[:, None, None] & (group < num_groups)[None, :, None]
    tile = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    tile = tl.reshape(tile, (token.shape[0], group.shape[0], 4)).to(y.dtype.element_ty)
    tl.store(y + at[:, None, None] + channel[None, :, :], tile, tl.broadcast_to(inside, tile.shape))


@triton.jit
def _multiply(parts, weight, group, num_groups, TRANSPOSED: tl.constexpr):
    """Multiply the channels of each group by its matrix."""
    results = ()
    for i in tl.static_range(4):
        sums = tl.zeros_like(parts[0])
        for j in tl.static_range(4):
            entry = group * 16 + i * 4 + j
            if TRANSPOSED:
                entry = group * 16 + j * 4 + i
            w = tl.load(weight + entry, group < num_groups, other=0.0).to(tl.float32)
            sums += w[None, :] * parts[j]
        results = results + (sums,)  # noqa: RUF005 - Triton knows no unpacking
    return results


@triton.jit
def forward_kernel(
    x, weight, bias, y, num_tokens, num_groups, x_batch, x_token,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Compute y (B, S, 4 G)."""
    _, first, group, batch = place(num_tokens, num_groups, TOKENS, GROUPS)
    token = first + tl.arange(0, TOKENS)
    parts = _load_parts(x, batch, token, group, num_tokens, num_groups, x_batch, x_token)
    sums = _multiply(parts, weight, group, num_groups, False)
    if BIASED:
        biased = ()
        for i in tl.static_range(4):
            of_part = tl.load(bias + group * 4 + i, group < num_groups, other=0.0).to(tl.float32)
            biased = biased + (sums[i] + of_part[None, :],)  # noqa: RUF005
        sums = biased
    _store_parts(y, sums, batch, token, group, num_tokens, num_groups)


@triton.jit
def backward_kernel(
    dy, x, weight, dx, sums, num_tokens, num_groups, dy_batch, dy_token, x_batch, x_token,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Compute dx (B, S, 4 G), and in parts, to be added, the sums over tokens (programs by tokens, 20, G).

    These are dy_i x_j, at 4 i + j, then dy_i.
    """
    piece, first, group, batch = place(num_tokens, num_groups, TILES * TOKENS, GROUPS)
    gradients = ()
    for _ in tl.static_range(20):
        gradients = gradients + (tl.zeros((TOKENS, GROUPS), tl.float32),)  # noqa: RUF005
    for tile in range(0, TILES):
        token = first + tile * TOKENS + tl.arange(0, TOKENS)
        of_y = _load_parts(dy, batch, token, group, num_tokens, num_groups, dy_batch, dy_token)
        of_x = _load_parts(x, batch, token, group, num_tokens, num_groups, x_batch, x_token)
        products = _multiply(of_y, weight, group, num_groups, True)
        _store_parts(dx, products, batch, token, group, num_tokens, num_groups)
        following = ()
        for i in tl.static_range(4):
            for j in tl.static_range(4):
                following = following + (gradients[4 * i + j] + of_y[i] * of_x[j],)  # noqa: RUF005
        for i in tl.static_range(4):
            following = following + (gradients[16 + i] + of_y[i],)  # noqa: RUF005
        gradients = following
    for number in tl.static_range(20):
        at = (piece.to(tl.int64) * 20 + number) * num_groups + group
        tl.store(sums + at, tl.sum(gradients[number], 0), group < num_groups)
