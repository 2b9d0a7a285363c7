"""The layers of ViL (Vision-LSTM, arXiv 2406.04303), with the published parameter keys.

Activations stay in token layout (B, S, channels) or, the same memory, (B, rows, columns, channels).
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from linvision.models.patches import resize_grid
from linvision.ops import BLOCK_SIZE, block_diagonal, causal_conv1d, depthwise_conv2d, mlstm

NUM_HEADS = 4

for _name in ("block_diagonal", "causal_conv1d", "depthwise_conv2d", "mlstm", "resize_grid"):
    torch.fx.wrap(_name)  # torch.fx cannot look into them


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


class HeadNorm(ResidualLayerNorm):
    """ResidualLayerNorm with the statistics of each head: (B, S, H, D) to (B, S, H * D)."""

    def forward(self, h: Tensor) -> Tensor:
        """Normalise the heads of (B, S, H, D)."""
        y = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(2) * (1 + self.weight)
        return y if self.bias is None else y + self.bias


class BlockDiagonalLinear(nn.Module):
    """Linear map with a block-diagonal matrix: output group g of 4 channels is weight[g] @ input group g."""

    def __init__(self, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, dim)."""
        return block_diagonal(x, self.weight, self.bias)


class GridConv(nn.Conv2d):
    """Depthwise 2-d convolution of a token grid, and SiLU; ``reverse`` turns the kernel by 180 degrees."""

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__(dim, dim, kernel_size, padding=(kernel_size - 1) // 2, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve (B, rows * columns, dim)."""
        x = x.unflatten(1, grid)
        return depthwise_conv2d(x, self.weight, self.bias, activation="silu", reverse=self.reverse).flatten(1, 2)


class CausalConv1d(nn.Conv1d):
    """Depthwise 1-d convolution that sees the tokens before, with ``reverse`` those after, and SiLU."""

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__(dim, dim, kernel_size, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, S, dim)."""
        return causal_conv1d(x, self.weight, self.bias, activation="silu", reverse=self.reverse)


class CausalConv(nn.Module):
    """The same along the row-major sequence of a token grid, under the key that the published models have."""

    conv: CausalConv1d

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__()
        self.conv = CausalConv1d(dim, kernel_size, reverse=reverse)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve (B, rows * columns, dim)."""
        return self.conv(x)


class MLSTMCell(nn.Module):
    """mLSTM of 4 heads over the inner width E, with its gates, which read q, k and v, and the norm of its heads."""

    igate: nn.Linear
    fgate: nn.Linear
    outnorm: HeadNorm

    def __init__(self, dim: int, *, norm_bias: bool, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.igate = nn.Linear(3 * dim, NUM_HEADS)
        self.fgate = nn.Linear(3 * dim, NUM_HEADS)
        self.outnorm = HeadNorm(dim, bias=norm_bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix the tokens of q, k, v (B, S, E)."""
        qkv = torch.cat([q, k, v], dim=-1)
        q, k, v = (x.unflatten(-1, (NUM_HEADS, -1)) for x in (q, k, v))
        return self.outnorm(mlstm(q, k, v, self.igate(qkv), self.fgate(qkv), reverse=self.reverse))


class ViLLayer(nn.Module):
    """Gated mLSTM layer of inner width E = 2 dim (arXiv 2406.04303, figure 2).

    Args:
        dim: token width.
        conv: the depthwise convolution over E channels, with its SiLU.
        proj_bias: biases in the projections.
        norm_bias: bias in the norm of the heads.
        reverse: scan from the last token to the first.
    """

    proj_up: nn.Linear
    q_proj: BlockDiagonalLinear
    k_proj: BlockDiagonalLinear
    v_proj: BlockDiagonalLinear
    conv: GridConv | CausalConv
    mlstm_cell: MLSTMCell
    proj_down: nn.Linear

    def __init__(self, dim: int, *, conv: nn.Module, proj_bias: bool, norm_bias: bool, reverse: bool) -> None:
        super().__init__()
        inner = 2 * dim
        self.proj_up = nn.Linear(dim, 2 * inner, bias=proj_bias)
        self.q_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.k_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.v_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.add_convolution(conv)
        self.mlstm_cell = MLSTMCell(inner, norm_bias=norm_bias, reverse=reverse)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim, bias=proj_bias)

    def add_convolution(self, conv: nn.Module) -> None:
        """Register the convolution under its published key."""
        self.add_module("conv", conv)

    def forward(self, u: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns)."""
        x, z = self.proj_up(u).chunk(2, dim=-1)
        c = self.conv(x, grid)
        h = self.mlstm_cell(self.q_proj(c), self.k_proj(c), self.v_proj(x))
        return self.proj_down((h + self.learnable_skip * c) * F.silu(z))


class ViLLayer1(ViLLayer):
    """The layer of the first generation, whose convolution has another key."""

    conv1d: CausalConv

    def add_convolution(self, conv: nn.Module) -> None:
        """Register the convolution under its published key."""
        self.add_module("conv1d", conv)

    @property
    def conv(self) -> CausalConv:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The convolution."""
        return self.conv1d


class ViLBlock(nn.Module):
    """Residual layer: x + drop_path(layer(norm(x)))."""

    norm: ResidualLayerNorm
    layer: ViLLayer | ViLLayer1
    drop_path: DropPath

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


class PositionTable(nn.Module):
    """Learned position embedding (1, rows, columns, dim), resized to the grid it meets."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(1, *grid, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Add the table to (B, rows, columns, dim)."""
        return x + resize_grid(self.embed, (x.shape[1], x.shape[2]))
