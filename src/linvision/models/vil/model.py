"""ViL (Vision-LSTM): a plain backbone of alternating one-directional mLSTM layers over the row-major patch tokens.

Paper: arXiv 2406.04303. Two generations: ``VisionLSTM2`` (recommended; a block is a pair of layers, convolutions are
2-d) and ``VisionLSTM`` (single layers, causal convolutions; kept for its checkpoints). Parameter keys are the published
ones; the layers stand in ``layers``, the published models in ``variants``.

Where this deviates from the published code: the mLSTM is chunkwise, so that time and memory are linear in the number
of patches; a layer that runs from the bottom right scans in reverse and turns its convolution kernel by 180 degrees
instead of flipping activations; images of any size that the patch divides; overlapping patches in both generations.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from linvision.models.backbone import Backbone, drop_path_rates
from linvision.models.patches import PatchEmbed, pair, patch_grid, resize_grid
from linvision.models.vil import fused  # noqa: F401 - registers the forms of the layers
from linvision.models.vil.layers import (
    BlockDiagonalLinear,
    CausalConv,
    GridConv,
    PositionTable,
    ResidualLayerNorm,
    ViLBlock,
    ViLBlockPair,
    ViLLayer,
    ViLLayer1,
)

Tokens = tuple[Tensor, tuple[int, int]]  # (B, S, D) and their grid (rows, columns)


class _ViL(Backbone):
    """What both generations share: patches, position table, blocks, pooling of the first and the last token."""

    poolings: tuple[str, ...]  # the first is the generation's own

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None,
        in_chans: int,
        num_classes: int,
        global_pool: str | None,
        dim: int,
        drop_rate: float,
        blocks: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.head_drop = nn.Dropout(drop_rate)
        self.patch_size, self.stride = pair(patch_size), pair(stride or patch_size)
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, dim
        self.global_pool = self._check_pooling(global_pool)
        self.patch_embed = PatchEmbed(in_chans, dim, self.patch_size, self.stride)
        self.pos_embed = PositionTable(dim, patch_grid(pair(img_size), self.patch_size, self.patch_size))
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": dim, "reduction": self.stride[0]} for index in range(len(blocks))
        ]

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features * (2 if self.global_pool == "bilateral_flatten" else 1)

    def embed(self, image: Tensor) -> Tokens:
        """Turn images into position-marked patch tokens."""
        grid = self.patch_embed.grid(image)
        return self.pos_embed(self.patch_embed(image)).flatten(1, 2), grid

    def advance(self, carry: Tokens, index: int) -> Tokens:
        """Run block ``index``."""
        (x, grid), block = carry, self.blocks[index]
        run = self._run_row if isinstance(block, ViLBlockPair) else self._run
        return run(block, x, grid), grid

    def feature_map(self, carry: Tokens, index: int, norm: bool) -> Tensor:
        """Lay tokens out as (B, D, rows, columns)."""
        x, grid = carry
        return (self.finish(carry) if norm else x).unflatten(1, grid).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images; without pooling return tokens (B, S, D), with "to_image" a map (B, D, rows, columns)."""
        y = super().forward(x)
        if self.global_pool != "to_image":
            return y
        return y.unflatten(1, self.patch_embed.grid(x)).permute(0, 3, 1, 2)

    def pool(self, x: Tensor) -> Tensor:
        """Pool tokens (B, S, D): first and last token side by side, or their mean, or all tokens as they are."""
        if self.global_pool == "bilateral_flatten":
            return torch.cat([x[:, 0], x[:, -1]], dim=1)
        return (x[:, 0] + x[:, -1]) / 2 if self.global_pool == "bilateral_avg" else x

    def truncate(self, num_blocks: int) -> None:
        """Keep the first ``num_blocks`` blocks."""
        self.blocks = self.blocks[:num_blocks]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes removes it."""
        width = self.head_hidden_size
        if global_pool is not None:
            self.global_pool = self._check_pooling(global_pool)
        self.num_classes = num_classes
        self._build_head(rebuild_norm=self.head_hidden_size != width)
        self.head.to(self.pos_embed.embed)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position table for good; other sizes are still taken, at the cost of a resize in each forward."""
        grid = patch_grid(pair(img_size), self.patch_size, self.patch_size)
        self.pos_embed.embed = nn.Parameter(resize_grid(self.pos_embed.embed.detach(), grid))

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        return {"pos_embed.embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates: a block (a pair in the second generation) is one layer."""
        stem = r"^patch_embed|^pos_embed"
        if coarse:
            return {"stem": stem, "blocks": r"^blocks\.(\d+)"}
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^legacy_norm", (99999,))]}

    def _build_head(self, *, rebuild_norm: bool) -> None:
        self.head = nn.Linear(self.head_hidden_size, self.num_classes) if self.num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def _check_pooling(self, global_pool: str | None) -> str:
        name = global_pool or ""
        if name not in (*self.poolings, "to_image", ""):
            known = ", ".join(map(repr, (*self.poolings, "to_image", "")))
            raise ValueError(f"global_pool={global_pool!r}: {type(self).__name__} knows {known}")
        return name

    @torch.no_grad()
    def _initialise(self, *, proj_down_layers: int) -> None:
        """Initialise every parameter that its constructor does not leave right.

        =====================  ==========================================================
        proj_up, q/k/v_proj    normal, std sqrt(2 / (5 dim)); biases 0
        proj_down              normal, std 2 / (n sqrt(dim)), n = 1 or the number of layers; bias 0
        igate                  weight 0, bias normal, std 0.1
        fgate                  weight 0, bias from 3 to 6 over the heads
        patch_embed.proj       Xavier uniform over (dim, in_chans * patch area); bias 0
        pos_embed.embed        truncated normal, std 0.02
        head                   truncated normal, std 2e-5; bias 0
        norms, skip            scale 1; shift 0
        =====================  ==========================================================
        """
        dim = self.num_features
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))
        _init_zero(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed.embed, std=0.02)
        for layer in self.modules():
            if not isinstance(layer, ViLLayer):
                continue
            for projection in (layer.proj_up, layer.q_proj, layer.k_proj, layer.v_proj):
                _init_normal(projection, sqrt(2 / (5 * dim)))
            _init_normal(layer.proj_down, 2 / (proj_down_layers * sqrt(dim)))
            cell = layer.mlstm_cell
            nn.init.zeros_(cell.igate.weight)
            nn.init.normal_(cell.igate.bias, std=0.1)
            nn.init.zeros_(cell.fgate.weight)
            cell.fgate.bias.copy_(torch.linspace(3, 6, len(cell.fgate.bias)))


