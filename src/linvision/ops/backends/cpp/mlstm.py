"""Chunkwise mLSTM in C++: the body of ``linvision.ops.mlstm`` on a CPU, for float32, bfloat16 and float16.

The mathematics stands in ``linvision.ops._mlstm_chunkwise``, the kernels in ``kernels/mlstm*.cpp``.
"""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Strided, call, missing, pointer, with_unit_stride

DEVICE = "cpu"
MAX_HEAD_DIM = 1024

State = tuple[Tensor, Tensor, Tensor]


class _State(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("C", "n", "m")]


_SIZES = [(name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "head_dim")]
_FLAGS = [(name, ctypes.c_int32) for name in ("dtype", "reverse", "threads")]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "i", "f", "h")),
        *((name, _State) for name in ("initial", "final")),
        *_SIZES,
        *_FLAGS,
    ]


def refuses(*tensors: Tensor | None) -> str | None:
    """Say why these inputs (q, k, v, i, f, ...) cannot be computed, or return None if they can."""
    q = tensors[0]
    assert q is not None
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}, not on a CPU"
    if q.dtype == torch.float64:
        return "float64 is computed in plain PyTorch"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]} channels, above {MAX_HEAD_DIM}"
    return missing()


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, *, return_state: bool, reverse: bool
) -> tuple[Tensor, State]:
    """Compute h (B, S, H, D) and the final state (C^T, n, m); see ``linvision.ops.mlstm`` for shapes and equations.

    Without ``return_state`` the final state is left out: three empty tensors.
    """
    batch, num_tokens, num_heads, head_dim = q.shape
    q_, k_, v_ = (with_unit_stride(_computed(x)) for x in (q, k, v))
    i_, f_ = i.float(), f.float()
    h = q_.new_empty(q.shape)
    initial = None if state is None else _contiguous(state)
    shapes = ((batch, num_heads, head_dim, head_dim), (batch, num_heads, head_dim), (batch, num_heads))
    final = tuple(q.new_empty(shape if return_state else (0,), dtype=torch.float32) for shape in shapes)
    arguments = _Forward(
        *(Strided.of(x) for x in (q_, k_, v_, i_, f_, h)),
        _State() if initial is None else _State(*map(pointer, initial)),
        _State(*map(pointer, final)) if return_state else _State(),
        batch,
        num_tokens,
        num_heads,
        head_dim,
        DTYPES[q_.dtype],
        reverse,
        torch.get_num_threads(),
    )
    call("linvision_mlstm_forward", arguments)
    return h.to(q.dtype), (final[0], final[1], final[2])


def _computed(x: Tensor) -> Tensor:
    """Return x in a type that the kernels read: float16 becomes float32."""
    return x if x.dtype in DTYPES else x.float()


def _contiguous(state: State) -> State:
    C, n, m = (x.float().contiguous() for x in state)
    return C, n, m
