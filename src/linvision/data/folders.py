"""Data sets of image files on disk.

Files that cannot be read are skipped: a pass over the images goes on, and names them afterwards.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from linvision.data.augment import Changes
from linvision.data.batches import Batches, class_weights, epoch_seed, leave_out_last
from linvision.data.cache import ResizedImages
from linvision.data.images import MAX_PIXELS, open_image
from linvision.data.preprocess import Preprocess
from linvision.errors import RunError, UnreadableImageError, UsageError

Labelled = tuple[tuple[Path, int], ...]
Sample = tuple[Tensor | None, int, str, str]  # input, label, path, the reason why there is no input


@dataclass(frozen=True)
class FolderData:
    """A data set on disk: image files with their labels.

    Attributes:
        name: of the folder or table.
        classes: the name of each label.
        train: what to learn from; empty where there are only images to measure on.
        test: what to measure on, which in training is the validation set.
        held_out: what a test/ folder holds beside train/ and val/, to be measured once at the end; may be empty.
        grey: whether the images have one channel.
        max_pixels: larger images are unreadable.
        cache: folder for resized copies of the training images; None for none.
    """

    name: str
    classes: tuple[str, ...]
    train: Labelled
    test: Labelled
    held_out: Labelled = ()
    grey: bool = False
    max_pixels: int = MAX_PIXELS
    cache: Path | None = None

    def train_batches(
        self, preprocess: Preprocess, changes: Changes, *, batch_size: int, seed: int, workers: int = 0
    ) -> Batches:
        """Return shuffled and augmented batches, decoded by ``workers`` processes (0: in this one).

        Raises:
            UsageError: there are no training images.
            RunError: none of them can be read.
        """
        if not self.train:
            raise UsageError(f"{self.name} has no train/ folder to learn from")
        transform = create_transform(
            (3, *preprocess.size),
            is_training=True,
            scale=(changes.crop_scale, 1.0),
            hflip=changes.flip,
            auto_augment=changes.auto_augment or None,
            color_jitter=changes.color_jitter,
            re_prob=changes.erase,
            re_mode="pixel",
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
        )
        cached = None
        if self.cache is not None:
            # The smallest crop is this share of an image's area; it need not be enlarged.
            side = math.ceil(max(preprocess.size) / math.sqrt(changes.crop_scale))
            cached = ResizedImages(self.cache, side)
        images = ImageFiles(self.train, transform, self.max_pixels, cached)
        balanced = changes.balance == "sampling"
        return FolderBatches(images, batch_size=batch_size, workers=workers, seed=seed, balanced=balanced)

    def test_batches(self, preprocess: Preprocess, *, batch_size: int, workers: int = 0) -> Batches:
        """Return the images to measure on, in order; RunError if none of them can be read."""
        return FolderBatches(ImageFiles(self.test, preprocess, self.max_pixels), batch_size=batch_size, workers=workers)

    def held_out_batches(self, preprocess: Preprocess, *, batch_size: int, workers: int = 0) -> Batches | None:
        """Return the images of test/ in order, or None where there are none; RunError if none can be read."""
        if not self.held_out:
            return None
        images = ImageFiles(self.held_out, preprocess, self.max_pixels)
        return FolderBatches(images, batch_size=batch_size, workers=workers)


class ImageFiles(Dataset):
    """Labelled image files, each decoded and made an input; one that cannot be is no input and the reason why."""

    def __init__(self, items: Labelled, transform, max_pixels: int, cached: ResizedImages | None = None):
        self.items, self.transform, self.max_pixels = items, transform, max_pixels
        self.open = open_image if cached is None else cached.open

    def __len__(self) -> int:
        """Count the files."""
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        """Return the input and its label, or no input and the reason why."""
        path, label = self.items[index]
        try:
            return self.transform(self.open(path, max_pixels=self.max_pixels)), label, str(path), ""
        except UnreadableImageError as error:
            return None, label, str(path), str(error)

    def check_readable(self) -> None:
        """Open images until one can be read.

        Raises:
            RunError: there is none.
        """
        reason = ""
        for path, _ in self.items:
            try:
                open_image(path, max_pixels=self.max_pixels)
            except UnreadableImageError as error:
                reason = reason or str(error)
            else:
                return
        raise RunError(f"none of the {len(self)} images could be read; {reason}")


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, dict[str, str]]:
    readable = [(image, label) for image, label, _, _ in samples if image is not None]
    failures = {path: reason for image, _, path, reason in samples if image is None}
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return images, torch.tensor([label for _, label in readable], dtype=torch.long), failures


class FolderBatches(Batches):
    """Batches of images read from disk; with a seed, so in training, they are shuffled.

    Raises:
        RunError: not one of the images can be read.
    """

    def __init__(
        self, dataset: ImageFiles, *, batch_size: int, workers: int, seed: int | None = None, balanced: bool = False
    ):
        dataset.check_readable()
        self.labels = torch.tensor([label for _, label in dataset.items])
        batch_size = min(batch_size, len(dataset))
        self.seed = seed
        self.unreadable = {}
        self.order = torch.Generator()
        sampler = None
        if balanced:
            weights = class_weights(self.labels)[self.labels]
            sampler = WeightedRandomSampler(weights.tolist(), len(dataset), generator=self.order)
        # Workers start anew for each pass: those kept alive would not be seeded again.
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=seed is not None and sampler is None,
            sampler=sampler,
            drop_last=seed is not None and leave_out_last(len(dataset), batch_size),
            num_workers=workers,
            collate_fn=_collate,
            generator=self.order,
            pin_memory=torch.cuda.is_available(),
        )
        self.num_images = len(dataset)

    def __len__(self) -> int:
        """Count the batches of one pass."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what can be read, and note the rest in ``unreadable``.

        Raises:
            RunError: not one image of the whole pass could be read.
        """
        if self.seed is not None:
            self.order.manual_seed(epoch_seed(self.seed, self.epoch))
        found = 0
        for images, labels, failures in self.loader:
            self.unreadable.update(failures)
            found += len(labels)
            yield images, labels
        if not found:
            raise RunError(
                f"none of the {self.num_images} images could be read; {next(iter(self.unreadable.values()))}"
            )
