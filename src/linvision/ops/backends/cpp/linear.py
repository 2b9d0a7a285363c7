"""Linear layers and MLPs in C++: the body of ``linvision.ops.linear`` on a CPU (``kernels/linear.cpp``)."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, call, level, pointer, unreadable
from linvision.ops.backends.strides import with_unit_stride

if TYPE_CHECKING:
    from linvision.ops.linear import LayerNorm, Linear

DEVICE = "cpu"


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    @classmethod
    def of(cls, x: Tensor | None) -> "_Rows":
        return cls(None, 0) if x is None else cls(x.data_ptr(), x.stride(0))


class NormArguments(ctypes.Structure):
    """A layer norm, or none."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float)]


class LayerArguments(ctypes.Structure):
    """A linear layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


_FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "threads")]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in ("x", "gate", "residual", "y")),
        ("norm", NormArguments),
        ("layer", LayerArguments),
        ("rows", ctypes.c_int64),
        *_FLAGS,
    ]


class _Mlp(ctypes.Structure):
    _fields_ = [
        *((name, _Rows) for name in ("x", "residual", "y")),
        ("norm", NormArguments),
        *((name, LayerArguments) for name in ("first", "second")),
        ("rows", ctypes.c_int64),
        *_FLAGS,
    ]


class Parameters:
    """Parameters as kernels read them, alive as long as this object."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def norm(self, norm: "LayerNorm | None") -> NormArguments:
        """Describe a layer norm."""
        if norm is None:
            return NormArguments(None, None, 0.0)
        return NormArguments(self._floats(norm.weight), self._floats(norm.bias), norm.eps)

    def layer(self, layer: "Linear") -> LayerArguments:
        """Describe a linear layer."""
        outputs, inputs = layer.weight.shape
        return LayerArguments(self._kept(layer.weight.contiguous()), self._floats(layer.bias), inputs, outputs)

    def _floats(self, x: Tensor | None) -> int | None:
        return None if x is None else self._kept(x.float().contiguous())

    def _kept(self, x: Tensor) -> int | None:
        self.tensors.append(x)
        return pointer(x)


def refuses(*tensors: Tensor | None) -> str | None:
    """Say why these inputs (tokens, weights) cannot be computed, or return None if they can."""
    x = tensors[0]
    assert x is not None
    reason = unreadable(x)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES or any(weight is not None and weight.dtype != x.dtype for weight in tensors):
        return f"types {[str(weight.dtype) for weight in tensors if weight is not None]}, not one of {list(DTYPES)}"
    if x.dtype == torch.bfloat16 and level() != "avx512_bf16":
        return "this CPU has no instructions for products of bfloat16"
    if x.dtype == torch.bfloat16 and any(weight is not None and weight.shape[1] % 2 for weight in tensors[1:]):
        return "products of bfloat16 take an even number of channels"
    return None


def linear(
    x: Tensor, layer: "Linear", norm: "LayerNorm | None", gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Map the last axis of x by a linear layer."""
    return _run("linvision_linear_forward", _Linear, [x, gate, residual], norm, [layer])


def mlp(x: Tensor, first: "Linear", second: "Linear", norm: "LayerNorm | None", residual: Tensor | None) -> Tensor:
    """Map the last axis of x by two linear layers with a GELU between them."""
    return _run("linvision_mlp_forward", _Mlp, [x, residual], norm, [first, second])


def _run(
    function: str,
    structure: type[ctypes.Structure],
    tokens: list[Tensor | None],
    norm: "LayerNorm | None",
    layers: "list[Linear]",
) -> Tensor:
    x = tokens[0]
    assert x is not None
    y = x.new_empty(*x.shape[:-1], len(layers[-1].weight))
    rows = [None if tensor is None else _rows(tensor) for tensor in tokens]
    parameters = Parameters()
    arguments = structure(
        *map(_Rows.of, (*rows, _rows(y))),
        parameters.norm(norm),
        *map(parameters.layer, layers),
        y.numel() // y.shape[-1],
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    call(function, arguments)
    return y


def _rows(x: Tensor) -> Tensor:
    return with_unit_stride(x.reshape(-1, x.shape[-1]))
