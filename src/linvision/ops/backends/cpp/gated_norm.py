"""Head norm, skip and gate in C++: ``linvision.ops.gated_norm`` on a CPU (``kernels/gated_norm.cpp``)."""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Strided, call, pointer, readable, unreadable
from linvision.ops.backends.strides import with_unit_stride

_TAIL = [
    *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")),
    ("eps", ctypes.c_float),
    *((name, ctypes.c_int32) for name in ("dtype", "threads")),
]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("h", "c", "z", "y")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "skip")),
        *_TAIL,
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("h", "dh", "c", "z", "dy", "dc", "dz")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "skip", "dweight", "dbias", "dskip")),
        *_TAIL,
    ]


def unsupported(h: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    return unreadable(h)


def forward(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """Normalise the heads of h (B, S, H, D), add skip * c and gate by z, if it is there: (B, S, E)."""
    h_, c_, z_ = readable(h), readable(c), None if z is None else readable(z)
    parameters = [None if x is None else x.float().contiguous() for x in (weight, bias, skip)]
    y = c_.new_empty(c_.shape)
    arguments = _Forward(
        *(Strided.of(x) for x in (h_, c_, z_, y)),
        *map(pointer, parameters),
        *h.shape,
        eps,
        DTYPES[h_.dtype],
        torch.get_num_threads(),
    )
    call("linvision_gated_norm_forward", arguments)
    return y.to(h.dtype)


def backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> list[Tensor]:
    """Compute the gradients of all inputs, in order, that of a bias that is None left out."""
    h_, c_, z_ = (readable(x) for x in (h, c, z))
    dy_ = with_unit_stride(dy.to(h_.dtype))
    parameters = [None if x is None else x.float().contiguous() for x in (weight, bias, skip)]
    dh, dc, dz = (x.new_empty(x.shape) for x in (h_, c_, z_))
    results = [None if x is None else torch.empty_like(x) for x in parameters]
    arguments = _Backward(
        *(Strided.of(x) for x in (h_, dh, c_, z_, dy_, dc, dz)),
        *map(pointer, (*parameters, *results)),
        *h.shape,
        eps,
        DTYPES[h_.dtype],
        torch.get_num_threads(),
    )
    call("linvision_gated_norm_backward", arguments)
    pairs = zip((dh, dc, dz, *results), (h, c, z, weight, bias, skip), strict=True)
    return [d.to(x.dtype) for d, x in pairs if d is not None and x is not None]
