"""Data sets by name or by path."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from linvision.data.arrays import ArrayData, cifar10, cifar100, digits, fashion_mnist, mnist
from linvision.data.folders import FolderData
from linvision.data.images import MAX_PIXELS
from linvision.data.layouts import open_folder, open_test_folder
from linvision.data.tables import open_table, open_test_table
from linvision.errors import UsageError, nearest, printable

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


def open_data(
    name: str,
    *,
    root: str | Path | None = None,
    val_split: float | None = None,
    cache: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ArrayData | FolderData:
    """Return a data set for training.

    Args:
        name: one of ``DATASETS``, or the path of a folder (``open_folder``) or of a CSV file (``open_table``).
        root: folder of downloaded data.
        val_split: share of each class's images to hold back for validation, by ``split_by_hash``, where the data have
            no validation images of their own.
        cache: folder for resized copies of the training images, which are then read instead.
        max_pixels: larger images are taken for unreadable.

    Raises:
        UsageError: there is no such data set, it is not laid out as one, or an option has no effect on it.
        RunError: it could not be downloaded or read.
    """
    if name in DATASETS:
        for option, value in (("--val-split", val_split), ("--cache", cache)):
            if value is not None:
                raise UsageError(f"{option} {value} is for folders of images and CSV files: {name} does not need it")
        return DATASETS[name](data_root(root))
    path = _existing(name)
    data = (open_folder if path.is_dir() else open_table)(path, val_split=val_split)
    return replace(data, max_pixels=max_pixels, cache=None if cache is None else _writable(cache))


def open_test_data(
    name: str, *, root: str | Path | None = None, val_split: float | None = None, max_pixels: int = MAX_PIXELS
) -> ArrayData | FolderData:
    """Return a data set for measuring alone: one of ``DATASETS``, the images of a folder or those of a CSV file.

    With ``val_split`` they are those that ``open_data`` holds back for validation.
    """
    if name in DATASETS:
        return DATASETS[name](data_root(root))
    if val_split is not None:
        data = open_data(name, val_split=val_split)
        return replace(data, train=(), held_out=(), max_pixels=max_pixels)
    path = _existing(name)
    return replace((open_test_folder if path.is_dir() else open_test_table)(path), max_pixels=max_pixels)


def _existing(name: str) -> Path:
    path, shown = Path(name).expanduser(), printable(name)
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".csv"):
        return path
    if path.exists():
        raise UsageError(f"{shown} is a file: give a folder of images, a CSV file, or one of {', '.join(DATASETS)}")
    near = nearest(name.replace("_", "-"), DATASETS, 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(DATASETS)}"
    raise UsageError(f"no data set and no folder is called {shown}: {hint}")


def _writable(folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--cache {printable(folder)} cannot be a folder of images: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UsageError(f"--cache {printable(folder)} cannot be written to: choose another folder")
    return path
