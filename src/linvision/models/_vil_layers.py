"""The layers of ViL (Vision-LSTM, arXiv 2406.04303), with the published parameter keys.

Activations stay in token layout (B, S, channels) or, the same memory, (B, rows, columns, channels).
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from linvision.models._backbone import resize_grid
from linvision.models._fusion import fusible, gates_in_products, halves_of, linear_of, unchanged
from linvision.ops.autocast import cast_once
from linvision.ops.block_diagonal import BLOCK_SIZE, block_diagonal
from linvision.ops.convolution import causal_conv1d, depthwise_conv2d
from linvision.ops.fused.linear import linear, normalise
from linvision.ops.fused.projected_mlstm import projected_mlstm
from linvision.ops.gated_norm import gated_head_norm
from linvision.ops.mlstm import mlstm
from linvision.ops.parameters import BlockDiagonalParameters, GateParameters, LayerNormParameters

NUM_HEADS = 4


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

    def as_layer_norm(self) -> LayerNormParameters:
        """Return the parameters of the layer norm that this is."""
        return LayerNormParameters(1 + self.weight, self.bias, self.eps)


class BlockDiagonalLinear(nn.Module):
    """Parameters of a linear map with a block-diagonal matrix: output group g is weight[g] @ input group g."""

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


class CausalConv(nn.Module):
    """Depthwise 1-d convolution that sees the tokens before, with ``reverse`` those after, and SiLU."""

    def __init__(self, dim: int, kernel_size: int, *, reverse: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve (B, rows * columns, dim) along the row-major sequence."""
        return causal_conv1d(x, self.conv.weight, self.conv.bias, activation="silu", reverse=self.reverse)


class MLSTMCell(nn.Module):
    """Parameters around the mLSTM, with 4 heads over the inner width E: its gates and the norm of its heads."""

    def __init__(self, dim: int, *, norm_bias: bool) -> None:
        super().__init__()
        self.igate = nn.Linear(3 * dim, NUM_HEADS)
        self.fgate = nn.Linear(3 * dim, NUM_HEADS)
        self.outnorm = ResidualLayerNorm(dim, bias=norm_bias)  # its statistics are those of each head


class ViLLayer(nn.Module):
    """Gated mLSTM layer of inner width E = 2 dim (arXiv 2406.04303, figure 2)."""

    def __init__(
        self, dim: int, *, conv: nn.Module, conv_name: str, proj_bias: bool, norm_bias: bool, reverse: bool
    ) -> None:
        super().__init__()
        inner = 2 * dim
        self.conv_name, self.reverse = conv_name, reverse
        self.proj_up = nn.Linear(dim, 2 * inner, bias=proj_bias)
        self.q_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.k_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.v_proj = BlockDiagonalLinear(inner, bias=proj_bias)
        self.add_module(conv_name, conv)
        self.mlstm_cell = MLSTMCell(inner, norm_bias=norm_bias)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, dim, bias=proj_bias)

    def forward(
        self,
        u: Tensor,
        grid: tuple[int, int],
        *,
        norm: LayerNormParameters | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns); norm before, residual sum after."""
        if not unchanged(self.proj_up, self.proj_down):
            u = normalise(u, norm)
            x, z = self.proj_up(u).chunk(2, dim=-1)
            y = self.proj_down(self._gate(*self._mix(x, grid), z))
            return y if residual is None else residual + y
        # Two products instead of one and a split: x and z come out contiguous, and z not before it is needed.
        x_up, z_up = halves_of(self.proj_up)
        u = cast_once(u) if norm is None else u
        heads = self._mix(linear(u, x_up, norm=norm), grid)
        if gates_in_products(u):
            y = self._gate(*heads, None)
            del heads  # the gate is not to be alive beside them
            z = linear(u, z_up, norm=norm)
        else:
            y, z = self._gate(*heads, linear(u, z_up, norm=norm)), None
        return linear(y, linear_of(self.proj_down), gate=z, residual=residual)

    def _gate(self, h: Tensor, c: Tensor, z: Tensor | None) -> Tensor:
        norm = self.mlstm_cell.outnorm
        return gated_head_norm(h, c, z, weight=norm.weight, bias=norm.bias, skip=self.learnable_skip, eps=norm.eps)

    def _mix(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the mLSTM's heads (B, S, H, D) and the convolved tokens (B, S, E)."""
        c, cell = getattr(self, self.conv_name)(x, grid), self.mlstm_cell
        if not unchanged(cell.igate, cell.fgate):
            q, k, v = self.q_proj(c), self.k_proj(c), self.v_proj(x)
            together = torch.cat([q, k, v], dim=-1)
            q, k, v = (tokens.unflatten(-1, (NUM_HEADS, -1)) for tokens in (q, k, v))
            h = mlstm(q, k, v, cell.igate(together), cell.fgate(together), reverse=self.reverse)
            return cast(Tensor, h), c
        projections = (BlockDiagonalParameters(p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))
        i, f = (GateParameters(gate.weight, gate.bias) for gate in (cell.igate, cell.fgate))
        return projected_mlstm(c, x, *projections, i=i, f=f, reverse=self.reverse), c


class ViLBlock(nn.Module):
    """Residual layer: x + drop_path(layer(norm(x)))."""

    def __init__(self, dim: int, layer: ViLLayer, *, norm_bias: bool, drop_path: float) -> None:
        super().__init__()
        self.norm = ResidualLayerNorm(dim, bias=norm_bias)
        self.layer = layer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns)."""
        if fusible(self.norm, self.layer, self.drop_path, own=(ResidualLayerNorm, ViLLayer, DropPath)):
            return self.layer(x, grid, norm=self.norm.as_layer_norm(), residual=x)
        return x + self.drop_path(self.layer(self.norm(x), grid))


class ViLBlockPair(nn.Module):
    """A layer from the top left, then one from the bottom right: one block of the second generation."""

    def __init__(self, from_top_left: ViLBlock, from_bottom_right: ViLBlock) -> None:
        super().__init__()
        self.rowwise_from_top_left = from_top_left
        self.rowwise_from_bot_right = from_bottom_right

    def forward(self, x: Tensor, grid: tuple[int, int], run: Callable[..., Tensor] = nn.Module.__call__) -> Tensor:
        """Map tokens (B, rows * columns, dim) of a grid (rows, columns); ``run`` calls a layer with its arguments."""
        return run(self.rowwise_from_bot_right, run(self.rowwise_from_top_left, x, grid), grid)


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
