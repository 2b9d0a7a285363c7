"""Softmax attention within square windows of a grid of tokens, from the layer norm before it to the residual sum after.

    y = x + proj(attention(qkv(norm(x))))

in every window of w x w tokens that tile the grid; zeros, after the norm, fill up the windows at the right and the
bottom. Without gradients a CPU takes one window after the other through all of it, while its tokens are in the cache.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.autocast import casts
from linvision.ops.checks import check, check_axes
from linvision.ops.dispatch import Dispatcher, has_unknown_sides, is_traceable
from linvision.ops.fused.linear import layer_rows, normalise, project
from linvision.ops.parameters import LayerNormParameters, LinearParameters

torch.fx.wrap("pad_to_multiple")  # torch.fx cannot look into it

MAX_WINDOW = 1024  # tokens along a side


def window_attention(
    x: Tensor,
    qkv: LinearParameters,
    proj: LinearParameters,
    *,
    norm: LayerNormParameters,
    num_heads: int,
    window_size: int,
) -> Tensor:
    """Add to each token what attention within its window finds for it (equation above).

    Args:
        x: tokens (B, H, W, C), of the weights' type.
        qkv: queries, keys and values of all heads, one after the other: weight (3 C, C).
        proj: weight (C, C).
        norm: the layer norm.
        num_heads: heads, of C / num_heads channels each.
        window_size: tokens along a side of a window, w.

    Returns:
        (B, H, W, C) in x's type; kernels sum in float32.

    Raises:
        ValueError: where shapes, types or devices disagree, the heads do not divide C, or for a window below 1 or
            above 1024.
    """
    form = IMPLEMENTATIONS.inlined(x, qkv.weight, proj.weight, inference_only=True)
    if form is not None:
        _check(x, qkv, proj, norm, num_heads, window_size, alike=not casts(x))
        return form(x, qkv, proj, norm, num_heads, window_size)
    return torch.ops.linvision.window_attention(x, *qkv, *proj, *norm, num_heads, window_size)


def _check(
    x: Tensor,
    qkv: LinearParameters,
    proj: LinearParameters,
    norm: LayerNormParameters,
    num_heads: int,
    window_size: int,
    *,
    alike: bool = True,
) -> None:
    check_axes("window_attention", "x", x, "BHWC")
    width = x.shape[-1]
    rows = layer_rows("window_attention", x, ("qkv", qkv), norm=norm, alike=alike)
    check("window_attention", "x", x, *rows, *layer_rows("window_attention", x, ("proj", proj), alike=alike))
    if len(qkv.weight) != 3 * width or len(proj.weight) != width or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"window_attention: for {width} channels qkv must have {3 * width} outputs, proj {width}, and the heads "
            f"must divide them, but these are {len(qkv.weight)}, {len(proj.weight)} and {num_heads}"
        )
    _check_windows("window_attention", "x", x, "BHWC", window_size)


def _check_windows(op: str, name: str, x: Tensor, letters: str, window_size: int) -> None:
    check_axes(op, name, x, letters)
    check(op, name, x)
    if not 1 <= window_size <= MAX_WINDOW:
        raise ValueError(
            f"{op}: window_size={window_size}: a window has at least 1 token along a side and at most {MAX_WINDOW}"
        )


def pad_to_multiple(x: Tensor, divisor: int) -> Tensor:
    """Pad (B, H, W, C) with zeros at the right and the bottom until ``divisor`` divides H and W."""
    below, right = (-side % divisor for side in x.shape[1:3])
    return F.pad(x, (0, 0, 0, right, 0, below)) if right or below else x


def attend_in_windows(
    x: Tensor,
    qkv: Callable[[Tensor], Tensor],
    proj: Callable[[Tensor], Tensor],
    *,
    num_heads: int,
    window_size: int,
) -> Tensor:
    """Attend within the windows of tokens (B, H, W, C), without norm and residual sum, in plain PyTorch."""
    (B, H, W, C), w = x.shape, window_size
    hidden = has_unknown_sides(x) and not is_traceable()
    windows = torch.ops.linvision.to_windows(x, w) if hidden else _to_windows(x, w)
    q, k, v = qkv(windows).unflatten(-1, (3, num_heads, C // num_heads)).permute(2, 0, 3, 1, 4)
    windows = proj(_attend(q, k, v).transpose(1, 2).flatten(2))
    return torch.ops.linvision.from_windows(windows, w, B, H, W) if hidden else _from_windows(windows, w, B, H, W)


def _counts(H: int, W: int, w: int) -> tuple[int, int]:
    return (H + w - 1) // w, (W + w - 1) // w


def _to_windows(x: Tensor, w: int) -> Tensor:
    """Cut tokens (B, H, W, C) into windows (B * windows, w * w, C)."""
    B, H, W, C = x.shape
    rows, columns = _counts(H, W, w)
    tiles = pad_to_multiple(x, w).view(B, rows, w, columns, w, C)
    return tiles.transpose(2, 3).reshape(B * rows * columns, w * w, C)


def _from_windows(windows: Tensor, w: int, B: int, H: int, W: int) -> Tensor:
    """Lay windows out as the tokens (B, H, W, C) that they were cut from."""
    rows, columns = _counts(H, W, w)
    tiles = windows.view(B, rows, columns, w, w, windows.shape[2]).transpose(2, 3)
    return tiles.reshape(B, rows * w, columns * w, windows.shape[2])[:, :H, :W]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by torch's kernels; those have no forward-mode derivative, but its matrix products do."""
    if forward_ad._current_level < 0:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _reference(
    x: Tensor,
    qkv: LinearParameters,
    proj: LinearParameters,
    norm: LayerNormParameters,
    num_heads: int,
    window_size: int,
) -> Tensor:
    layers = [partial(project, layer=layer) for layer in (qkv, proj)]
    return x + attend_in_windows(normalise(x, norm), *layers, num_heads=num_heads, window_size=window_size)


