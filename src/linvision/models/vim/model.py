"""Vim (Vision Mamba): a plain backbone of selective-scan layers that read the patch tokens both ways.

Paper: arXiv 2401.09417. Parameter keys are the published ones; the layers stand in ``layers``, the published
models in ``variants``.

Where this deviates from the published code: it runs on any device and takes images of any size that the patch divides,
resizing the position table without its class rows, which are taken out by their true place (the published fine-tuning
takes the first row for the class token's even where it is the middle one). Nothing is flipped for the backward scans.
The residual, states and decays are always float32 or wider, so that training in bfloat16 stays finite. A rotary
embedding is refused where it would rotate class tokens, or tokens that have left their places.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from torch import Tensor, nn

from linvision.models.backbone import Backbone, drop_path_rates
from linvision.models.forms import Compute, form_of_stack, is_plain
from linvision.models.patches import PatchEmbed, pair, patch_grid, resize_grid
from linvision.models.vim import fused  # noqa: F401 - registers the forms of the layers
from linvision.models.vim.layers import LayerNorm, MambaMixer, RMSNorm, RotaryEmbedding, VimLayer, add_residual

ClassToken = Literal["middle", "first", "random", "double", "none"]
Directions = Literal["v2", "v1", "one-way", "paired"]
Rotary = Literal[False, "hidden", "both"]
ROTARY = (False, "hidden", "both")
DIRECTIONS = ("v2", "v1", "one-way", "paired")
CLASS_TOKENS = ("middle", "first", "random", "double", "none")
POOLINGS = ("token", "avg", "max", "last", "")

for _name in ("add_residual", "resize_positions"):
    torch.fx.wrap(_name)  # torch.fx cannot look into them


class Stream(NamedTuple):
    """What travels between layers."""

    hidden: Tensor  # (B, S, D), what the last layer put out
    residual: Tensor | None  # (B, S, D), the sum of all before; None before the first layer, or if hidden is all
    grid: tuple[int, int]  # of the patches
    order: Tensor | None  # (S,): the place that each token has by right, where an experiment moved them
    of_sums: Compute | None  # the form of the layers that hands on hidden + residual as hidden, where it may be used


class VisionMamba(Backbone):
    """Vision Mamba.

    Args:
        img_size: image side(s) in pixels that the position table is made for; other sizes work at run time.
        patch_size: side(s) of a patch in pixels.
        stride: step between patches in pixels; smaller than the patch for overlapping ones. None: the patch size.
        in_chans: channels of the images.
        num_classes: classes; 0 for pooled features without a classifier.
        global_pool: "token" (the class token, or the mean of both), "avg" (mean of the patches), "last" (last token),
            "max" (classify every patch, maximum of the logits) or "" (all tokens). None: "token" with a class token,
            else "avg".
        dim: token width D; the layers work at twice that.
        depth: number of layers.
        d_state: states per channel.
        class_token: in the "middle" (after half of the patches), "first", at a "random" place in each forward pass in
            training (middle in evaluation), "double" (one at each end) or "none".
        directions: "v2": both ways, each with its own parameters; "v1": both ways with shared ones; "one-way"; or
            "paired": one-way layers in pairs that read the same input, the second from the end, outputs summed.
        halve_output: divide the sum of the two ways of "v2" by 2.
        layer_scale: initial value of a factor per channel on each layer's output; None for no such factor.
        norm: "rms" or "layer".
        norm_eps: its epsilon.
        pos_embed: add a learned position table.
        rotary: rotate the hidden states before each layer by their place in the grid: False, "hidden", or "both" to
            rotate the residual as well. Needs ``class_token`` "first" or "none".
        rotary_reference: side of the grid, in tokens, whose angles all grids are scaled to.
        shuffle_tokens: in training, feed the tokens in random order (drawn anew in each forward pass).
        flip_probability: in training, feed the tokens in reverse order with this probability.
        drop_rate: dropout of the embedded tokens.
        drop_path_rate: greatest probability of dropping a layer's output for a sample in training; rises linearly from
            0, one layer later than usual.

    Raises:
        ValueError: for an image size that the patch does not divide, unknown names and options that exclude each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        class_token: ClassToken = "middle",
        directions: Directions = "v2",
        halve_output: bool = True,
        layer_scale: float | None = None,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        pos_embed: bool = True,
        rotary: Rotary = False,
        rotary_reference: int = 14,
        shuffle_tokens: bool = False,
        flip_probability: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_choice("norm", norm, ("rms", "layer"))
        _check_directions(directions, depth)
        _check_order(class_token, rotary, shuffle_tokens, flip_probability)
        self.patch_size, self.stride = pair(patch_size), pair(stride or patch_size)
        self.in_chans, self.num_classes, self.num_features, self.head_hidden_size = in_chans, num_classes, dim, dim
        self.class_token: ClassToken = class_token
        self.global_pool = self._check_pooling(global_pool, default="avg" if class_token == "none" else "token")
        self.shuffle_tokens, self.flip_probability = shuffle_tokens, flip_probability
        self.rotate_residual = rotary == "both"
        self.layers_per_block = 2 if directions == "paired" else 1
        self.grid = patch_grid(pair(img_size), self.patch_size, self.stride)
        self.patch_embed = PatchEmbed(in_chans, dim, self.patch_size, self.stride)
        for name in self._class_token_names():
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, dim)))
        num_tokens = self.grid[0] * self.grid[1] + len(self._class_token_names())
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim)) if pos_embed else None
        self.rope = RotaryEmbedding(dim, self.grid, reference=rotary_reference) if rotary else None
        self.pos_drop = nn.Dropout(drop_rate)
        norm_class = RMSNorm if norm == "rms" else LayerNorm
        rates = [0.0, *drop_path_rates(drop_path_rate, depth, decay=True)]
        mixers = {"d_state": d_state, "halve": halve_output, "layer_scale": layer_scale}
        self.layers = nn.ModuleList()
        for index in range(depth):
            mixer = MambaMixer(dim, directions=_mixer_directions(directions, index), **mixers)
            self.layers.append(VimLayer(mixer=mixer, norm=norm_class(dim, eps=norm_eps), drop_path=rates[index]))
        self.drop_path = DropPath(drop_path_rate)
        self.norm_f = norm_class(dim, eps=norm_eps)
        self.head = self._new_head()
        self.feature_info = [
            {"module": f"layers.{last}", "num_chs": dim, "reduction": self.stride[0]}
            for last in range(self.layers_per_block - 1, depth, self.layers_per_block)
        ]
        self._initialise()

    def embed(self, image: Tensor) -> Stream:
        """Turn images into tokens with class tokens and positions, in the order in which the layers read them."""
        grid = self.patch_embed.grid(image)
        patches = self.patch_embed(image).flatten(1, 2)
        num_patches = grid[0] * grid[1]
        rows, order = class_rows(self.class_token, num_patches), None
        if self.class_token == "random" and self.training:
            (middle,), rows = rows, (int(torch.randint(num_patches + 1, ())),)
            places = [place for place in range(num_patches + 1) if place != middle]
            order = torch.tensor([*places[: rows[0]], middle, *places[rows[0] :]], device=image.device)
        class_tokens = [getattr(self, name).expand(image.shape[0], -1, -1) for name in self._class_token_names()]
        x = insert_rows(patches, rows, class_tokens)
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, grid)
        x = self.pos_drop(x).contiguous()
        if self.training and (self.shuffle_tokens or self.flip_probability > 0):
            x, order = self._reordered(x, order)
        return Stream(x, None, grid, order, self._form_of_sums(x))

    def advance(self, carry: Stream, index: int) -> Stream:
        """Run layer ``index``, or pair of layers."""
        hidden, residual, grid, order, of_sums = carry
        if of_sums is not None:
            return Stream(of_sums(self.layers[index], hidden), None, grid, order, of_sums)
        if self.rope is not None:
            hidden = self.rope(hidden, grid)
            if residual is not None and self.rotate_residual:
                residual = self.rope(residual, grid)
        if self.layers_per_block == 1:
            hidden, residual = self._run(self.layers[index], hidden, residual)
            return Stream(hidden, residual, grid, order, None)
        first, second = (self._run(self.layers[2 * index + half], hidden, residual) for half in (0, 1))
        return Stream(first[0] + second[0], first[1] + second[1], grid, order, None)

    def finish(self, carry: Stream) -> Tensor:
        """Add hidden and residual up and normalise: tokens (B, S, D), class tokens included, each at its place."""
        x = self.norm_f(self._summed(carry))
        # The last token, where it is asked for, is the last one read.
        return x if self.global_pool == "last" else restored(x, carry.order)

    def feature_map(self, carry: Stream, index: int, norm: bool) -> Tensor:
        """Lay the patches' sums of hidden and residual out as (B, D, rows, columns)."""
        x = self._summed(carry)
        x = self._patches(restored(self.norm_f(x) if norm else x, carry.order))
        return x.unflatten(1, carry.grid).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, S, D) and classify; with "max" and "" classification comes first, or takes every token."""
        if self.global_pool == "token":
            x = x[:, list(self._class_rows(x.shape[1]))].mean(1)
        elif self.global_pool == "avg":
            x = self._patches(x).mean(1)
        elif self.global_pool == "last":
            x = x[:, -1]
        elif self.global_pool == "max":
            x = self._patches(x)
        if pre_logits:
            return x
        logits = self.head(x)
        return logits.amax(1) if self.global_pool == "max" else logits

    def truncate(self, num_blocks: int) -> None:
        """Keep the first ``num_blocks`` layers, or pairs."""
        self.layers = self.layers[: num_blocks * self.layers_per_block]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices)`` does not need; returns the block numbers it takes."""
        take = super().prune_intermediate_layers(indices, prune_norm=False, prune_head=prune_head)
        if prune_norm:
            self.norm_f = nn.Identity()
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes removes it."""
        self.global_pool = self._check_pooling(global_pool, default=self.global_pool)
        self.num_classes = num_classes
        self.head = self._new_head().to(self.patch_embed.proj.weight)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the tables for good; other sizes are still taken, at the cost of a resize in each forward."""
        grid = patch_grid(pair(img_size), self.patch_size, self.stride)
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(self._positions(self.pos_embed.detach(), grid).clone())
        if self.rope is not None:
            self.rope.set_grid(grid)
        self.grid = grid

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        kept = {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "A_log", "A_b_log", "D", "D_b"}
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in kept}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates."""
        stem = r"^cls_token|^pos_embed|^patch_embed"
        if coarse:
            return {"stem": stem, "blocks": r"^layers\.(\d+)"}
        return {"stem": stem, "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]}

    def _class_token_names(self) -> tuple[str, ...]:
        return {"none": (), "double": ("cls_token_head", "cls_token_tail")}.get(self.class_token, ("cls_token",))

    def _class_rows(self, num_tokens: int) -> tuple[int, ...]:
        return class_rows(self.class_token, num_tokens - len(self._class_token_names()))

    def _patches(self, x: Tensor) -> Tensor:
        return remove_rows(x, self._class_rows(x.shape[1]))

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        return resize_positions(table, self.class_token, self.grid, grid)

    def _summed(self, carry: Stream) -> Tensor:
        return add_residual(carry.residual, self.drop_path(carry.hidden))

    def _form_of_sums(self, x: Tensor) -> Compute | None:
        """Return the layers' form that hands on sums, where nothing between the layers would see a difference."""
        form = None if self.rope is not None or self.layers_per_block > 1 else form_of_stack(self.layers)
        return form if form is not None and x.dtype == torch.float32 and is_plain(self.drop_path, True) else None

    def _reordered(self, x: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        places = torch.arange(x.shape[1], device=x.device)
        if self.shuffle_tokens:
            places = places[torch.randperm(len(places), device=x.device)]
        if float(torch.rand(())) < self.flip_probability:
            places = places.flip(0)
        return x[:, places], places if order is None else order[places]

    def _check_pooling(self, global_pool: str | None, *, default: str) -> str:
        global_pool = default if global_pool is None else global_pool
        _check_choice("global_pool", global_pool, POOLINGS)
        if global_pool == "token" and self.class_token == "none":
            raise ValueError("global_pool='token' needs a class token but class_token='none'; take 'avg'")
        return global_pool

    def _new_head(self) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, self.num_classes)
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise every parameter that its constructor does not leave right.

        =======================  ===================================================================
        dt_proj.weight           uniform, +-R^-0.5 for rank R
        dt_proj.bias             softplus^-1 of exp(uniform from log 0.001 to log 0.1), at least 1e-4
        A_log, A_b_log           log(1), ..., log(N)
        D, D_b                   1
        out_proj                 PyTorch's own, divided by sqrt(depth)
        in_proj, x_proj, conv1d  PyTorch's own
        patch_embed.proj         LeCun normal; bias 0
        pos_embed, class tokens  truncated normal, std 0.02
        head                     truncated normal, std 0.02; bias 0
        norms                    scale 1; shift 0
        =======================  ===================================================================
        """
        for name, parameter in self.named_parameters():
            if name == "pos_embed" or name.startswith("cls_token"):
                trunc_normal_(parameter, std=0.02)
            elif name == "patch_embed.proj.weight":
                lecun_normal_(parameter)
            elif name == "patch_embed.proj.bias":
                nn.init.zeros_(parameter)
        for mixer in self.modules():
            if isinstance(mixer, MambaMixer):
                mixer.initialise(depth=len(self.layers))


def class_rows(class_token: ClassToken, num_patches: int) -> tuple[int, ...]:
    """Return the places of the class tokens in the sequence (of "random": its place outside of training)."""
    places = {"none": (), "first": (0,), "double": (0, num_patches + 1)}
    return places.get(class_token, (num_patches // 2,))


def insert_rows(x: Tensor, rows: Sequence[int], values: Sequence[Tensor]) -> Tensor:
    """Insert tokens (B, 1, D) into (B, S, D) such that they stand at ``rows`` (ascending) of the result."""
    pieces, start = [], 0
    for count, (row, value) in enumerate(zip(rows, values, strict=True)):
        pieces += [x[:, start : row - count], value]
        start = row - count
    return torch.cat([*pieces, x[:, start:]], dim=1)


def remove_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Take the tokens at ``rows`` (ascending) out of (B, S, D)."""
    if not rows:
        return x
    starts, stops = [0, *(row + 1 for row in rows)], [*rows, x.shape[1]]
    return torch.cat([x[:, start:stop] for start, stop in zip(starts, stops, strict=True)], dim=1)


