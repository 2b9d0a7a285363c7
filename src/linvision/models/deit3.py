"""DeiT-III, the quadratic yardstick: timm's ViT, and the DeiT-III-T that was released with ViL by a table of names.

Papers: DeiT III (arXiv 2204.07118), Vision-LSTM (arXiv 2406.04303). A pre-norm ViT with LayerScale whose class token
has no position. The release fixes the position table to sines and cosines of the row and the column; here it is a
parameter that takes no gradient, so that timm's resizing to other image sizes finds it.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from linvision.models._backbone import Published, build, classifier_cfg, pair, patch_grid, resize_grid
from linvision.models._checkpoints import StateDict, rename, unwrap
from linvision.models._recompute import run_recomputed
from linvision.models.vil_variants import DOWNLOADS

# Released key (a regular expression) -> timm's; the others are shared.
RELEASE_KEYS = {
    r"pos_embed\.embed": "pos_embed",
    r"cls_tokens\.tokens": "cls_token",
    r"head\.0\.": "norm.",
    r"head\.1\.": "head.",
}
TIMM_KEYS = {
    r"pos_embed$": "pos_embed.embed",
    r"cls_token$": "cls_tokens.tokens",
    r"norm\.": "head.0.",
    r"head\.": "head.1.",
}


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
    return torch.cat([rows, columns], dim=2)[None].float()


class CheckedPatchEmbed(PatchEmbed):
    """timm's patch embedding, with errors that say what was given and what is needed."""

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, in_chans, H, W)."""
        in_chans = self.proj.weight.shape[1]
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(f"DeiT3 takes images of shape (B, {in_chans}, H, W) but got {tuple(x.shape)}")
        height, width = self.proj.kernel_size
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


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Rename a released file's keys to timm's; drop a classifier without a place; resize the position table."""
    state_dict = unwrap(state_dict, "checkpoint")
    table = state_dict.get("pos_embed.embed")
    if table is not None and isinstance(model, DeiT3):
        grid = model.patch_embed.grid_size
        if table.ndim == 4 and grid is not None:
            table = resize_grid(table.float(), (grid[0], grid[1]))
        state_dict = rename({**state_dict, "pos_embed.embed": table.flatten(1, -2)}, RELEASE_KEYS)
    if not any(key.startswith("head.") for key in model.state_dict()):
        state_dict = {key: x for key, x in state_dict.items() if not key.startswith("head.")}
    return state_dict


def to_release(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Turn timm's keys into the layout of the released files, under "state_dict"."""
    table = state_dict["pos_embed"]
    grid = (-1, _columns(table))
    return {"state_dict": rename({**state_dict, "pos_embed": table.unflatten(1, grid)}, TIMM_KEYS)}


def _columns(table: Tensor) -> int:
    """Count the columns of a flat position table (1, rows * columns, D): the tokens of a row share the row's half."""
    num_positions, dim = table.shape[1:]
    rows = table[0, :, : dim // 2].float()
    columns = int(torch.isclose(rows, rows[:1], atol=1e-2).all(dim=1).long().cumprod(0).sum())
    if columns > 1 and num_positions % columns == 0:
        return columns
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise ValueError(f"pos_embed {tuple(table.shape)}: neither a square grid nor sines and cosines of one")
    return side


def _cfg(file: str) -> dict[str, Any]:
    return classifier_cfg(url=f"{DOWNLOADS}{file}", paper_ids="arXiv:2204.07118", paper_name="DeiT III")


default_cfgs = generate_default_cfgs(
    {
        "deit3_tiny_patch16_224.e800_in1k": _cfg("vit_tiny16_e800_in1k_deit3reimpl.th"),
        "deit3_tiny_patch16_224.e400_in1k": _cfg("vit_tiny16_e400_in1k_deit3reimpl.th"),
    }
)

PUBLISHED = {
    "deit3_tiny_patch16_224.e800_in1k": Published(76.2),
    "deit3_tiny_patch16_224.e400_in1k": Published(75.6),
}

# The names of the published hub.
ALIASES = {
    "deit3-tiny": "deit3_tiny_patch16_224.e800_in1k",
    "deit3-tiny-e400": "deit3_tiny_patch16_224.e400_in1k",
}


@register_model
def deit3_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """DeiT-III-T: 5.7 M parameters."""
    return build(
        DeiT3,
        "deit3_tiny_patch16_224",
        pretrained,
        defaults={},
        overrides=overrides,
        filter_fn=checkpoint_filter_fn,
        out_indices=(3, 5, 7, 11),
    )