IMPLEMENTATIONS = Dispatcher("window_attention", reference=_reference)


# Windows as ops, for compilers alone: two permutations, each the gradient of the other.


@torch.library.custom_op("linvision::to_windows", mutates_args=())
def _to_windows_op(x: Tensor, window_size: int) -> Tensor:
    _check_windows("to_windows", "x", x, "BHWC", window_size)
    return _to_windows(x, window_size).clone()


@_to_windows_op.register_fake
def _(x, window_size):
    _check_windows("to_windows", "x", x, "BHWC", window_size)
    B, H, W, C = x.shape
    rows, columns = _counts(H, W, window_size)
    return x.new_empty(B * rows * columns, window_size**2, C)


@torch.library.custom_op("linvision::from_windows", mutates_args=())
def _from_windows_op(windows: Tensor, window_size: int, batch: int, rows: int, columns: int) -> Tensor:
    _check_counts(windows, window_size, batch, rows, columns)
    return _from_windows(windows, window_size, batch, rows, columns).clone(memory_format=torch.contiguous_format)


@_from_windows_op.register_fake
def _(windows, window_size, batch, rows, columns):
    _check_counts(windows, window_size, batch, rows, columns)
    return windows.new_empty(batch, rows, columns, windows.shape[2])


def _check_counts(windows: Tensor, window_size: int, batch: int, rows: int, columns: int) -> None:
    _check_windows("from_windows", "windows", windows, "BSC", window_size)
    if not all(isinstance(size, int) for size in (*windows.shape, batch, rows, columns)):
        return  # a compiler's symbols, whose comparison would bind them
    down, across = _counts(rows, columns, window_size)
    if min(batch, rows, columns) < 0 or windows.shape[:2] != (batch * down * across, window_size**2):
        raise ValueError(
            f"from_windows: {batch} images of {rows} x {columns} tokens have {batch * down * across} windows of "
            f"{window_size**2} tokens, but windows has shape {tuple(windows.shape)}"
        )


def _note_windows(ctx, inputs, output):
    x, ctx.window_size = inputs
    ctx.sizes = x.shape[:3]


def _note_tokens(ctx, inputs, output):
    ctx.window_size = inputs[1]


_to_windows_op.register_autograd(
    lambda ctx, dy: (torch.ops.linvision.from_windows(dy.contiguous(), ctx.window_size, *ctx.sizes), None),
    setup_context=_note_windows,
)
_from_windows_op.register_autograd(
    lambda ctx, dy: (torch.ops.linvision.to_windows(dy, ctx.window_size), None, None, None, None),
    setup_context=_note_tokens,
)


# The op as torch sees it: opaque, with a meta kernel and counted operations.


@torch.library.custom_op("linvision::window_attention", mutates_args=())
def _window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float,
    num_heads: int,
    window_size: int,
) -> Tensor:
    qkv, proj = LinearParameters(qkv_weight, qkv_bias), LinearParameters(proj_weight, proj_bias)
    norm = LayerNormParameters(norm_weight, norm_bias, eps)
    _check(x, qkv, proj, norm, num_heads, window_size)
    return IMPLEMENTATIONS.choose(x, qkv_weight, proj_weight).forward(x, qkv, proj, norm, num_heads, window_size)


@_window_attention.register_fake
def _(x, qkv_weight, qkv_bias, proj_weight, proj_bias, norm_weight, norm_bias, eps, num_heads, window_size):
    qkv, proj = LinearParameters(qkv_weight, qkv_bias), LinearParameters(proj_weight, proj_bias)
    _check(x, qkv, proj, LayerNormParameters(norm_weight, norm_bias, eps), num_heads, window_size)
    return x.new_empty(x.shape)


@register_flop_formula(torch.ops.linvision.window_attention)
def _flops(x_shape, qkv_shape, qkv_bias, proj_shape, *args, out_shape=None, **kwargs) -> int:
    (batch, rows, columns, width), w = x_shape, args[-1]
    tokens = batch * (rows + -rows % w) * (columns + -columns % w)
    return tokens * (2 * (torch.Size(qkv_shape).numel() + torch.Size(proj_shape).numel()) + 4 * w * w * width)
