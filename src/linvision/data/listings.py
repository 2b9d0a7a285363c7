"""Lists of labels that come with ImageNet's validation images, which lie in one folder without class folders."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from linvision.data.folders import Labelled
from linvision.data.images import find_images
from linvision.errors import RunError, UsageError, printable

NAMES, NUMBERS = "val.txt", "ILSVRC2012_validation_ground_truth.txt"
KIT = "ILSVRC2012_devkit_t12/data"


def read_listing(folder: Path) -> tuple[tuple[str, ...], Labelled] | None:
    """Return classes and labelled images of a folder by a list that lies in or beside it; None where there is none.

    ``val.txt`` has lines of a file's name and its class, a number from 0 or a WordNet identifier.
    ``ILSVRC2012_validation_ground_truth.txt`` has the number of each image in order, by the numbers of ``meta.mat``
    beside it, as in ILSVRC2012_devkit_t12/data.

    Raises:
        UsageError: the list is not one of these images.
        RunError: it is damaged.
    """
    images = list(find_images(folder))
    if not images:
        return None
    for path in _places(folder, NAMES):
        return _by_name(images, _read_names(path), path)
    for path in _places(folder, NUMBERS):
        numbers = [line for line in _lines(path) if line]
        if len(numbers) != len(images):
            raise UsageError(f"{printable(path)} has {len(numbers)} labels for the {len(images)} images in "
                             f"{printable(folder)}")  # fmt: skip
        identifiers = _identifiers(path.with_name("meta.mat"))
        if not identifiers.keys() >= set(numbers):
            raise RunError(f"{printable(path)} is damaged: not all of its lines are numbers of meta.mat")
        names = {image.name: identifiers[number] for image, number in zip(images, numbers, strict=True)}
        return _by_name(images, names, path)
    return None


def _places(folder: Path, name: str) -> Iterator[Path]:
    for place in (folder, folder.parent, folder / KIT, folder.parent / KIT):
        if (place / name).is_file():
            yield place / name


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    except OSError as error:
        raise RunError(f"cannot read {printable(path)}: {error}") from error


def _read_names(path: Path) -> dict[str, str]:
    lines = [line.rsplit(maxsplit=1) for line in _lines(path) if line]
    if not all(len(line) == 2 for line in lines):
        raise UsageError(f"{printable(path)} does not list images: its lines must be a file's name and its class")
    return {Path(name).name: label for name, label in lines}


def _by_name(images: list[Path], names: dict[str, str], where: Path) -> tuple[tuple[str, ...], Labelled]:
    missing = [image.name for image in images if image.name not in names]
    if missing:
        raise UsageError(f"{printable(where)} has no label for {len(missing)} of {len(images)} images: "
                         f"{', '.join(map(printable, missing[:3]))}")  # fmt: skip
    known = ImageNetInfo().label_names()
    identifiers = {key: one for number, one in enumerate(known) for key in (str(number), one)}
    unknown = sorted({names[image.name] for image in images} - identifiers.keys())
    if unknown:
        raise UsageError(f"{printable(where)} has the class {printable(unknown[0])}: it must be a number from 0 to "
                         f"{len(known) - 1} or a WordNet identifier such as {known[0]}")  # fmt: skip
    of_images = [identifiers[names[image.name]] for image in images]
    classes = sorted(set(of_images))
    labels = {identifier: label for label, identifier in enumerate(classes)}
    return tuple(classes), tuple((image, labels[one]) for image, one in zip(images, of_images, strict=True))


def _identifiers(path: Path) -> dict[str, str]:
    """Return the WordNet identifier of each number in the development kit's table of classes."""
    from scipy.io import loadmat  # comes with scikit-learn; slow to import

    if not path.is_file():
        raise UsageError(f"{NUMBERS} needs meta.mat of the development kit beside it, or give a val.txt with lines of "
                         "a file's name and its class")  # fmt: skip
    try:
        synsets: Any = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(one["ILSVRC2012_ID"])): str(one["WNID"]) for one in synsets}
    except (OSError, ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise RunError(f"cannot read {printable(path)}: {error}") from error
