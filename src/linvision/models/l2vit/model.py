"""L2ViT: a four-stage backbone in which window attention and global linear attention take turns.

Paper: "The Linear Attention Resurrection in Vision Transformer". A stem and three downsampling layers lead to maps at
strides 4, 8, 16 and 32; in each stage blocks of even index attend within windows (``LocalBlock``) and blocks of odd
index over the whole image at linear cost (``GlobalBlock``). Parameter keys are the published ones; the layers stand in
``layers``, the published models in ``variants``.

Where this deviates from the published code: window attention is torch's fused one; the window size can change at run
time; no constructor argument is without effect; activations need no layout copies, and gradients are right at batch
size 1, where torch's BatchNorm2d misreads the gradient that the published stem hands it; checkpointing counts batch
statistics once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from linvision.models.backbone import Backbone, drop_path_rates
from linvision.models.l2vit import fused  # noqa: F401 - registers the forms of the blocks
from linvision.models.l2vit.layers import (
    Downsample,
    GlobalBlock,
    LinearAttention,
    LocalBlock,
    Stem,
    WindowAttention,
    as_image,
)
from linvision.models.patches import pair


class L2ViT(Backbone):
    """L2ViT: images (B, in_chans, H, W) of any size to logits (B, num_classes).

    Args:
        depths: blocks of each stage.
        dims: channels of each stage.
        num_heads: attention heads of each stage.
        window_size: tokens along a side of an attention window; can be changed later (``window_size``).
        in_chans: channels of the images.
        num_classes: classes; 0 for pooled features without a classifier.
        global_pool: "avg", the mean over tokens, or "" for all tokens, (B, H/32, W/32, C).
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping a residual branch in training, for the last block; the others' rise
            linearly to it from 0.
        feature_norms: build the layer norms ``norm0``, ``norm1``, ... of dense tasks, one for the map of each stage.

    Raises:
        ValueError: for stages of unequal number, widths that the heads do not divide, a window below 1, an unknown
            pooling.
    """

    output_fmt = "NHWC"  # what forward_features returns, in timm's words
    classifier_parts = ("norm",)

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        _check_stages(depths, dims, num_heads)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dims[-1]
        self.global_pool, self.feature_norms = _check_pooling(global_pool), feature_norms
        self.downsample_layers = nn.ModuleList([Stem(in_chans, dims[0])])
        self.downsample_layers.extend(Downsample(*widths) for widths in pairwise(dims))
        self.stages = nn.ModuleList()
        rates = iter(drop_path_rates(drop_path_rate, sum(depths), decay=True))
        for depth, dim, heads in zip(depths, dims, num_heads, strict=True):
            blocks = [
                GlobalBlock(dim, heads, next(rates)) if j % 2 else LocalBlock(dim, heads, window_size, next(rates))
                for j in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.window_size = window_size
        self.norm = nn.LayerNorm(dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes > 0 else nn.Identity()
        if feature_norms:
            for s, dim in enumerate(dims):
                self.add_module(f"norm{s}", nn.LayerNorm(dim))
        self.feature_info = [
            {"module": f"stages.{s}", "num_chs": dim, "reduction": 4 * 2**s} for s, dim in enumerate(dims)
        ]
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise every parameter that its constructor does not leave right.

        =======================  =========================================
        linear, convolutions     truncated normal, std 0.02; biases 0
        temperature              head width ^ -1/2
        norms                    scale 1; shift 0
        =======================  =========================================
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _init_projection(module)
            elif isinstance(module, LinearAttention):
                module.temperature.fill_((module.proj.in_features // module.num_heads) ** -0.5)

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features

    @property
    def window_size(self) -> int:
        """Tokens along a side of the windows of local attention; any size serves the same weights."""
        return self._window_size

    @window_size.setter
    def window_size(self, window_size: int) -> None:
        if window_size < 1:
            raise ValueError(f"window_size={window_size}: a window has at least 1 token along a side")
        self._window_size = window_size
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.window_size = window_size

    def embed(self, image: Tensor) -> Tensor:
        """Turn images into a map (B, H/4, W/4, C)."""
        return self.downsample_layers[0](image)

    def advance(self, carry: Tensor, index: int) -> Tensor:
        """Run stage ``index``, its downsampling first."""
        x = self.downsample_layers[index](carry) if index else carry
        return self._run_row(self.stages[index], x)

    def finish(self, carry: Tensor) -> Tensor:
        """Normalise the last map (B, H/32, W/32, C)."""
        return self.norm(carry)

    def feature_map(self, carry: Tensor, index: int, norm: bool) -> Tensor:
        """Lay a stage's map out as (B, C, H', W').

        ``norm`` applies the stage's own norm of dense tasks (``feature_norms=True``). Without those the last stage
        alone has a norm, the classifier's.
        """
        if norm and self.feature_norms:
            carry = self.get_submodule(f"norm{index}")(carry)
        elif norm and index == len(self.stages) - 1:
            carry = self.norm(carry)
        return as_image(carry)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average the tokens of (B, H/32, W/32, C) and classify them."""
        x = x.mean((1, 2)) if self.global_pool else x
        return x if pre_logits else self.head(self.head_drop(x))

    def truncate(self, num_blocks: int) -> None:
        """Keep the first ``num_blocks`` stages. The final norm belongs to the last one and goes with it."""
        if num_blocks < len(self.stages):
            self.norm = nn.Identity()
        self.downsample_layers, self.stages = self.downsample_layers[:num_blocks], self.stages[:num_blocks]
        self.num_features = self.feature_info[num_blocks - 1]["num_chs"]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices)`` does not need; returns the stage numbers it takes."""
        stages = len(self.stages)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if self.feature_norms:
            self.feature_norms = not prune_norm
            for s in range(stages):
                if prune_norm or s not in take:
                    delattr(self, f"norm{s}")
            if prune_head:
                self.norm = nn.Identity()
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes removes it."""
        if global_pool is not None:
            self.global_pool = _check_pooling(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            _init_projection(self.head)
            self.head.to(next(self.stages.parameters()))

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, *, window_size: int | None = None) -> None:
        """Change the window size. Images need no preparation: a size that is given is only checked."""
        if img_size is not None and min(pair(img_size)) < 1:
            raise ValueError(f"img_size={img_size}: sides of at least one pixel are needed")
        if window_size is not None:
            self.window_size = window_size

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        return {name for name, _ in self.named_parameters() if name.endswith(".temperature")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates, by block; a downsampling goes with the block after it."""
        stem = r"^downsample_layers\.0\."
        if coarse:
            return {"stem": stem, "blocks": r"^(?:downsample_layers|stages)\.(\d+)"}
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": stem, "blocks": blocks}

    def _recomputing(self, layer: nn.Module) -> AbstractContextManager[None]:
        return _statistics_kept(layer)  # a compiled graph counts the statistics once by itself


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norms leave their running statistics alone: the recomputed pass has been counted already."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # The statistics are still passed on: without them other tensors would be saved than in the first pass.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _init_projection(module: nn.Linear | nn.Conv2d) -> None:
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_stages(depths: Sequence[int], dims: Sequence[int], num_heads: Sequence[int]) -> None:
    if not len(depths) == len(dims) == len(num_heads) > 0:
        raise ValueError(
            f"depths {tuple(depths)}, dims {tuple(dims)} and num_heads {tuple(num_heads)}: one number a stage is needed"
        )
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} heads do not divide {dim} channels: change dims or num_heads")
    if dims[0] % 2 or min(depths) < 1:
        raise ValueError(f"dims {tuple(dims)} must start with an even number and depths {tuple(depths)} be positive")


def _check_pooling(global_pool: str | None) -> str:
    if global_pool not in ("avg", "", None):
        raise ValueError(f"global_pool={global_pool!r}: L2ViT knows 'avg' and ''")
    return global_pool or ""
