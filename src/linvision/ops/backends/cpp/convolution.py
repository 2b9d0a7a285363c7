"""Depthwise convolution in C++: ``linvision.ops.convolution`` on a CPU (``kernels/convolution.cpp``)."""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Grid, call, pointer, readable, unreadable
from linvision.ops.backends.strides import with_unit_stride

MAX_KERNEL = 15


_SHAPE = [
    (name, ctypes.c_int64)
    for name in ("batch", "rows", "columns", "channels", "kernel_rows", "kernel_columns", "top", "left")
]
_FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "silu", "reverse", "threads")]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Grid) for name in ("x", "y")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *_SHAPE,
        *_FLAGS,
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, Grid) for name in ("x", "dy", "dx", "d_sum")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "dweight", "dbias")),
        *_SHAPE,
        *_FLAGS,
    ]


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unreadable(x)
    if reason is None and max(weight.shape[-2:], default=0) > MAX_KERNEL:
        return f"a kernel of {tuple(weight.shape[-2:])}, above {MAX_KERNEL}"
    return reason


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, causal: bool, silu: bool, reverse: bool) -> Tensor:
    """Convolve a grid (B, rows, columns, C) with kernels (C, 1, kernel rows, kernel columns)."""
    x_, weight_, bias_ = readable(x), weight.float().contiguous(), _as_float(bias)
    y = x_.new_empty(x_.shape)
    arguments = _Forward(
        Grid.of(x_),
        Grid.of(y),
        pointer(weight_),
        pointer(bias_),
        *_shape(x, weight, causal),
        DTYPES[x_.dtype],
        silu,
        reverse,
        torch.get_num_threads(),
    )
    call("linvision_depthwise_conv_forward", arguments)
    return y.to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, causal: bool, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x, weight and bias; without a bias the last one means nothing."""
    x_, weight_, bias_ = readable(x), weight.float().contiguous(), _as_float(bias)
    dy_ = with_unit_stride(dy.to(x_.dtype))
    dx, dweight, dbias = x_.new_empty(x_.shape), torch.empty_like(weight_), weight_.new_empty(len(weight))
    d_sum = x_.new_empty(x_.shape, dtype=torch.float32) if silu else None
    arguments = _Backward(
        *(Grid.of(tensor) for tensor in (x_, dy_, dx)),
        Grid() if d_sum is None else Grid.of(d_sum),
        *(pointer(tensor) for tensor in (weight_, bias_, dweight, dbias)),
        *_shape(x, weight, causal),
        DTYPES[x_.dtype],
        silu,
        reverse,
        torch.get_num_threads(),
    )
    call("linvision_depthwise_conv_backward", arguments)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _shape(x: Tensor, weight: Tensor, causal: bool) -> tuple[int, ...]:
    rows, columns = weight.shape[-2:]
    grid = x.shape if x.numel() else (0, 0, 0, x.shape[-1])  # an empty grid may have sides whose product overflows
    return (*grid, rows, columns, rows // 2, columns - 1 if causal else columns // 2)


def _as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()
