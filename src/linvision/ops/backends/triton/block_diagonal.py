"""Block-diagonal layers in Triton: the body of ``linvision.ops.block_diagonal`` on a GPU, where sums are float32."""

import torch
from torch import Tensor

from linvision.ops.backends.strides import leading_strides, with_unit_stride
from linvision.ops.backends.triton.device import launch, power_of_two, unusable

DEVICE = "cuda"
TOKENS, GROUPS = 32, 16  # of a tile
BACKWARD_TILES = 16  # of a program, at most


def refuses(*tensors: Tensor | None) -> str | None:
    """Say why these inputs (x, ...) cannot be computed, or return None if they can."""
    assert tensors[0] is not None
    return unusable(tensors[0])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (B, S, 4 G) by weight (G, 4, 4) and add bias (4 G,)."""
    from linvision.ops.backends.triton.block_diagonal_kernels import forward_kernel

    x, weight, bias = with_unit_stride(x), weight.contiguous(), None if bias is None else bias.contiguous()
    (batch, num_tokens, _), num_groups = x.shape, len(weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        forward_kernel,
        batch * -(-num_tokens // TOKENS) * -(-num_groups // _groups(num_groups)),
        *(x, weight, weight if bias is None else bias, y),
        *(num_tokens, num_groups, *leading_strides(x)),
        TOKENS=TOKENS,
        GROUPS=_groups(num_groups),
        BIASED=bias is not None,
        like=x,
        num_warps=4,
    )
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, of the weight and, in float32, of a bias."""
    from linvision.ops.backends.triton.block_diagonal_kernels import backward_kernel

    dy, x, weight = with_unit_stride(dy), with_unit_stride(x), weight.contiguous()
    (batch, num_tokens, _), num_groups = x.shape, len(weight)
    tiles = min(BACKWARD_TILES, power_of_two(-(-num_tokens // TOKENS)))
    pieces = batch * -(-num_tokens // (tiles * TOKENS))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = x.new_empty(pieces, 20, num_groups, dtype=torch.float32)
    launch(
        backward_kernel,
        pieces * -(-num_groups // _groups(num_groups)),
        *(dy, x, weight, dx, sums),
        *(num_tokens, num_groups, *leading_strides(dy, x)),
        TOKENS=TOKENS,
        GROUPS=_groups(num_groups),
        TILES=tiles,
        like=x,
        num_warps=4,
    )
    products, of_bias = sums.sum(0).split((16, 4))
    dweight = products.mT.reshape(weight.shape).to(weight.dtype)
    return dx, dweight, of_bias.mT.reshape(-1).clone()


def _groups(num_groups: int) -> int:
    return min(GROUPS, power_of_two(num_groups))
