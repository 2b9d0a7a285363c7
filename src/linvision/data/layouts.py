"""How data sets lie in folders: train/ and val/ with a folder of images for each class, or class folders alone."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from linvision.data.folders import FolderData, Labelled
from linvision.data.images import find_images
from linvision.data.labels import match_names
from linvision.data.listings import read_listing
from linvision.data.splits import SPLIT_ADVICE, TEST, TRAIN, VALIDATION, split_by_hash
from linvision.errors import UsageError, printable


def open_folder(folder: Path, *, val_split: float | None = None) -> FolderData:
    """Return the data set in ``folder``, for training.

    It has a train/ and a val/ (valid/, validation/) folder, each with a sub-folder of images for each class, and may
    have a test/ folder of the same kind. With ``val_split`` the class folders lie in train/ or in ``folder`` itself.

    Raises:
        UsageError: a folder is missing or empty, or train/ and val/ have different classes.
    """
    train_folder, val_folder, test_folder = (_first(folder, names) for names in (TRAIN, VALIDATION, TEST))
    name = printable(folder.resolve().name)
    if val_split is not None:
        if val_folder is not None:
            raise UsageError(f"{printable(val_folder)} holds the validation images: leave out --val-split {val_split}")
        classes, items = _scan(train_folder or folder)
        train, test = split_by_hash(items, val_split, folder=train_folder or folder)
    else:
        if train_folder is None or val_folder is None:
            raise UsageError(_what_is_missing(folder, train_folder, val_folder))
        classes, train = _scan(train_folder)
        test = _same_classes(classes, *_scan(val_folder), folder)
    held_out = () if train_folder is None or test_folder is None else _among(classes, test_folder)
    return FolderData(name, classes, train, test, held_out)


def open_test_folder(folder: Path) -> FolderData:
    """Return the images of ``folder`` to measure on: those in its val/ or test/ if there is one, else its own.

    Images without class folders are taken where a list of their labels lies in the folder or beside it
    (``read_listing``).

    Raises:
        UsageError: there are no images, or no labels of them.
    """
    place = _first(folder, VALIDATION) or _first(folder, TEST)
    train_folder = _first(folder, TRAIN)
    if place is None and train_folder is not None:
        raise UsageError(f"{printable(folder)} has no val/ folder to measure on: name the images to measure, such as "
                         f"{printable(train_folder)}")  # fmt: skip
    place = place or folder
    classes, test = (read_listing(place) if not _class_folders(place) else None) or _scan(place)
    return FolderData(printable(folder.resolve().name), classes, (), test)


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder``, but for hidden ones and links to where it lies itself."""
    here = folder.resolve()
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in folders if not (path.is_symlink() and here.is_relative_to(path.resolve())))


def _scan(folder: Path, *, empty_classes: bool = False) -> tuple[tuple[str, ...], Labelled]:
    folders = _class_folders(folder)
    if not folders:
        raise UsageError(_no_class_folders(folder))
    classes = tuple(printable(path.name) for path in folders)
    items = tuple((path, label) for label, place in enumerate(folders) for path in find_images(place))
    empty = sorted(set(range(len(classes))) - {label for _, label in items})
    if empty and not empty_classes:
        names = ", ".join(classes[label] for label in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise UsageError(f"{printable(folder)} has no images for {len(empty)} of its {len(classes)} classes: {names}")
    return classes, items


def _no_class_folders(folder: Path) -> str:
    images = sum(1 for _ in find_images(folder))
    if not images:
        return f"{printable(folder)} is empty: it needs a sub-folder of images for each class"
    return (
        f"{printable(folder)} has {images} images but no class folders: put the images of each class into a folder of "
        "its own, or give a CSV file with the columns path and label instead"
    )


def _what_is_missing(folder: Path, train: Path | None, val: Path | None) -> str:
    shown = printable(folder)
    if train is not None:
        return f"{shown} has no val/ folder with a sub-folder of images for each class: add one, or {SPLIT_ADVICE}"
    own = [] if val is not None else _class_folders(folder)
    if not own and val is None and any(find_images(folder)):
        return _no_class_folders(folder)
    lacks = "no train/" if val is not None else "no train/ and no val/"
    line = f"{shown} has {lacks} folder with a sub-folder of images for each class"
    if not own:
        return line
    names = ", ".join(printable(path.name) for path in own[:3]) + (", ..." if len(own) > 3 else "")
    return f"{line}: if its {len(own)} folders ({names}) are the classes, {SPLIT_ADVICE}"


def _same_classes(classes: tuple[str, ...], found: tuple[str, ...], items: Labelled, folder: Path) -> Labelled:
    """Return the items with the labels of ``classes``; UsageError unless those found are the same."""
    places = match_names(found, classes)
    if len(places) < len(found) or len(found) < len(classes):
        difference = _difference(classes, found)
        raise UsageError(f"train/ and val/ of {printable(folder)} have different class folders: {difference}")
    return tuple((path, places[found[label]]) for path, label in items)


def _among(classes: tuple[str, ...], test_folder: Path) -> Labelled:
    """Return the images of a test/ folder; none where its folders, if any, are no classes at all."""
    if not _class_folders(test_folder):
        return ()
    found, items = _scan(test_folder, empty_classes=True)
    places = match_names(found, classes)
    unknown = [name for name in found if name not in places]
    if places and unknown:
        names = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise UsageError(f"{printable(test_folder)} has class folders that train/ lacks: {names}")
    return tuple((path, places[found[label]]) for path, label in items if places)


def _difference(train: tuple[str, ...], val: tuple[str, ...]) -> str:
    parts = []
    matched = match_names(val, train)
    only_train = [name for place, name in enumerate(train) if place not in matched.values()]
    only_val = [name for name in val if name not in matched]
    for only, others, name in ((only_train, only_val, "train/"), (only_val, only_train, "val/")):
        if only:
            near = difflib.get_close_matches(only[0], others, 1)
            more = f" and {len(only) - 5} more" if len(only) > 5 else ""
            parts.append(f"only in {name}: {', '.join(only[:5])}{more}" + (f" (like {near[0]})" if near else ""))
    return "; ".join(parts)
