"""Linear layers in C++ (``kernels/linear.cpp``): ``linvision.ops.fused.linear`` on a CPU, and what its likes share."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, call, level, pointer, unreadable
from linvision.ops.backends.strides import with_unit_stride
from linvision.ops.parameters import LayerNormParameters, LinearParameters


class Rows(ctypes.Structure):
    """Tokens (rows, channels), channels contiguous."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    @classmethod
    def of(cls, x: Tensor | None) -> "Rows":
        """Describe a matrix, which must outlive the call."""
        return cls(None, 0) if x is None else cls(pointer(x), x.stride(0))


class NormArguments(ctypes.Structure):
    """A layer norm, or none."""

    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float)]


class LayerArguments(ctypes.Structure):
    """A linear layer."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "threads")]


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, Rows) for name in ("x", "gate", "residual", "y")),
        ("norm", NormArguments),
        ("layer", LayerArguments),
        ("rows", ctypes.c_int64),
        *FLAGS,
    ]


class Parameters:
    """Parameters as kernels read them, alive as long as this object."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def norm(self, norm: LayerNormParameters | None) -> NormArguments:
        """Describe a layer norm."""
        if norm is None:
            return NormArguments(None, None, 0.0)
        return NormArguments(self._floats(norm.weight), self._floats(norm.bias), norm.eps)

    def layer(self, layer: LinearParameters) -> LayerArguments:
        """Describe a linear layer."""
        outputs, inputs = layer.weight.shape
        return LayerArguments(self._kept(layer.weight.contiguous()), self._floats(layer.bias), inputs, outputs)

    def _floats(self, x: Tensor | None) -> int | None:
        return None if x is None else self._kept(x.float().contiguous())

    def _kept(self, x: Tensor) -> int | None:
        self.tensors.append(x)
        return pointer(x)


def unsupported(x: Tensor, *weights: Tensor) -> str | None:
    """Say why no kernel can multiply these tokens by these weights, or return None if one can."""
    reason = unreadable(x)
    if reason is not None:
        return reason
    dtype = x.dtype
    if dtype not in DTYPES or any(weight.dtype != dtype for weight in weights):
        return f"types {[str(tensor.dtype) for tensor in (x, *weights)]}, not one of {list(DTYPES)}"
    if dtype == torch.bfloat16 and level() != "avx512_bf16":
        return "this CPU has no instructions for products of bfloat16"
    if dtype == torch.bfloat16 and any(weight.shape[-1:].numel() % 2 for weight in weights):
        return "products of bfloat16 take an even number of channels"
    return None


def forward(
    x: Tensor,
    layer: LinearParameters,
    norm: LayerNormParameters | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """Map the last axis of x by a linear layer."""
    return run("linvision_linear_forward", _Linear, x, [gate, residual], norm, [layer])


def run(
    function: str,
    structure: type[ctypes.Structure],
    x: Tensor,
    others: Sequence[Tensor | None],
    norm: LayerNormParameters | None,
    layers: Sequence[LinearParameters],
) -> Tensor:
    """Run a kernel on the tokens of x and of others that lie beside them."""
    y = x.new_empty(*x.shape[:-1], len(layers[-1].weight))
    rows = [None if tensor is None else _rows(tensor) for tensor in (x, *others)]
    parameters = Parameters()
    arguments = structure(
        *map(Rows.of, (*rows, _rows(y))),
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
