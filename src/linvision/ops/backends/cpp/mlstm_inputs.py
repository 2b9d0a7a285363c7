"""What ViL's mLSTM is fed, in C++ (``kernels/mlstm_inputs.cpp``): ``linvision.ops.mlstm_inputs`` on a CPU."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Strided, call, pointer, readable, unreadable

MAX_HEADS = 32

_Three = ctypes.c_void_p * 3
_Two = ctypes.c_void_p * 2
_SIZES = [(name, ctypes.c_int64) for name in ("batch", "tokens", "width", "heads")]
_FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "threads")]


class Forward(ctypes.Structure):
    """Arguments of the projections and gates."""

    _fields_ = [
        *((name, Strided) for name in ("c", "x", "q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("i", "f")),
        *((name, _Three) for name in ("weights", "biases")),
        *((name, _Two) for name in ("gate_weights", "gate_biases")),
        *_SIZES,
        *_FLAGS,
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("c", "x", "dq", "dk", "dv", "dc", "dx")),
        *((name, ctypes.c_void_p) for name in ("di", "df")),
        *((name, _Three) for name in ("weights", "biases")),
        ("gate_weights", _Two),
        *((name, _Three) for name in ("dweights", "dbiases")),
        *((name, _Two) for name in ("dgate_weights", "dgate_biases")),
        *_SIZES,
        *_FLAGS,
    ]


def unsupported(c: Tensor, gate_bias: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unreadable(c)
    if reason is None and gate_bias.numel() > MAX_HEADS:
        return f"{gate_bias.numel()} heads, above {MAX_HEADS}"
    return reason


def forward(
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute q, k, v (B, S, E) and i, f (B, S, H) in float32."""
    c_, x_ = (readable(tensor) for tensor in (c, x))
    q, k, v = (c_.new_empty(c_.shape) for _ in range(3))
    i, f = (c_.new_empty(*c.shape[:2], len(gate_biases[0]), dtype=torch.float32) for _ in range(2))
    parameters = [floats(group) for group in (weights, biases, gate_weights, gate_biases)]
    arguments = Forward(
        *(Strided.of(tensor) for tensor in (c_, x_, q, k, v)),
        pointer(i),
        pointer(f),
        *(addresses(group) for group in parameters),
        *c.shape,
        i.shape[-1],
        DTYPES[c_.dtype],
        torch.get_num_threads(),
    )
    call("linvision_mlstm_inputs_forward", arguments)
    return q.to(c.dtype), k.to(c.dtype), v.to(c.dtype), i, f


def backward(
    gradients: Sequence[Tensor],
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
) -> list[Tensor]:
    """Compute from those of q, k, v, i, f the gradients of all inputs, in order, the biases that are None left out."""
    c_, x_ = (readable(tensor) for tensor in (c, x))
    dq, dk, dv = (readable(d.to(c_.dtype)) for d in gradients[:3])
    di, df = (d.float().contiguous() for d in gradients[3:])
    dc, dx = c_.new_empty(c_.shape), c_.new_empty(c_.shape)
    parameters = [floats(group) for group in (weights, biases, gate_weights)]
    results = [
        [None if p is None else p.new_empty(p.shape, dtype=torch.float32) for p in group]
        for group in (weights, biases, gate_weights, gate_biases)
    ]
    arguments = _Backward(
        *(Strided.of(tensor) for tensor in (c_, x_, dq, dk, dv, dc, dx)),
        pointer(di),
        pointer(df),
        *(addresses(group) for group in (*parameters, *results)),
        *c.shape,
        len(gate_biases[0]),
        DTYPES[c_.dtype],
        torch.get_num_threads(),
    )
    call("linvision_mlstm_inputs_backward", arguments)
    inputs = [c, x, *weights, *biases, *gate_weights, *gate_biases]
    computed = [dc, dx, *(d for group in results for d in group)]
    return [d.to(p.dtype) for d, p in zip(computed, inputs, strict=True) if d is not None and p is not None]


def floats(group: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return parameters as the kernels read them: contiguous, float32."""
    return [None if x is None else x.float().contiguous() for x in group]


def addresses(group: Sequence[Tensor | None]) -> ctypes.Array:
    """Return the addresses of two or three tensors, which must outlive the call."""
    return (_Three if len(group) == 3 else _Two)(*map(pointer, group))
