"""Depthwise convolutions of tokens, channels last: over a grid, or causally over a sequence; with SiLU where asked.

    y[t, c] = activation(bias[c] + sum over taps s of weight[c, s] x[t + s - p, c]),   zeros outside

with p = (K - 1) / 2 along rows and columns of a grid ("same" padding, odd K), and p = K - 1 along a sequence, of which
a token then sees the K - 1 tokens before it. ``reverse`` turns the kernel by 180 degrees, which equals flipping the
tokens before and after: a token of a sequence then sees those that follow it. Used by Vision-LSTM (arXiv 2406.04303),
Mamba (arXiv 2312.00752) and Vision Mamba (arXiv 2401.09417).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.autocast import without_autocast
from linvision.ops.checks import ANY, OPTIONAL, SAME, Row, check, check_axes
from linvision.ops.dispatch import Dispatcher

Activation = Literal["silu"] | None
WIDEST_BFLOAT16 = 8  # taps along a side
GRID = ("B", "rows", "columns", "C")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None, reverse: bool = False
) -> Tensor:
    """Convolve each channel of a grid of tokens with its own kernel (equation above); the grid keeps its size.

    Args:
        x: tokens (B, rows, columns, C), of any strides; those with contiguous channels need no copy.
        weight: kernels (C, 1, K, L), K and L odd; may be of another floating-point type than x.
        bias: (C,) or None.
        activation: "silu" or None.
        reverse: turn the kernels by 180 degrees.

    Returns:
        (B, rows, columns, C) in x's type; sums are float32 (in plain PyTorch: those of its convolution).

    Raises:
        ValueError: where shapes, types or devices disagree, for an even kernel or an unknown activation.
    """
    _check_activation("depthwise_conv2d", activation)
    return _convolve(x, weight, bias, False, activation == "silu", reverse)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = None, reverse: bool = False
) -> Tensor:
    """Convolve each channel of a sequence of tokens with its own kernel over the tokens so far (equation above).

    Args:
        x: tokens (B, S, C), of any strides; those with contiguous channels need no copy.
        weight: kernels (C, 1, K), the last tap for the token itself; may be of another floating-point type than x.
        bias: (C,) or None.
        activation: "silu" or None.
        reverse: look at the tokens that follow instead: the last tap for the token itself, those before it for the
            next ones in turn.

    Returns:
        (B, S, C) in x's type; sums are float32 (in plain PyTorch: those of its convolution).

    Raises:
        ValueError: where shapes, types or devices disagree, or for an unknown activation.
    """
    if x.ndim != 3 or weight.ndim != 3:
        check_axes("causal_conv1d", "x", x, "BSC")
        check_axes("causal_conv1d", "weight", weight, "C1K")
    _check_activation("causal_conv1d", activation)
    try:
        return _convolve(x[:, None], weight[:, :, None], bias, True, activation == "silu", reverse)[:, 0]
    except ValueError:
        check("causal_conv1d", "x", x, *_rows(x, weight, bias))  # tells it in the shapes that were given
        raise


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool) -> None:
    op = "causal_conv1d" if causal else "depthwise_conv2d"
    check_axes(op, "x", x, GRID)
    check_axes(op, "weight", weight, "C1KL", needed="CKL")
    check(op, "x", x, *_rows(x, weight, bias))
    rows, columns = weight.shape[2:]
    if causal and rows != 1:
        raise ValueError(f"{op}: kernels must have 1 row but are {(rows, columns)}")
    if not (causal or (rows % 2 and columns % 2)):
        raise ValueError(f"{op}: kernels must have odd sides but are {(rows, columns)}")


def _check_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool) -> None:
    _check(x, weight, bias, causal)
    check("depthwise_conv", "x", x, ("dy", dy, "(B, rows, columns, C)", x.shape, SAME))


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Row, Row]:
    channels, kernels = x.shape[-1], weight.shape
    letters = "(C, 1, K)" if len(kernels) == 3 else "(C, 1, K, L)"
    return (
        ("weight", weight, letters, (channels, 1, *kernels[2:]), ANY),
        ("bias", bias, "(C,)", (channels,), ANY | OPTIONAL),
    )


def _check_activation(op: str, activation: Activation) -> None:
    if activation not in ("silu", None):
        raise ValueError(f"{op}: activation must be 'silu' or None but is {activation!r}")


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool, reverse: bool) -> Tensor:
    """Convolve as an image in channels-last layout, which is this very memory."""
    if x.numel() == 0:  # torch's convolution refuses it; so all gradients are there, and zero
        return x * sum(each[:0].sum() for each in (weight, bias) if each is not None)
    # oneDNN takes minutes to prepare a wide convolution of bfloat16.
    wide = x.device.type == "cpu" and max(weight.shape[2:]) > WIDEST_BFLOAT16
    convolve, dtype = without_autocast(F.conv2d) if wide else F.conv2d, x.dtype
    if wide and x.dtype == torch.bfloat16:
        x = x.float()
    weight = (weight.flip(2, 3) if reverse else weight).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    if causal:
        seen = weight.shape[3] - 1
        image, padding = F.pad(x, (0, 0, 0, seen) if reverse else (0, 0, seen, 0)), (0, 0)
    else:
        image = x
    y = convolve(image.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)
    return (F.silu(y) if silu else y).to(dtype)


IMPLEMENTATIONS = Dispatcher("depthwise_conv", reference=_reference)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool, reverse: bool) -> Tensor:
    form = IMPLEMENTATIONS.inlined(x, weight)
    if form is not None:
        _check(x, weight, bias, causal)
        return form(x, weight, bias, causal, silu, reverse)
    return torch.ops.linvision.depthwise_conv(x, weight, bias, causal, silu, reverse)


# The op as torch sees it, on grids: opaque to compile and export, with a meta kernel, a gradient and a count of its
# operations.


@torch.library.custom_op("linvision::depthwise_conv", mutates_args=())
def _depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool, reverse: bool) -> Tensor:
    _check(x, weight, bias, causal)
    implementation = IMPLEMENTATIONS.choose(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return implementation.forward(x, weight, bias, causal=causal, silu=silu, reverse=reverse)


@_depthwise_conv.register_fake
def _(x, weight, bias, causal, silu, reverse):
    _check(x, weight, bias, causal)
    return x.new_empty(x.shape)


@torch.library.custom_op("linvision::depthwise_conv_backward", mutates_args=())
def _depthwise_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, causal: bool, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(dy, x, weight, bias, causal)
    implementation = IMPLEMENTATIONS.kernels(x, weight)
    return implementation.backward(dy, x, weight, bias, causal=causal, silu=silu, reverse=reverse)


@_depthwise_conv_backward.register_fake
def _(dy, x, weight, bias, causal, silu, reverse):
    _check_backward(dy, x, weight, bias, causal)
    dbias = weight.new_empty(len(weight), dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    x, weight, bias = ctx.saved_tensors
    gradients = torch.ops.linvision.depthwise_conv_backward(dy, x, weight, bias, ctx.causal, ctx.silu, ctx.reverse)
    dx, dweight, dbias = gradients
    return dx, dweight, None if bias is None else dbias, None, None, None


_depthwise_conv.register_autograd(_gradient, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvision.depthwise_conv)
def depthwise_conv_flops(x_shape, weight_shape, *args, out_shape=None, **options) -> int:
    """Count a multiply-add for each tap, as for any convolution: the activation is left out."""
    batch, rows, columns, channels = x_shape
    return 2 * batch * rows * columns * channels * weight_shape[-2] * weight_shape[-1]
