"""Splits of a data set: what they are called, and validation images held back by a rule."""

import hashlib
import os
from pathlib import Path

from linvision.data.folders import Labelled
from linvision.errors import UsageError

TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
SPLIT_ADVICE = "hold a fifth of each class back for validation with --val-split 0.2"


def split_by_hash(items: Labelled, share: float, *, folder: Path) -> tuple[Labelled, Labelled]:
    """Split labelled images into those for training and about ``share`` of each class for validation.

    An image is for validation if the first 8 bytes of the SHA-256 of its path below ``folder`` (such as
    ``cat/001.jpg``), as a fraction of 2^64, are below ``share``. So it stays on its side when other images are added or
    the folder is moved. Where that would leave a class of two images or more without any on a side, the image with the
    smallest, or largest, fraction goes there.

    Raises:
        UsageError: ``share`` is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise UsageError(f"--val-split {share} is out of range: it must be above 0 and below 1, such as 0.2")

    def fraction(item: tuple[Path, int]) -> float:
        path = item[0].relative_to(folder) if item[0].is_relative_to(folder) else item[0]
        return int.from_bytes(hashlib.sha256(os.fsencode(path.as_posix())).digest()[:8], "big") / 2**64

    fractions = {item: fraction(item) for item in items}
    of_class: dict[int, list[tuple[Path, int]]] = {}
    for item in sorted(items, key=fractions.__getitem__):
        of_class.setdefault(item[1], []).append(item)
    chosen = set()
    for members in of_class.values():
        below = sum(fractions[item] < share for item in members)
        chosen.update(members[: min(max(below, 1), len(members) - 1)])
    train = tuple(item for item in items if item not in chosen)
    return train, tuple(item for item in items if item in chosen)
