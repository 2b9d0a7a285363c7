"""Projections and mLSTM in C++, chunk by chunk: ``linvision.ops.fused.projected_mlstm`` on a CPU."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from linvision.ops.backends.cpp import mlstm, mlstm_inputs
from linvision.ops.backends.cpp.library import DTYPES, Strided, call, pointer, readable


class _Forward(ctypes.Structure):
    _fields_ = [("inputs", mlstm_inputs.Forward), ("mlstm", mlstm.Forward)]


def unsupported(c: Tensor, gate_bias: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = mlstm_inputs.unsupported(c, gate_bias)
    if reason is not None:
        return reason
    head_dim = c.shape[-1:].numel() // max(1, gate_bias.numel())
    if head_dim % 4 or head_dim > mlstm.MAX_HEAD_DIM:
        return f"heads of {head_dim} channels, neither a multiple of 4 nor at most {mlstm.MAX_HEAD_DIM}"
    return None


def forward(
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    reverse: bool,
) -> Tensor:
    """Compute h (B, S, H, D)."""
    c_, x_ = (readable(tensor) for tensor in (c, x))
    i, f = (c_.new_empty(*c.shape[:2], len(gate_biases[0]), dtype=torch.float32) for _ in range(2))
    h = c_.new_empty(*i.shape, c.shape[-1] // i.shape[-1])
    parameters = [mlstm_inputs.floats(group) for group in (weights, biases, gate_weights, gate_biases)]
    flags = (DTYPES[c_.dtype], torch.get_num_threads())
    none = Strided.of(None)
    inputs = mlstm_inputs.Forward(
        *(Strided.of(tensor) for tensor in (c_, x_)),
        *(none, none, none),
        pointer(i),
        pointer(f),
        *(mlstm_inputs.addresses(group) for group in parameters),
        *c.shape,
        i.shape[-1],
        *flags,
    )
    recurrence = mlstm.Forward(
        *(none, none, none),
        *(Strided.of(tensor) for tensor in (i, f, h)),
        mlstm.StatePointers(),
        mlstm.StatePointers(),
        *h.shape,
        flags[0],
        reverse,
        flags[1],
    )
    call("linvision_projected_mlstm_forward", _Forward(inputs, recurrence))
    return h.to(c.dtype)
