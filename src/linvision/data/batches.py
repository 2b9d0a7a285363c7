"""Batches of (inputs, labels): what every data set answers with, and what training and evaluation walk over.

The order and the random changes of an epoch follow from the seed and the epoch's number alone, so that a resumed run
sees what an uninterrupted one would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from linvision.data.augment import Augment, augment
from linvision.data.images import Preprocess


class Batches(ABC):
    """A repeatable pass over images, in ``len(self)`` batches of inputs (B, 3, H, W) and labels (B,).

    Attributes:
        num_images: images in one pass.
        epoch: the pass that the next iteration makes; it decides the order and the random changes.
        unreadable: the reason for each file that was skipped so far, by its path.
    """

    num_images: int
    epoch: int = 0
    unreadable: dict[str, str]

    @abstractmethod
    def __len__(self) -> int:
        """Count the batches of one pass."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels. A batch is smaller, or empty, where files could not be read."""


class ArrayBatches(Batches):
    """Batches from 8-bit images (N, C, H, W) held in memory, changed a whole batch at a time."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        preprocess: Preprocess,
        batch_size: int,
        augmentation: Augment | None = None,
        seed: int | None = None,
    ):
        self.images, self.labels = images, labels
        self.preprocess, self.augmentation = preprocess, augmentation
        self.seed = seed
        self.unreadable = {}
        self.batch_size = min(batch_size, len(labels))
        self.num_images = len(labels) if seed is None else len(self) * self.batch_size

    def __len__(self) -> int:
        """Count the batches: with a seed, so in training, all are full and the rest is left out."""
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.seed is not None else full + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images in order, or shuffled and changed if there is a seed."""
        generator = torch.Generator()
        order = torch.arange(len(self.labels))
        if self.seed is not None:
            generator.manual_seed(epoch_seed(self.seed, self.epoch))
            order = torch.randperm(len(order), generator=generator)
        for chosen in order.split(self.batch_size)[: len(self)]:
            images = self.preprocess.resize(self.images[chosen])
            if self.augmentation is not None:
                images = augment(images, self.augmentation, generator=generator)
            yield self.preprocess.normalise(images), self.labels[chosen]


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed of its own for each epoch of a run (the constant exceeds all epoch numbers)."""
    return seed * 1_000_003 + epoch
