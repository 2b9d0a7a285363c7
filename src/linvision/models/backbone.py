"""timm's model contract, written once for every backbone of the package.

A backbone is read as four steps: ``embed`` an image, ``advance`` the carried activations through one block after the
other, ``finish`` them into features, and turn features into logits (``forward_head``). From these this class derives
forward_features, forward_intermediates, pruning and gradient checkpointing, so that every family answers alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from linvision.models.forms import form_of, is_listened_to
from linvision.models.patches import check_image
from linvision.models.recompute import run_recomputed

torch.fx.wrap("check_image")  # torch.fx cannot look into it


class Backbone(nn.Module, ABC):
    """Base of the image backbones: ``(B, in_chans, H, W)`` images to ``(B, num_classes)`` logits.

    A subclass sets ``num_classes``, ``num_features`` (channels of the features), ``head_hidden_size`` (channels that
    the classifier reads), ``in_chans``, ``head`` and ``feature_info`` (one entry a block: module, num_chs, reduction).
    What travels between blocks, the *carry*, is the subclass's own affair: a tensor or a tuple of tensors and ints.
    """

    num_classes: int
    num_features: int
    head_hidden_size: int
    in_chans: int
    head: nn.Module
    feature_info: list[dict[str, Any]]
    classifier_parts: tuple[str, ...] = ()  # children beside ``head`` that only a classifier has
    grad_checkpointing = False
    selective_checkpointing = False

    @abstractmethod
    def embed(self, image: Tensor) -> Any:
        """Turn images (B, in_chans, H, W) into the carry of the first block."""

    @abstractmethod
    def advance(self, carry: Any, index: int) -> Any:
        """Run block ``index`` on the carry, each of its layers by ``_run``."""

    @abstractmethod
    def finish(self, carry: Any) -> Tensor:
        """Turn the last block's carry into features: final norm included, pooling not."""

    @abstractmethod
    def feature_map(self, carry: Any, index: int, norm: bool) -> Tensor:
        """Lay the carry after block ``index`` out as a map (B, C, H', W'); ``norm`` applies the norm meant for it."""

    @abstractmethod
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features and classify them; ``pre_logits`` stops before the classifier."""

    @abstractmethod
    def truncate(self, num_blocks: int) -> None:
        """Keep the first ``num_blocks`` blocks and drop the rest."""

    @abstractmethod
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes removes it. ``global_pool`` changes the pooling."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates, by timm's rules: expressions for "stem" and "blocks"."""

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay (beside the one-dimensional ones)."""
        return set()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the unpooled features of images (B, in_chans, H, W), after the final norm."""
        carry = self.embed(check_image(x, self.in_chans, type(self).__name__))
        for index in range(len(self.feature_info)):
            carry = self.advance(carry, index)
        return self.finish(carry)

    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = ..., norm: bool = ..., stop_early: bool = ...,
        output_fmt: str = ..., intermediates_only: Literal[False] = ...,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip
    @overload
    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = ..., norm: bool = ..., stop_early: bool = ...,
        output_fmt: str = ..., *, intermediates_only: Literal[True],
    ) -> list[Tensor]: ...  # fmt: skip
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return feature maps (B, C, H', W') after chosen blocks, as timm's models do.

        Args:
            x: images (B, in_chans, H, W).
            indices: block numbers (negative ones count from the end), the last n for an int, all for None.
            norm: apply the norm meant for each map.
            stop_early: skip the blocks after the last chosen one.
            output_fmt: "NCHW", or "NHWC" for maps (B, H', W', C).
            intermediates_only: return the list of maps alone, without the final features.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: feature maps are given as 'NCHW' or 'NHWC'")
        take = self._block_numbers(indices)
        num_blocks = max(take) + 1 if stop_early else len(self.feature_info)
        carry = self.embed(check_image(x, self.in_chans, type(self).__name__))
        taken = {}
        for index in range(num_blocks):
            carry = self.advance(carry, index)
            if index in take:
                taken[index] = self.feature_map(carry, index, norm)
        maps = [taken[index] if output_fmt == "NCHW" else taken[index].permute(0, 2, 3, 1) for index in take]
        return maps if intermediates_only else (self.finish(carry), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices)`` does not need; returns the block numbers it takes."""
        take = self._block_numbers(indices)
        self.truncate(max(take) + 1)
        self.feature_info = self.feature_info[: max(take) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer (``nn.Identity`` without classes)."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True, *, selective: bool = False) -> None:
        """Recompute each layer in the backward pass instead of storing its activations.

        Args:
            enable: or store them again.
            selective: recompute only what is cheap (norms, activations, gates, depthwise convolutions), and store the
                results of large matrix products, attention and scans.
        """
        self.grad_checkpointing, self.selective_checkpointing = enable, selective

    def _block_numbers(self, indices: int | Sequence[int] | None) -> list[int]:
        depth = len(self.feature_info)
        if indices is None or isinstance(indices, int):
            indices = range(-(depth if indices is None else indices), 0)
        take = [index + depth if index < 0 else index for index in indices]
        if not take or min(take) < 0 or max(take) >= depth:
            raise ValueError(f"block indices {list(indices)}: numbers from {-depth} to {depth - 1} are needed")
        return take

    def _run(self, layer: nn.Module, *args: Any) -> Any:
        """Run a layer, or the form that may stand for it; recompute it in the backward pass where that is asked for."""
        form = form_of(layer)
        compute = layer if form is None else form
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            again = partial(self._recomputing, layer)
            return run_recomputed(compute, *args, selective=self.selective_checkpointing, again=again)
        return compute(*args)

    def _run_row(self, row: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """Run the children of a module that calls them in a row, or the module itself where it is listened to."""
        if is_listened_to(row):
            return self._run(row, x, *args)
        for layer in row.children():
            x = self._run(layer, x, *args)
        return x

    def _recomputing(self, layer: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which a layer is recomputed; compiled graphs do without."""
        return nullcontext()


def drop_path_rates(rate: float, depth: int, *, decay: bool) -> list[float]:
    """Return one drop-path rate a block: all equal, or with ``decay`` rising linearly from 0."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate={rate}: a probability from 0 to below 1 is needed")
    return torch.linspace(0, rate, depth, device="cpu").tolist() if decay else [rate] * depth
