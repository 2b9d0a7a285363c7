"""Batches of (inputs, labels): what every data set answers with, and what training and evaluation walk over.

The order and the random changes of an epoch follow from the seed and the epoch's number alone, so that a resumed run
sees what an uninterrupted one would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from linvision.data.augment import Augment, augment
from linvision.data.preprocess import Preprocess
from linvision.errors import WorkerError


class Batches(ABC):
    """A repeatable pass over images, in ``len(self)`` batches of inputs (B, 3, H, W) and labels (B,).

    Attributes:
        num_images: images that there are. A pass in training may leave one out (``leave_out_last``).
        labels: theirs (N,).
        epoch: the pass that the next iteration makes; it decides the order and the random changes.
        unreadable: the reason for each file that was skipped so far, by its path.
    """

    num_images: int
    labels: Tensor
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
        balanced: bool = False,
    ):
        self.images, self.labels, self.balanced = images, labels, balanced
        self.preprocess, self.augmentation = preprocess, augmentation
        self.seed = seed
        self.unreadable = {}
        self.batch_size = min(batch_size, len(labels))
        self.num_images = len(labels)

    def __len__(self) -> int:
        """Count the batches of one pass."""
        left_out = self.seed is not None and leave_out_last(len(self.labels), self.batch_size)
        return -(-len(self.labels) // self.batch_size) - left_out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images in order, or shuffled and changed if there is a seed."""
        generator = torch.Generator()
        order = torch.arange(len(self.labels))
        if self.seed is not None:
            generator.manual_seed(epoch_seed(self.seed, self.epoch))
            order = torch.randperm(len(order), generator=generator)
            if self.balanced:
                weights = class_weights(self.labels)[self.labels]
                order = torch.multinomial(weights, len(order), replacement=True, generator=generator)
        for chosen in order.split(self.batch_size)[: len(self)]:
            images = self.preprocess.resize(self.images[chosen])
            if self.augmentation is not None:
                images = augment(images, self.augmentation, generator=generator)
            yield self.preprocess.normalise(images), self.labels[chosen]


def class_weights(labels: Tensor, num_classes: int = 0) -> Tensor:
    """Return a weight for each class by which all count alike, their mean over the labels (N,) being 1."""
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (counts.clamp(min=1) * (counts > 0).sum())


def leave_out_last(images: int, batch_size: int) -> bool:
    """Say whether the last batch of a pass in training is left out, which it is if it would be of a single image.

    A batch norm cannot be trained on one image, and mixup has no partner for it. The order of each pass is another, so
    that the image is, too.
    """
    return batch_size > 1 and images % batch_size == 1


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turn the end of a data loader's process, which torch reports wherever the program is, into words.

    Raises:
        WorkerError: one was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            "a process that decodes images was killed, perhaps for want of memory: use fewer --workers"
        ) from error


def epoch_seed(seed: int, epoch: int) -> int:
    """Return a seed of its own for each epoch of a run (the constant exceeds all epoch numbers)."""
    return seed * 1_000_003 + epoch
