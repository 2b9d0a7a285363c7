"""DeiT-III, the quadratic yardstick: timm's ViT.

Papers: DeiT III (arXiv 2204.07118), Vision-LSTM (arXiv 2406.04303). A pre-norm ViT with LayerScale whose class token
has no position. The release fixes the position table to sines and cosines of the row and the column; here it is a
parameter that takes no gradient, so that timm's resizing to other image sizes finds it.
"""

from typing import Literal

import torch
from timm.models import VisionTransformer
from torch import nn

from linvision.models.deit3.layers import (
    CheckedPatchEmbed,
    RecomputingBlock,
    set_selective_checkpointing,
    sine_cosine_table,
)
from linvision.models.patches import pair, patch_grid


class DeiT3(VisionTransformer):
    """timm's VisionTransformer with the fixed position table, for images of any size that the patch divides.

    Arguments are timm's. The width must be a multiple of 4, which the position table divides by.

    Raises:
        ValueError: for images, on construction or at run time, with sides that the patch does not divide.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "avgmax", "max", "token"] = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim}: the sine-cosine position table needs a multiple of 4")
        grid = patch_grid(pair(img_size), pair(patch_size), pair(patch_size))
        super().__init__(
            img_size=pair(img_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            init_values=1e-4,
            no_embed_class=True,
            dynamic_img_size=True,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=CheckedPatchEmbed,
            block_fn=RecomputingBlock,
        )
        self.pos_embed = nn.Parameter(sine_cosine_table(embed_dim, grid).flatten(1, 2), requires_grad=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resize the position table, or the patches, for good; the table stays fixed. timm's method, with checks."""
        patch = pair(patch_size or self.patch_embed.proj.kernel_size)
        size = pair(img_size or self.patch_embed.img_size)
        patch_grid(size, patch, patch)
        super().set_input_size(img_size=size, patch_size=patch)
        self.pos_embed.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True, *, selective: bool = False) -> None:
        """Recompute each block in the backward pass, with ``selective`` only what is cheap; see ``Backbone``."""
        super().set_grad_checkpointing(enable and not selective)
        set_selective_checkpointing(self, enable and selective)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        return {"pos_embed", "cls_token"}
