"""Head norm, skip and gate in Triton: ``linvision.ops.gated_norm`` on a GPU, computed in float32."""

from typing import Any

import torch
from torch import Tensor

from linvision.ops.backends.strides import contiguous, leading_strides, with_unit_stride
from linvision.ops.backends.triton.device import launch, power_of_two, tiles_and_pieces, unusable

MAX_HEAD_DIM = 1024
FORWARD_SIZE, BACKWARD_SIZE = 2048, 1024  # numbers of a tile; backward there are more of them to hold


def unsupported(h: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unusable(h)
    if reason is None and max(h.shape[-1:], default=0) > MAX_HEAD_DIM:
        return f"heads of {h.shape[-1]} channels, above {MAX_HEAD_DIM}"
    return reason


def forward(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """Normalise the heads of h (B, S, H, D), add skip * c and gate by z, if it is there: (B, S, E)."""
    from linvision.ops.backends.triton.gated_norm_kernels import forward_kernel

    h, c, gate = with_unit_stride(h), with_unit_stride(c), with_unit_stride(c if z is None else z)
    batch, num_tokens, num_heads, _ = h.shape
    y = torch.empty(c.shape, dtype=h.dtype, device=h.device)
    tile = _tile(h, FORWARD_SIZE)
    launch(
        forward_kernel,
        batch * -(-num_tokens // tile["TOKENS"]) * num_heads,
        *(h, c, gate),
        *contiguous(weight, bias, skip),
        y,
        *(num_tokens, num_heads, eps, *leading_strides(h, c, gate)),
        GATED=z is not None,
        like=h,
        **tile,
    )
    return y


def backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> list[Tensor]:
    """Compute the gradients of all inputs, in order, that of a bias that is None left out."""
    from linvision.ops.backends.triton.gated_norm_kernels import backward_kernel

    dy, h, c, z = (with_unit_stride(x) for x in (dy, h, c, z))
    batch, num_tokens, num_heads, head_dim = h.shape
    tile = _tile(h, BACKWARD_SIZE)
    tiles, pieces = tiles_and_pieces(batch, num_tokens, tile["TOKENS"])
    dh, dc, dz = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (h, c, z))
    parts = h.new_empty(pieces, num_heads, 3, head_dim, dtype=torch.float32)
    launch(
        backward_kernel,
        pieces * num_heads,
        *(dy, h, c, z),
        *contiguous(weight, bias, skip),
        *(dh, dc, dz, parts),
        *(num_tokens, num_heads, eps, *leading_strides(dy, h, c, z)),
        TILES=tiles,
        like=h,
        **tile,
    )
    sums = parts.sum(0).transpose(0, 1).flatten(1)
    of_parameters = zip(sums, (weight, bias, skip), strict=True)
    return [dh, dc, dz, *(of.to(p.dtype, copy=True) for of, p in of_parameters if p is not None)]


def _tile(h: Tensor, size: int) -> dict[str, Any]:
    columns = power_of_two(h.shape[-1])
    tokens = min(power_of_two(max(1, h.shape[1])), max(1, size // columns))
    return {"HEAD_DIM": h.shape[-1], "COLUMNS": columns, "TOKENS": tokens, "num_warps": 4}
