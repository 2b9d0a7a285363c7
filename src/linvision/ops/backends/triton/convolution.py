"""Depthwise convolution in Triton: ``linvision.ops.convolution`` on a GPU.

Bias and activation are part of the one kernel forward. Backward, a kernel computes the sums again for the activation's
derivative and adds up the parameters' gradients; the tokens' gradients are the convolution of these, turned around.
Sums are float32, gradients between the two kernels of x's type.
"""

from typing import Any

import torch
from torch import Tensor

from linvision.ops.backends.strides import contiguous, with_unit_stride
from linvision.ops.backends.triton.device import launch, power_of_two, tiles_and_pieces, unusable

MAX_TAPS = 49
CHANNELS = 64
FORWARD_TOKENS, BACKWARD_TOKENS = 32, 16  # of a tile; backward there is a sum to keep for each tap


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unusable(x)
    if reason is None and weight.shape[1:].numel() > MAX_TAPS:
        return f"a kernel of {weight.shape[1:].numel()} taps, above {MAX_TAPS}"
    return reason


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, causal: bool, silu: bool, reverse: bool) -> Tensor:
    """Convolve a grid (B, rows, columns, C) with kernels (C, 1, kernel rows, kernel columns)."""
    from linvision.ops.backends.triton.convolution_kernels import forward_kernel

    x = with_unit_stride(x)
    batch, rows, columns, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        forward_kernel,
        batch * -(-rows * columns // FORWARD_TOKENS) * _num_blocks(channels),
        *(x, *_parameters(weight, bias), y),
        *(rows * columns, columns, *x.stride()[:2]),
        X_COLUMN=x.stride(2),
        TOKENS=FORWARD_TOKENS,
        SILU=silu,
        like=x,
        **_options(weight, causal, reverse),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, causal: bool, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (float32 where there is no bias)."""
    from linvision.ops.backends.triton.convolution_kernels import sums_kernel

    dy, x = with_unit_stride(dy), with_unit_stride(x)
    (batch, rows, columns, channels), taps = x.shape, weight[0].numel()
    tiles, groups = tiles_and_pieces(batch, rows * columns, BACKWARD_TOKENS)
    parts = x.new_empty(groups, taps + 1, channels, dtype=torch.float32)
    d_sum = torch.empty(x.shape, dtype=x.dtype, device=x.device) if silu else dy
    launch(
        sums_kernel,
        groups * _num_blocks(channels),
        *(dy, x, *_parameters(weight, bias), d_sum, parts),
        *(rows * columns, columns, *dy.stride()[:2], *x.stride()[:2]),
        DY_COLUMN=dy.stride(2),
        X_COLUMN=x.stride(2),
        TOKENS=BACKWARD_TOKENS,
        TILES=tiles,
        SILU=silu,
        like=x,
        **_options(weight, causal, reverse),
    )
    dx = forward(d_sum, weight, None, causal=causal, silu=False, reverse=not reverse)
    gradients = parts.sum(0)
    dweight = gradients[:taps].mT.reshape(weight.shape)
    dweight = dweight.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    return dx, dweight, gradients[taps].to(torch.float32 if bias is None else bias.dtype, copy=True)


def _parameters(weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Return weight as (taps, C), so that neighbouring channels are read at once, and bias."""
    return contiguous(weight.flatten(1).mT, bias)


def _num_blocks(channels: int) -> int:
    return -(-channels // _channels(channels))


def _channels(channels: int) -> int:
    return min(CHANNELS, power_of_two(channels))


def _options(weight: Tensor, causal: bool, reverse: bool) -> dict[str, Any]:
    kernel_rows, kernel_columns = weight.shape[2:]
    return {
        "WIDTH": len(weight),
        "CHANNELS": _channels(len(weight)),
        "TAPS": kernel_rows * kernel_columns,
        "KERNEL_COLUMNS": kernel_columns,
        "TOP": 0 if causal else kernel_rows // 2,
        "LEFT": kernel_columns - 1 if causal else kernel_columns // 2,
        "REVERSE": reverse,
        "num_warps": 4,
    }
