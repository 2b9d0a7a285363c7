"""Block-diagonal projections, channels last: each group of 4 channels is mapped by a matrix of its own.

    y[4g + o] = bias[4g + o] + sum over i of weight[g, o, i] x[4g + i]

They are those of xLSTM (arXiv 2405.04517, figure 11) and Vision-LSTM (arXiv 2406.04303).
"""

import torch.nn.functional as F
from torch import Tensor

from linvision.ops.checks import ANY, OPTIONAL, check, check_axes

BLOCK_SIZE = 4


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each group of 4 channels by its matrix (equation above).

    Computed by a grouped 1x1 convolution, which takes channels-last memory as it is.

    Args:
        x: tokens (B, S, 4 G).
        weight: matrices (G, 4, 4); parameters may be of other floating-point types than x.
        bias: (4 G,) or None.

    Returns:
        (B, S, 4 G) in x's type.

    Raises:
        ValueError: where shapes, types or devices disagree.
    """
    check_axes("block_diagonal", "x", x, ("B", "S", "4 G"))
    width = x.shape[2]
    if width % BLOCK_SIZE:
        raise ValueError(f"block_diagonal: x must be (B, S, 4 G) but has shape {tuple(x.shape)}")
    check(
        "block_diagonal",
        "x",
        x,
        ("weight", weight, "(G, 4, 4)", (width // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), ANY),
        ("bias", bias, "(4 G,)", (width,), ANY | OPTIONAL),
    )
    return project_blocks(x, weight, bias)


def project_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``block_diagonal`` of what has been checked."""
    if x.numel() == 0:  # torch's convolution refuses it; so all gradients are there, and zero
        return x * sum(each[:0].sum() for each in (weight, bias) if each is not None)
    kernels = weight.reshape(-1, BLOCK_SIZE, 1, 1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x[:, None].permute(0, 3, 1, 2), kernels, bias, groups=len(weight)).permute(0, 2, 3, 1)[:, 0]
