"""Chunkwise mLSTM in C++ (``linvision.ops.mlstm``), for float32, bfloat16 and float16.

The mathematics stands in ``linvision.ops.backends.plain.mlstm``, the kernels in ``kernels/mlstm*.cpp``.
"""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Strided, call, pointer, readable, unreadable

MAX_HEAD_DIM = 1024

State = tuple[Tensor, Tensor, Tensor]


class StatePointers(ctypes.Structure):
    """A state, or none."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("C", "n", "m")]


_SIZES = [(name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")]
_FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "reverse", "threads")]


class Forward(ctypes.Structure):
    """Arguments of the forward pass."""

    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "i", "f", "h")),
        *((name, StatePointers) for name in ("initial", "final")),
        *_SIZES,
        *_FLAGS,
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "i", "f", "h", "dh", "dq", "dk", "dv", "di", "df")),
        *((name, StatePointers) for name in ("initial", "d_final", "d_initial")),
        *_SIZES,
        *_FLAGS,
    ]


def unsupported(q: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unreadable(q)
    if reason is None and q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]} channels, above {MAX_HEAD_DIM}"
    return reason


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, *, return_state: bool, reverse: bool
) -> tuple[Tensor, State]:
    """Compute h (B, S, H, D) and the final state (C^T, n, m); see ``linvision.ops.mlstm`` for shapes and equations.

    Without ``return_state`` the final state is left out: three empty tensors.
    """
    q_, k_, v_ = (readable(x) for x in (q, k, v))
    i_, f_ = i.float(), f.float()
    h = q_.new_empty(q.shape)
    initial = None if state is None else _contiguous(*state)
    final = tuple(q.new_empty(shape if return_state else (0,), dtype=torch.float32) for shape in _state_shapes(q))
    arguments = Forward(
        *(Strided.of(x) for x in (q_, k_, v_, i_, f_, h)),
        StatePointers() if initial is None else StatePointers(*map(pointer, initial)),
        StatePointers(*map(pointer, final)) if return_state else StatePointers(),
        *q.shape,
        DTYPES[q_.dtype],
        reverse,
        torch.get_num_threads(),
    )
    call("linvision_mlstm_forward", arguments)
    return h.to(q.dtype), (final[0], final[1], final[2])


def backward(
    dh: Tensor,
    d_final: tuple[Tensor, Tensor] | None,
    h: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    state: State | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, v, i, f) and of the initial (C^T, n) from those of h and of the final (C^T, n)."""
    q, k, v, i, f = inputs
    q_, k_, v_, h_, dh_ = (readable(x) for x in (q, k, v, h, dh))
    i_, f_ = i.float(), f.float()
    dq, dk, dv = (q_.new_empty(q.shape) for _ in range(3))
    di, df = (q.new_empty(i.shape, dtype=torch.float32) for _ in range(2))
    initial = None if state is None else _contiguous(*state)
    final = None if d_final is None else _contiguous(*d_final)
    shapes = _state_shapes(q)[:2]
    d_initial = tuple(q.new_empty((0,) if state is None else shape, dtype=torch.float32) for shape in shapes)
    arguments = _Backward(
        *(Strided.of(x) for x in (q_, k_, v_, i_, f_, h_, dh_, dq, dk, dv, di, df)),
        StatePointers() if initial is None else StatePointers(*map(pointer, initial)),
        StatePointers() if final is None else StatePointers(*map(pointer, final)),
        StatePointers() if state is None else StatePointers(*map(pointer, d_initial)),
        *q.shape,
        DTYPES[q_.dtype],
        reverse,
        torch.get_num_threads(),
    )
    call("linvision_mlstm_backward", arguments)
    dq, dk, dv = (x.to(q.dtype) for x in (dq, dk, dv))
    return dq, dk, dv, di.to(i.dtype), df.to(f.dtype), d_initial[0], d_initial[1]


def _state_shapes(q: Tensor) -> tuple[tuple[int, ...], ...]:
    batch, _, num_heads, head_dim = q.shape
    return (batch, num_heads, head_dim, head_dim), (batch, num_heads, head_dim), (batch, num_heads)


def _contiguous(*state: Tensor) -> list[Tensor]:
    return [x.float().contiguous() for x in state]
