"""Data sets by name or by path."""

import os
from collections.abc import Callable
from pathlib import Path

from linvision.data.arrays import ArrayData, cifar10, cifar100, digits, fashion_mnist, mnist
from linvision.data.folders import FolderData, open_folder, open_test_folder
from linvision.errors import UsageError, nearest

DATASETS: dict[str, Callable[[Path], ArrayData]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of downloaded data: ``root``, else $LINVISION_DATA, else ~/.cache/linvision."""
    return Path(root or os.environ.get("LINVISION_DATA") or "~/.cache/linvision").expanduser()


def open_data(name: str, *, root: str | Path | None = None) -> ArrayData | FolderData:
    """Return the data set called ``name``, or the one in the folder of that path, for training.

    Raises:
        UsageError: there is neither, or the folder is not laid out as one.
        RunError: it could not be downloaded or read.
    """
    if name in DATASETS:
        return DATASETS[name](data_root(root))
    return open_folder(_existing(name))


def open_test_data(name: str, *, root: str | Path | None = None) -> ArrayData | FolderData:
    """Return the data set called ``name``, or the images in the folder of that path, for measuring alone."""
    if name in DATASETS:
        return DATASETS[name](data_root(root))
    return open_test_folder(_existing(name))


def _existing(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UsageError(f"{name} is a file: give a folder of images, or one of {', '.join(DATASETS)}")
    near = nearest(name.replace("_", "-"), DATASETS, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(DATASETS)}"
    raise UsageError(f"no data set and no folder is called {name}: {hint}")
