"""Small data sets that fit into memory: handwritten digits, Fashion-MNIST, MNIST and CIFAR.

The digits are part of scikit-learn. Fashion-MNIST is read from Debian's package dataset-fashion-mnist where that is
installed; it and the others are otherwise downloaded by torchvision into the data folder.
"""

import gzip
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from linvision.data.augment import Augment, Changes
from linvision.data.batches import ArrayBatches
from linvision.data.preprocess import Preprocess
from linvision.errors import RunError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ArrayData:
    """A data set in memory: 8-bit images (N, C, H, W) and labels (N,) for training and test.

    Attributes:
        name: as in ``linvision train --data NAME``.
        classes: the name of each label.
        train: images and labels to learn from.
        test: images and labels to measure on.
        mean: of the training images' channels, in units of [0, 1].
        std: of the training images' channels, in units of [0, 1].
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def grey(self) -> bool:
        """Whether the images have one channel."""
        return self.train[0].shape[1] == 1

    def train_batches(
        self, preprocess: Preprocess, changes: Changes, *, batch_size: int, seed: int, workers: int = 0
    ) -> ArrayBatches:
        """Return shuffled and changed batches; ``workers`` has no part in it, the images being in memory."""
        del workers
        names = (field.name for field in fields(Augment))
        augmentation = Augment(**{name: getattr(changes, name) for name in names})
        return ArrayBatches(
            *self.train,
            preprocess=preprocess,
            batch_size=batch_size,
            augmentation=augmentation,
            seed=seed,
            balanced=changes.balance == "sampling",
        )

    def test_batches(self, preprocess: Preprocess, *, batch_size: int, workers: int = 0) -> ArrayBatches:
        """Return the test images in order."""
        del workers
        return ArrayBatches(*self.test, preprocess=preprocess, batch_size=batch_size)


def digits(root: Path) -> ArrayData:
    """Return scikit-learn's 1797 digits, 8x8 grey: 1437 for training, 360 for test, the same ones every time."""
    del root
    values, target = load_digits(return_X_y=True)
    images = torch.from_numpy((np.asarray(values) * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(np.asarray(target).astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return ArrayData(
        name="digits",
        classes=tuple("0123456789"),
        train=(images[train], labels[train]),
        test=(images[test], labels[test]),
        mean=(0.306,) * 3,
        std=(0.368,) * 3,
    )


def mnist(root: Path) -> ArrayData:
    """Return MNIST, 28x28 grey: 60000 images for training, 10000 for test."""
    return ArrayData(
        name="mnist",
        classes=tuple("0123456789"),
        **_torchvision_splits(torchvision.datasets.MNIST, root),
        mean=(0.1307,) * 3,
        std=(0.3081,) * 3,
    )


def fashion_mnist(root: Path) -> ArrayData:
    """Return Fashion-MNIST (arXiv 1708.07747), 28x28 grey: 60000 images for training, 10000 for test."""
    if DEBIAN_FASHION_MNIST.is_dir():
        splits = {"train": _idx_split(DEBIAN_FASHION_MNIST, "train"), "test": _idx_split(DEBIAN_FASHION_MNIST, "t10k")}
    else:
        splits = _torchvision_splits(torchvision.datasets.FashionMNIST, root)
    return ArrayData(
        name="fashion-mnist",
        classes=FASHION,
        **splits,
        mean=(0.2860,) * 3,
        std=(0.3530,) * 3,
    )


def cifar10(root: Path) -> ArrayData:
    """Return CIFAR-10, 32x32 in colour: 50000 images for training, 10000 for test."""
    return ArrayData(
        name="cifar10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        **_torchvision_splits(torchvision.datasets.CIFAR10, root),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def cifar100(root: Path) -> ArrayData:
    """Return CIFAR-100, 32x32 in colour: 50000 images for training, 10000 for test."""
    splits = _torchvision_splits(torchvision.datasets.CIFAR100, root)
    return ArrayData(
        name="cifar100",
        classes=tuple(torchvision.datasets.CIFAR100(root, train=False).classes),
        **splits,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )


def read_idx(path: Path) -> Tensor:
    """Return the 8-bit tensor in an idx file, compressed (.gz) or not.

    Raises:
        RunError: the file is missing, damaged or holds other than 8-bit values.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    rank = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[4 * n : 4 * n + 4], "big") for n in range(1, rank + 1)]
    values = np.frombuffer(content, dtype=np.uint8, offset=min(len(content), 4 + 4 * rank))
    if not rank or values.size != np.prod(shape):
        raise RunError(f"cannot read {path}: not an idx file of 8-bit values, or cut short")
    return torch.from_numpy(values.reshape(shape).copy())


def _idx_split(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    def read(kind: str) -> Tensor:
        plain = folder / f"{prefix}-{kind}-ubyte"
        return read_idx(plain if plain.exists() else plain.with_name(f"{plain.name}.gz"))

    return read("images-idx3")[:, None], read("labels-idx1").long()


def _torchvision_splits(dataset_class: type, root: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Load both splits of one of torchvision's data sets, downloading them where they are not in ``root``."""
    splits = {}
    for split in ("train", "test"):
        try:
            dataset = dataset_class(os.fspath(root), train=split == "train", download=True)
        except (OSError, RuntimeError, EOFError) as error:
            raise RunError(
                f"cannot get {dataset_class.__name__}: {str(error).splitlines()[0].rstrip(':')}; without a network, "
                f"put torchvision's files for it into {root}"
            ) from error
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        splits[split] = (images, torch.as_tensor(dataset.targets, dtype=torch.long))
    return splits
