"""Image folders: train/ and val/, each with one sub-folder of images a class.

Files that cannot be read are skipped: a pass over the images goes on, and names them afterwards.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from linvision.data.augment import Changes
from linvision.data.batches import Batches, epoch_seed
from linvision.data.images import Preprocess, find_images, open_image
from linvision.errors import RunError, UnreadableImageError, UsageError

Labelled = tuple[tuple[Path, int], ...]


@dataclass(frozen=True)
class FolderData:
    """A data set on disk; ``train`` is empty where there are only images to measure on."""

    name: str
    classes: tuple[str, ...]
    train: Labelled
    test: Labelled
    grey: bool = False

    def train_batches(
        self, preprocess: Preprocess, changes: Changes, *, batch_size: int, seed: int, workers: int = 0
    ) -> Batches:
        """Return shuffled and augmented batches, decoded by ``workers`` processes (0: in this one)."""
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
        return FolderBatches(_Images(self.train, transform), batch_size=batch_size, workers=workers, seed=seed)

    def test_batches(self, preprocess: Preprocess, *, batch_size: int, workers: int = 0) -> Batches:
        """Return the images to measure on, in order."""
        return FolderBatches(_Images(self.test, preprocess), batch_size=batch_size, workers=workers)


class _Images(Dataset):
    def __init__(self, items: Labelled, transform):
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        """Return the input and its label, or no input and the reason why."""
        path, label = self.items[index]
        try:
            return self.transform(open_image(path)), label, ""
        except UnreadableImageError as error:
            return None, label, f"{path}\n{error}"


def _collate(samples: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor, Tensor, list[str]]:
    readable = [(image, label) for image, label, _ in samples if image is not None]
    failures = [failure for image, _, failure in samples if image is None]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return images, torch.tensor([label for _, label in readable], dtype=torch.long), failures


class FolderBatches(Batches):
    """Batches of images read from disk; with a seed they are shuffled and the last, smaller one is left out."""

    def __init__(self, dataset: _Images, *, batch_size: int, workers: int, seed: int | None = None):
        batch_size = min(batch_size, len(dataset))
        self.seed = seed
        self.unreadable = {}
        self.order = torch.Generator()
        # Workers start anew for each pass: those kept alive would not be seeded again.
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=seed is not None,
            drop_last=seed is not None,
            num_workers=workers,
            collate_fn=_collate,
            generator=self.order,
            pin_memory=torch.cuda.is_available(),
        )
        self.num_images = len(dataset) if seed is None else len(self.loader) * batch_size

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
            self.unreadable.update(failure.split("\n", 1) for failure in failures)
            found += len(labels)
            yield images, labels
        if not found:
            raise RunError(
                f"none of the {self.num_images} images could be read; {next(iter(self.unreadable.values()))}"
            )


def open_folder(folder: Path) -> FolderData:
    """Return the data set in ``folder``: train/ and val/ with a sub-folder for each class.

    Raises:
        UsageError: a folder is missing or empty, or train/ and val/ have different classes.
    """
    missing = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if missing:
        raise UsageError(f"{folder} has no {' and no '.join(f'{name}/' for name in missing)} folder with a sub-folder "
                         "of images for each class")  # fmt: skip
    classes, train = _scan(folder / "train")
    test_classes, test = _scan(folder / "val")
    if classes != test_classes:
        raise UsageError(
            f"train/ and val/ of {folder} have different class folders: {_difference(classes, test_classes)}"
        )
    return FolderData(folder.resolve().name, classes, train, test)


def open_test_folder(folder: Path) -> FolderData:
    """Return the images of ``folder`` to measure on: those in its val/ if there is one, else its own class folders."""
    classes, test = _scan(folder / "val" if (folder / "val").is_dir() else folder)
    return FolderData(folder.resolve().name, classes, (), test)


def _scan(folder: Path) -> tuple[tuple[str, ...], Labelled]:
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not classes:
        raise UsageError(f"{folder} is empty: it needs a sub-folder of images for each class")
    items = tuple((path, label) for label, name in enumerate(classes) for path in find_images(folder / name))
    empty = sorted(set(range(len(classes))) - {label for _, label in items})
    if empty:
        names = ", ".join(classes[label] for label in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise UsageError(f"{folder} has no images for {len(empty)} of its {len(classes)} classes: {names}")
    return classes, items


def _difference(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    parts = []
    for here, there, name in ((train, val, "train/"), (val, train, "val/")):
        only = [label for label in here if label not in there]
        if only:
            near = difflib.get_close_matches(only[0], [label for label in there if label not in here], 1)
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            parts.append(f"only in {name}: {', '.join(only[:5])}{more}" + (f" (like {near[0]})" if near else ""))
    return "; ".join(parts)
