"""Data sets in a CSV file of paths and labels."""

import csv
from pathlib import Path
from typing import NamedTuple

from linvision.data.folders import FolderData, Labelled
from linvision.data.labels import match_names
from linvision.data.splits import SPLIT_ADVICE, TEST, TRAIN, VALIDATION, split_by_hash
from linvision.errors import RunError, UsageError, printable

HEADER = "a header path,label or image,label, and a column split if some images are for validation or test"


class Row(NamedTuple):
    """A line of the table; ``split`` is one of the lists of names, or None without such a column."""

    path: Path
    label: str
    split: tuple[str, ...] | None


def open_table(path: Path, *, val_split: float | None = None) -> FolderData:
    """Return the data set in a CSV file, for training.

    The columns are ``path`` (or ``image``), relative to the file's folder, ``label`` and ``split``: train, val or test.
    Without that column ``val_split`` says how many images are for validation (``split_by_hash``).

    Raises:
        UsageError: a column is missing, or there are no images to train or to validate on.
        RunError: the file cannot be read.
    """
    rows = _read(path)
    train = [row for row in rows if row.split in (None, TRAIN)]
    validation = [row for row in rows if row.split is VALIDATION]
    shown = printable(path)
    if not train:
        raise UsageError(f"{shown} has no images to train on: none of its lines has the split train")
    if validation and val_split is not None:
        raise UsageError(f"{shown} says which images are for validation: leave out --val-split {val_split}")
    if not validation and val_split is None:
        raise UsageError(f"{shown} has no images for validation: mark them by val in a column split, or {SPLIT_ADVICE}")
    classes = tuple(sorted({row.label for row in train}))
    items = _labelled(train, classes, path)
    if val_split is None:
        test = _labelled(validation, classes, path)
    else:
        items, test = split_by_hash(items, val_split, folder=path.parent)
    held_out = _labelled([row for row in rows if row.split is TEST], classes, path)
    return FolderData(printable(path.stem), classes, items, test, held_out)


def open_test_table(path: Path) -> FolderData:
    """Return the images of a CSV file to measure on: those marked val, else test, else all if there are no marks."""
    rows = _read(path)
    chosen = next((of for split in (VALIDATION, TEST, None) if (of := [row for row in rows if row.split == split])), [])
    if not chosen:
        raise UsageError(f"{printable(path)} has no images to measure on: all of its lines have the split train")
    classes = tuple(sorted({row.label for row in chosen}))
    return FolderData(printable(path.stem), classes, (), _labelled(chosen, classes, path))


def _labelled(rows: list[Row], classes: tuple[str, ...], where: Path) -> Labelled:
    places = match_names(sorted({row.label for row in rows}), classes)
    unknown = sorted({row.label for row in rows} - places.keys())
    if unknown:
        raise UsageError(f"{printable(where)} has labels outside of its training images: {', '.join(unknown[:5])}")
    return tuple((row.path, places[row.label]) for row in rows)


def _read(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = list(csv.reader(file))
    except (OSError, csv.Error) as error:
        raise RunError(f"cannot read {printable(path)}: {error}") from error
    header = [name.strip().lower() for name in lines[0]] if lines else []
    place = next((header.index(name) for name in ("path", "image") if name in header), None)
    if place is None or "label" not in header:
        raise UsageError(f"{printable(path)} starts with {printable(','.join(header)) or 'nothing'}: it needs {HEADER}")
    label, split = header.index("label"), header.index("split") if "split" in header else None
    rows = [_row(line, place, label, split, path, number) for number, line in enumerate(lines[1:], 2) if any(line)]
    if not rows:
        raise UsageError(f"{printable(path)} is empty: it has no line after its header")
    return rows


def _row(line: list[str], place: int, label: int, split: int | None, path: Path, number: int) -> Row:
    where = f"line {number} of {printable(path)}"
    cells = [cell.strip() for cell in line] + [""] * 3
    wanted = [place, label] + ([] if split is None else [split])
    if max(wanted) >= len(line) or not all(cells[index] for index in wanted):
        raise UsageError(f"{where} is incomplete: it needs a path, a label and, if there is that column, a split")
    names = None
    if split is not None:
        names = next((names for names in (TRAIN, VALIDATION, TEST) if cells[split].lower() in names), None)
        if names is None:
            raise UsageError(f"{where} has the split {printable(cells[split])}: it must be train, val or test")
    return Row(path.parent / cells[place], printable(cells[label]), names)
