"""What ViL's mLSTM is fed, in Triton: ``linvision.ops.mlstm_inputs`` on a GPU, where sums are float32.

Channels are multiplied ``CHANNELS`` at a time, by zeros off the 4 x 4 blocks: what is not finite spreads among these.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linvision.ops.backends.strides import contiguous, leading_strides, with_unit_stride
from linvision.ops.backends.triton.device import (
    launch,
    operand_type,
    power_of_two,
    product_precision,
    tiles_and_pieces,
    unusable,
)

MAX_HEADS = 8  # columns of both gates, in a product of 16 columns
FORWARD_TOKENS, BACKWARD_TOKENS = 64, 32  # of a tile; backward there are more numbers to hold
CHANNELS = 32  # of a tile; more are more zeros to multiply by

Parameters = Sequence[Tensor]
Optionals = Sequence[Tensor | None]


def unsupported(c: Tensor, gate_bias: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unusable(c)
    if reason is None and gate_bias.numel() > MAX_HEADS:
        return f"{gate_bias.numel()} heads, above {MAX_HEADS}"
    return reason


def forward(
    c: Tensor, x: Tensor, weights: Parameters, biases: Optionals, gate_weights: Parameters, gate_biases: Parameters
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute q, k, v (B, S, E) in c's type and i, f (B, S, H) in float32."""
    from linvision.ops.backends.triton.mlstm_inputs_kernels import forward_kernel

    c, x = with_unit_stride(c), with_unit_stride(x)
    (batch, num_tokens, width), num_heads = c.shape, len(gate_biases[0])
    q, k, v = (torch.empty(c.shape, dtype=c.dtype, device=c.device) for _ in range(3))
    i, f = (c.new_empty(batch, num_tokens, num_heads, dtype=torch.float32) for _ in range(2))
    launch(
        forward_kernel,
        batch * -(-num_tokens // FORWARD_TOKENS),
        *(c, x, q, k, v, i, f),
        *contiguous(*weights, *biases, *gate_weights, *gate_biases),
        *(num_tokens, *leading_strides(c, x)),
        TOKENS=FORWARD_TOKENS,
        like=c,
        **_options(c, width, num_heads),
    )
    return q, k, v, i, f


def backward(
    gradients: Sequence[Tensor],
    c: Tensor,
    x: Tensor,
    weights: Parameters,
    biases: Optionals,
    gate_weights: Parameters,
    gate_biases: Parameters,
) -> list[Tensor]:
    """Compute from those of q, k, v, i, f the gradients of all inputs, in order, the biases that are None left out."""
    from linvision.ops.backends.triton.mlstm_inputs_kernels import backward_kernel

    c, x, dq, dk, dv = (with_unit_stride(tokens) for tokens in (c, x, *gradients[:3]))
    di, df = (d.contiguous() for d in gradients[3:])
    (batch, num_tokens, width), num_heads = c.shape, len(gate_biases[0])
    tiles, pieces = tiles_and_pieces(batch, num_tokens, BACKWARD_TOKENS)
    dc, dx = (torch.empty(c.shape, dtype=c.dtype, device=c.device) for _ in range(2))
    parts = c.new_empty(pieces, 3, 5 + 2 * num_heads, width, dtype=torch.float32)
    launch(
        backward_kernel,
        pieces * -(-width // CHANNELS),
        *(dq, dk, dv, di, df, c, x, dc, dx, parts),
        *contiguous(*weights, *biases, *gate_weights),
        *(num_tokens, *leading_strides(dq, dk, dv, c, x)),
        TOKENS=BACKWARD_TOKENS,
        TILES=tiles,
        OPERAND=operand_type(c.dtype),
        like=c,
        **_options(c, width, num_heads),
    )
    of_weights, of_biases, of_gates = parts.sum(0).split((4, 1, 2 * num_heads), 1)
    computed = (
        *(of.mT.reshape(-1, 4, 4) for of in of_weights),
        *(of[0] for of in of_biases),
        *of_gates.transpose(0, 1).reshape(2, num_heads, 3 * width),
        *(d.sum((0, 1)) for d in (di, df)),
    )
    parameters = (*weights, *biases, *gate_weights, *gate_biases)
    pairs = [(d, p) for d, p in zip(computed, parameters, strict=True) if p is not None]
    # Copies, as no result of an operator may share memory with another.
    return [dc, dx, *(d.to(p.dtype, copy=True, memory_format=torch.contiguous_format) for d, p in pairs)]


def _options(c: Tensor, width: int, num_heads: int) -> dict[str, Any]:
    return {
        "WIDTH": width,
        "NUM_HEADS": num_heads,
        "CHANNELS": CHANNELS,
        "COLUMNS": power_of_two(2 * num_heads, least=16),
        "PRECISION": product_precision(c.dtype),
        "num_warps": 4,
        "num_stages": 2,
    }
