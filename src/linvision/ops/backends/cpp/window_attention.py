"""Window attention in C++ (``kernels/window_attention.cpp``): the body of ``linvision.ops.window_attention``."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linvision.ops.backends.cpp import linear
from linvision.ops.backends.cpp.library import DTYPES, Grid, call
from linvision.ops.backends.cpp.linear import LayerArguments, NormArguments, Parameters
from linvision.ops.backends.strides import with_unit_stride

if TYPE_CHECKING:
    from linvision.ops.linear import LayerNorm, Linear

DEVICE = "cpu"
refuses = linear.refuses


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Grid) for name in ("x", "y")),
        ("norm", NormArguments),
        *((name, LayerArguments) for name in ("qkv", "proj")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "columns", "heads", "window")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    ]


def forward(x: Tensor, qkv: "Linear", proj: "Linear", norm: "LayerNorm", num_heads: int, window_size: int) -> Tensor:
    """Add to each token of x (B, H, W, C) what its window holds for it."""
    parameters, x_ = Parameters(), with_unit_stride(x)
    y = x.new_empty(x.shape)
    arguments = _Forward(
        Grid.of(x_),
        Grid.of(y),
        parameters.norm(norm),
        parameters.layer(qkv),
        parameters.layer(proj),
        *x.shape[:3],
        num_heads,
        window_size,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    call("linvision_window_attention_forward", arguments)
    return y