def _init_normal(projection: nn.Linear | BlockDiagonalLinear, std: float) -> None:
    nn.init.normal_(projection.weight, std=std)
    _init_zero(projection.bias)


def _init_zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)


class VisionLSTM2(_ViL):
    """Second-generation ViL: pairs of mLSTM layers, one from the top left and one from the bottom right.

    Args:
        img_size: image side(s) in pixels that the position table is made for; other sizes work at run time.
        patch_size: side(s) of a patch in pixels.
        stride: step between patches in pixels; smaller than the patch for overlapping ones. None: the patch size.
        in_chans: channels of the images.
        num_classes: classes; 0 for pooled features without a classifier.
        global_pool: "bilateral_flatten" (first and last token side by side), "bilateral_avg" (their mean), "" (all
            tokens) or "to_image" (a feature map).
        dim: token width; the layers work at twice that.
        depth: number of pairs.
        legacy_norm: a further LayerNorm over the pooled vector, as every released checkpoint has.
        conv_kind: depthwise convolution over the token "2d" grid or the token sequence, "causal1d".
        conv_kernel_size: its kernel.
        proj_bias: biases in the projections of a layer.
        norm_bias: biases in the norms.
        init_weights: "original", or "original-fixed" for output projections that shrink with the number of layers.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping a layer's residual branch for a sample in training.
        drop_path_decay: let that rate rise linearly from 0 instead of being the same everywhere.

    Raises:
        ValueError: for an image size that the patch does not divide, an unknown pooling or kind of convolution.
    """

    poolings = ("bilateral_flatten", "bilateral_avg")
    classifier_parts = ("legacy_norm",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = "bilateral_flatten",
        dim: int = 192,
        depth: int = 12,
        legacy_norm: bool = False,
        conv_kind: Literal["2d", "causal1d"] = "2d",
        conv_kernel_size: int = 3,
        proj_bias: bool = True,
        norm_bias: bool = True,
        init_weights: Literal["original", "original-fixed"] = "original",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_decay: bool = False,
    ) -> None:
        if conv_kind not in ("2d", "causal1d"):
            raise ValueError(f"conv_kind={conv_kind!r}: use '2d' or 'causal1d'")
        if init_weights not in ("original", "original-fixed"):
            raise ValueError(f"init_weights={init_weights!r}: use 'original' or 'original-fixed'")
        conv = GridConv if conv_kind == "2d" else CausalConv

        def block(drop_path: float, reverse: bool) -> ViLBlock:
            layer = ViLLayer(
                dim,
                conv=conv(2 * dim, conv_kernel_size, reverse=reverse),
                proj_bias=proj_bias,
                norm_bias=norm_bias,
                reverse=reverse,
            )
            return ViLBlock(dim, layer, norm_bias=norm_bias, drop_path=drop_path)

        rates = drop_path_rates(drop_path_rate, depth, decay=drop_path_decay)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            dim=dim,
            drop_rate=drop_rate,
            blocks=[ViLBlockPair(block(rate, False), block(rate, True)) for rate in rates],
        )
        self.norm = ResidualLayerNorm(dim, bias=norm_bias, eps=1e-6)
        self.has_legacy_norm = legacy_norm
        self.legacy_norm = self._new_legacy_norm()
        self._build_head(rebuild_norm=False)
        self._initialise(proj_down_layers=2 * depth if init_weights == "original-fixed" else 1)

    def finish(self, carry: Tokens) -> Tensor:
        """Normalise the tokens (B, S, D)."""
        return self.norm(carry[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, S, D), normalise the pooled vector and classify it."""
        x = self.pool(x)
        if self.global_pool not in self.poolings:
            return x
        x = self.legacy_norm(x)
        return x if pre_logits else self.head(self.head_drop(x))

    def _build_head(self, *, rebuild_norm: bool) -> None:
        super()._build_head(rebuild_norm=rebuild_norm)
        if rebuild_norm:
            self.legacy_norm = self._new_legacy_norm().to(self.pos_embed.embed)

    def _new_legacy_norm(self) -> nn.Module:
        """Make the norm of the pooled vector; without pooling there is none."""
        pooled = self.global_pool in self.poolings
        return nn.LayerNorm(self.head_hidden_size, eps=1e-5) if self.has_legacy_norm and pooled else nn.Identity()


class VisionLSTM(_ViL):
    """First-generation ViL: single mLSTM layers, even ones from the top left and odd ones from the bottom right.

    Arguments as for ``VisionLSTM2``, where it has them; ``depth`` counts layers.
    """

    poolings = ("bilateral_avg",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = "bilateral_avg",
        dim: int = 192,
        depth: int = 24,
        legacy_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_decay: bool = False,
    ) -> None:
        def block(drop_path: float, reverse: bool) -> ViLBlock:
            layer = ViLLayer1(
                dim,
                conv=CausalConv(2 * dim, 4, reverse=reverse),
                proj_bias=False,
                norm_bias=False,
                reverse=reverse,
            )
            return ViLBlock(dim, layer, norm_bias=False, drop_path=drop_path)

        rates = drop_path_rates(drop_path_rate, depth, decay=drop_path_decay)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            dim=dim,
            drop_rate=drop_rate,
            blocks=[block(rate, index % 2 == 1) for index, rate in enumerate(rates)],
        )
        self.legacy_norm = ResidualLayerNorm(dim, bias=False) if legacy_norm else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._build_head(rebuild_norm=False)
        self._initialise(proj_down_layers=1)

    def finish(self, carry: Tokens) -> Tensor:
        """Normalise the tokens (B, S, D); the last norm waits for the pooling."""
        return self.legacy_norm(carry[0])

    def feature_map(self, carry: Tokens, index: int, norm: bool) -> Tensor:
        """Lay tokens out as (B, D, rows, columns)."""
        x, grid = carry
        return super().feature_map((self.norm(self.legacy_norm(x)) if norm else x, grid), index, False)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, S, D), normalise the pooled vector (or, without pooling, all tokens) and classify it."""
        x = self.norm(self.pool(x))
        pooled = self.global_pool in self.poolings
        return self.head(self.head_drop(x)) if pooled and not pre_logits else x