def restored(x: Tensor, order: Tensor | None) -> Tensor:
    """Bring tokens (B, S, D) back to their places; ``order`` names the place of each."""
    return x if order is None else x[:, order.argsort()]


def resize_positions(
    table: Tensor, class_token: ClassToken, old_grid: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Resize a position table (1, patches + class tokens, D): bicubic, but for the class rows, which stay."""
    if grid == old_grid:
        return table
    old_rows = class_rows(class_token, old_grid[0] * old_grid[1])
    patches = resize_grid(remove_rows(table, old_rows).unflatten(1, old_grid), grid).flatten(1, 2)
    return insert_rows(patches, class_rows(class_token, grid[0] * grid[1]), [table[:, row, None] for row in old_rows])


def _mixer_directions(directions: Directions, index: int) -> Literal["v2", "v1", "forward", "backward"]:
    if directions in ("v1", "v2"):
        return directions
    return "backward" if directions == "paired" and index % 2 else "forward"


def _check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: VisionMamba knows {', '.join(map(repr, known))}")


def _check_directions(directions: Directions, depth: int) -> None:
    _check_choice("directions", directions, DIRECTIONS)
    if directions == "paired" and depth % 2:
        raise ValueError(f"directions='paired' needs an even depth but depth={depth}")


def _check_order(class_token: ClassToken, rotary: Rotary, shuffle_tokens: bool, flip_probability: float) -> None:
    """Raise ValueError for unknown places of tokens, and for a rotary embedding of tokens that leave theirs."""
    _check_choice("class_token", class_token, CLASS_TOKENS)
    _check_choice("rotary", rotary, ROTARY)
    if rotary and (class_token not in ("first", "none") or shuffle_tokens or flip_probability > 0):
        raise ValueError(
            "rotary embedding needs every token at its place: take class_token='first' or 'none' (not "
            f"{class_token!r}), and neither shuffle_tokens nor flip_probability"
        )
    if not 0 <= flip_probability <= 1:
        raise ValueError(f"flip_probability={flip_probability}: a probability from 0 to 1 is needed")
