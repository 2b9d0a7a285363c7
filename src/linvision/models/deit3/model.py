"""DeiT-III, the quadratic yardstick: timm's ViT.

Papers: DeiT III (arXiv 2204.07118), Vision-LSTM (arXiv 2406.04303). A pre-norm ViT with LayerScale whose class token
has no position. The release fixes the position table to sines and cosines of the row and the column; here it is a
parameter that takes no gradient, so that timm's resizing to other image sizes finds it.
"""

from typing import Any, Literal, cast

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from linvision.models.deit3.layers import (
    CheckedPatchEmbed,
    RecomputingBlock,
    set_selective_checkpointing,
    sine_cosine_table,
)
from linvision.models.patches import pair, patch_grid

torch.fx.wrap("resample_abs_pos_embed")  # torch.fx cannot look into it


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
        table, grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size=size, patch_size=patch)
        new_grid = self.patch_embed.grid_size
        if self.pos_embed is table and new_grid != grid:  # older versions of timm compare numbers of tokens alone
            resized = resample_abs_pos_embed(table, new_size=new_grid, old_size=grid, num_prefix_tokens=0)
            self.pos_embed = nn.Parameter(resized)
        self.pos_embed.requires_grad_(False)

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, return_prefix_tokens: bool = False, norm: bool = False,
        stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Return timm's feature maps, of a batch without images as well."""
        arguments = {"indices": indices, "norm": norm, "stop_early": stop_early, **options}
        if output_fmt != "NCHW" or return_prefix_tokens or options:
            arguments |= {"return_prefix_tokens": return_prefix_tokens, "output_fmt": output_fmt}
            return super().forward_intermediates(x, intermediates_only=intermediates_only, **arguments)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        final, tokens = cast(Any, super().forward_intermediates(x, output_fmt="NLC", **arguments))
        maps = [each.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous() for each in tokens]
        return maps if intermediates_only else (final, maps)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions to patches (B, rows, columns, D), and the class token before them: what timm asks for here."""
        grid = [x.shape[1], x.shape[2]]
        positions = resample_abs_pos_embed(
            self.pos_embed, new_size=grid, old_size=self.patch_embed.grid_size, num_prefix_tokens=0
        )
        x = x.flatten(1, 2) + positions
        return self.pos_drop(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1))

    def set_grad_checkpointing(self, enable: bool = True, *, selective: bool = False) -> None:
        """Recompute each block in the backward pass, with ``selective`` only what is cheap; see ``Backbone``."""
        super().set_grad_checkpointing(enable and not selective)
        set_selective_checkpointing(self, enable and selective)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        return {"pos_embed", "cls_token"}
