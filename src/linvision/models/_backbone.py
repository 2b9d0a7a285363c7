"""timm's model contract, written once for every backbone of the package.

A backbone is read as four steps: ``embed`` an image, ``advance`` the carried activations through one block after the
other, ``finish`` them into features, and turn features into logits (``forward_head``). From these this class derives
forward_features, forward_intermediates, pruning and gradient checkpointing, so that every family answers alike.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from timm.models import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    grad_checkpointing = False

    @abstractmethod
    def embed(self, image: Tensor) -> Any:
        """Turn images (B, in_chans, H, W) into the carry of the first block."""

    @abstractmethod
    def advance(self, carry: Any, index: int) -> Any:
        """Run block ``index`` on the carry."""

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

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the unpooled features of images (B, in_chans, H, W), after the final norm."""
        carry = self.embed(self._check_image(x))
        for index in range(len(self.feature_info)):
            carry = self._advance(carry, index)
        return self.finish(carry)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
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
            output_fmt: only "NCHW".
            intermediates_only: return the list of maps alone, without the final features.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: feature maps are given as 'NCHW' only")
        take, last = feature_take_indices(len(self.feature_info), indices)
        num_blocks = last + 1 if stop_early else len(self.feature_info)
        carry = self.embed(self._check_image(x))
        taken = {}
        for index in range(num_blocks):
            carry = self._advance(carry, index)
            if index in take:
                taken[index] = self.feature_map(carry, index, norm)
        maps = [taken[index] for index in take]
        return maps if intermediates_only else (self.finish(carry), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what ``forward_intermediates(indices)`` does not need; returns the block numbers it takes."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.truncate(last + 1)
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer (``nn.Identity`` without classes)."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def _advance(self, carry: Any, index: int) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self.advance, carry, index, use_reentrant=False)
        return self.advance(carry, index)

    def _check_image(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"{type(self).__name__} takes images of shape (B, {self.in_chans}, H, W) but got {tuple(x.shape)}; "
                f"build the model with in_chans={x.shape[1] if x.ndim == 4 else 'N'} for other channel counts"
            )
        return x


def patch_grid(
    image_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Count the rows and columns of patches, (H - patch) // stride + 1 and likewise for W.

    Raises:
        ValueError: where the patch does not divide a side of the image.
    """
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if size % patch or size < patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"image {side} {size} is not a multiple of the patch size {patch}: resize or pad it, to {near} say"
            )
    rows, columns = (
        (size - patch) // step + 1 for size, patch, step in zip(image_size, patch_size, stride, strict=True)
    )
    return rows, columns
