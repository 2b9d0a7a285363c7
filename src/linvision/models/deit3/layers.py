"""What DeiT-III adds to the layers of timm's ViT: fixed positions, checked images, selective recomputation."""

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvision.models.patches import check_image, patch_grid
from linvision.models.recompute import run_recomputed

for _name in ("check_image", "patch_grid"):  # torch.fx cannot look into them
    torch.fx.wrap(_name)


def sine_cosine_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return fixed positions (1, rows, columns, dim): half of the channels for the row, half for the column.

    Each half is [sin(t w), cos(t w)] of the index t with w_j = 10000^(-2j / (dim / 2)), j < dim / 4.
    """
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    halves = []
    for count in grid:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = halves
    rows = rows[:, None].expand(-1, grid[1], -1)
    columns = columns[None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=2)[None].to(torch.get_default_dtype())


class CheckedPatchEmbed(PatchEmbed):
    """timm's patch embedding, with errors that say what was given and what is needed."""

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, in_chans, H, W)."""
        height, width = self.proj.kernel_size
        x = check_image(x, self.proj.in_channels, "DeiT3")
        patch_grid((x.shape[2], x.shape[3]), (height, width), (height, width))
        return super().forward(x)


class RecomputingBlock(Block):
    """timm's block, which can recompute in its backward pass what is cheap."""

    selective_checkpointing = False

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Transform tokens (B, S, D)."""
        if self.selective_checkpointing and self.training and torch.is_grad_enabled():
            return run_recomputed(partial(super().forward, **options), x, *args, selective=True)
        return super().forward(x, *args, **options)


def set_selective_checkpointing(model: nn.Module, enable: bool) -> None:
    """Let the blocks of a model, as far as they can, recompute what is cheap."""
    for block in model.modules():
        if isinstance(block, RecomputingBlock):
            block.selective_checkpointing = enable
