"""The layers of ViL (Vision-LSTM, arXiv 2406.04303), with the published parameter keys.

Activations stay in token layout (B, S, channels) or, the same memory, (B, rows, columns, channels): permuted, that is
an image in channels-last layout, which the convolutions take without a copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from linvision.models._backbone import resize_grid
from linvision.ops import mlstm

NUM_HEADS = 4
BLOCK_SIZE = 4  # of the block-diagonal q, k and v projections


class ResidualLayerNorm(nn.Module):
    """LayerNorm whose scale is stored as a residual: x_hat * (1 + weight) + bias."""

    def __init__(self, dim: int, *, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., dim)."""
        return F.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)


class MultiHeadNorm(ResidualLayerNorm):
    """ResidualLayerNorm whose statistics are those of each head: a GroupNorm over every token's channels."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise (B, S, H, D) per head and return (B, S, H * D)."""
        h = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(2)
        scale = 1 + self.weight
        return h * scale if self.bias is None else torch.addcmul(self.bias, h, scale)


class BlockDiagonalLinear(nn.Module):
    """Linear map with a block-diagonal matrix: output group g is weight[g] @ input group g, groups of 4 channels."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, rows, columns, dim): a grouped 1x1 convolution, which takes channels-last memory as it is."""
        weight = self.weight.reshape(-1, BLOCK_SIZE, 1, 1)
        return _conv_channels_last(x, weight, self.bias, groups=len(self.weight))


class GridConv(nn.Conv2d):
    """Depthwise 2-d convolution of a token grid; ``reverse`` turns the kernel by 180 degrees."""

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__(dim, dim, kernel_size, padding=(kernel_size - 1) // 2, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, rows, columns, dim)."""
        weight = self.weight.flip(2, 3) if self.reverse else self.weight
        return _conv_channels_last(x, weight, self.bias, padding=self.padding, groups=self.groups)


class CausalConv(nn.Module):
    """Depthwise 1-d convolution of the token sequence that sees the tokens before; with ``reverse`` those after."""

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, rows, columns, dim) along the row-major sequence."""
        sequence = x.flatten(1, 2)
        seen = self.conv.kernel_size[0] - 1
        weight = self.conv.weight.flip(2) if self.reverse else self.conv.weight
        padded = F.pad(sequence, (0, 0, 0, seen) if self.reverse else (0, 0, seen, 0))
        return _conv_channels_last(padded[:, None], weight[:, :, None], self.conv.bias, groups=len(weight)).view(
            x.shape
        )


def _conv_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Convolve (B, rows, columns, channels) without moving memory: permuted it is an image in channels-last layout."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, **options).permute(0, 2, 3, 1)


class MLSTMCell(nn.Module):
    """Gates, mLSTM and its norm, with 4 heads over the inner width E."""

    def __init__(self, dim: int, *, norm_bias: bool, reverse: bool) -> None:
        super().__init__()
        self.igate = nn.Linear(3 * dim, NUM_HEADS)
        self.fgate = nn.Linear(3 * dim, NUM_HEADS)
        self.outnorm = MultiHeadNorm(dim, bias=norm_bias)
        self.reverse = reverse

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix (B, S, E) queries, keys and values over the sequence."""
        # One pre-activation per token, head and gate: a Linear of concat(q, k, v), as three products without the copy.
        weight = torch.cat([self.igate.weight, self.fgate.weight])
        gates = torch.cat([self.igate.bias, self.fgate.bias])
        for x, part in zip((q, k, v), weight.chunk(3, dim=1), strict=True):
            gates = gates + F.linear(x, part)
        i, f = gates.chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (NUM_HEADS, -1)) for x in (q, k, v))
        return self.outnorm(mlstm(q, k, v, i, f, reverse=self.reverse))


class ViLLayer(nn.Module):
    """Gated mLSTM layer of inner width E = 2 dim (arXiv 2406.04303, figure 2)."""

    def __init__(
        self, dim: int, *, conv: nn.Module, conv_name: str, proj_bias: bool, norm_bias: bool, reverse: bool
    ) -> None:
        super().__init__()
        inner = 2 * dim
        self.conv_name = conv_name
        self.proj_up = nn.Linear(dim, 2 * inner, bias=proj_bias)
        self.q_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.k_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.v_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.add_module(conv_name, conv)
        self.mlstm_cell = MLSTMCell(inner, norm_bias=norm_bias, reverse=reverse)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim, bias=proj_bias)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns)."""
        # Two products instead of one and a split: x and z come out contiguous.
        weights = self.proj_up.weight.chunk(2)
        biases = (None, None) if self.proj_up.bias is None else self.proj_up.bias.chunk(2)
        x, z = (F.linear(u, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        x = x.unflatten(1, grid)
        c = F.silu(getattr(self, self.conv_name)(x))
        q, k, v = self.q_proj(c).flatten(1, 2), self.k_proj(c).flatten(1, 2), self.v_proj(x).flatten(1, 2)
        h = torch.addcmul(self.mlstm_cell(q, k, v), self.learnable_skip, c.flatten(1, 2))
        return self.proj_down(h * F.silu(z))


class ViLBlock(nn.Module):
    """Residual layer: x + drop_path(layer(norm(x)))."""

    def __init__(self, dim: int, layer: ViLLayer, *, norm_bias: bool, drop_path: float) -> None:
        super().__init__()
        self.norm = ResidualLayerNorm(dim, bias=norm_bias)
        self.layer = layer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns)."""
        return x + self.drop_path(self.layer(self.norm(x), grid))


class ViLBlockPair(nn.Module):
    """A layer from the top left, then one from the bottom right: one block of the second generation."""

    def __init__(self, from_top_left: ViLBlock, from_bottom_right: ViLBlock) -> None:
        super().__init__()
        self.rowwise_from_top_left = from_top_left
        self.rowwise_from_bot_right = from_bottom_right

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns)."""
        return self.rowwise_from_bot_right(self.rowwise_from_top_left(x, grid), grid)


class PatchEmbed(nn.Module):
    """Convolution of patches into tokens."""

    def __init__(self, in_chans: int, dim: int, patch_size: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)


class PositionTable(nn.Module):
    """Learned position embedding (1, rows, columns, dim), resized to the grid it meets."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, *grid, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add the table to (B, rows, columns, dim)."""
        return x + resize_grid(self.embed, (x.shape[1], x.shape[2]))
