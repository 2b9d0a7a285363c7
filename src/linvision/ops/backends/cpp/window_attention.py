"""Window attention in C++ (``kernels/window_attention.cpp``): ``linvision.ops.fused.window_attention`` on a CPU."""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Grid, call
from linvision.ops.backends.cpp.linear import LayerArguments, NormArguments, Parameters, unsupported
from linvision.ops.backends.strides import with_unit_stride
from linvision.ops.parameters import LayerNormParameters, LinearParameters

__all__ = ["forward", "unsupported"]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Grid) for name in ("x", "y")),
        ("norm", NormArguments),
        *((name, LayerArguments) for name in ("qkv", "proj")),
        *((name, ctypes.c_int64) for name in ("batch", "rows", "columns", "heads", "window")),
        *((name, ctypes.c_int32) for name in ("dtype", "threads")),
    ]


def forward(
    x: Tensor,
    qkv: LinearParameters,
    proj: LinearParameters,
    norm: LayerNormParameters,
    num_heads: int,
    window_size: int,
) -> Tensor:
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
