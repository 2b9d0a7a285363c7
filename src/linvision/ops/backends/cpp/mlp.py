"""Two linear layers with a GELU between them in C++ (``kernels/linear.cpp``): ``linvision.ops.fused.mlp`` on a CPU."""

import ctypes

from torch import Tensor

from linvision.ops.backends.cpp.linear import FLAGS, LayerArguments, NormArguments, Rows, run, unsupported
from linvision.ops.parameters import LayerNormParameters, LinearParameters

__all__ = ["forward", "unsupported"]


class _Mlp(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in ("x", "residual", "y")),
        ("norm", NormArguments),
        *((name, LayerArguments) for name in ("first", "second")),
        ("rows", ctypes.c_int64),
        *FLAGS,
    ]


def forward(
    x: Tensor,
    first: LinearParameters,
    second: LinearParameters,
    norm: LayerNormParameters | None,
    residual: Tensor | None,
) -> Tensor:
    """Map the last axis of x by two linear layers."""
    return run("linvision_mlp_forward", _Mlp, x, [residual], norm, [first, second])
