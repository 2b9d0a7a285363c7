"""Which output of a model a class of a data set is."""

import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

import torch
from torch import Tensor

from linvision.data.labels import match_names
from linvision.errors import UsageError
from linvision.training.opened import Opened


def match_labels(classes: tuple[str, ...], opened: Opened, name: str) -> Tensor:
    """Return the model's output for each class of the data.

    They are told by equal names, as far as case, spaces, underscores and dashes go: by the model's labels, such as
    WordNet identifiers, also at the start of a name (n01440764_tench), by titles ("tench, Tinca tinca"), or by one of
    a title's names that no other title has. For published weights as many numbers as there are outputs will do, from 0
    or from 1; and where the model has no names for its outputs, as many classes in order.

    Raises:
        UsageError: the classes are not among the model's.
    """
    places = match_names(classes, opened.labels)
    identifiers = {one: match[0] for one in classes if (match := re.match(r"n\d{8}(?!\d)", one))}
    by_identifier = match_names(tuple(identifiers.values()), opened.labels)
    places |= {one: by_identifier[found] for one, found in identifiers.items() if found in by_identifier}
    if opened.titles != opened.labels:
        names, outputs = _names(opened.titles)
        for known, of in ((opened.titles, range(len(opened.titles))), (names, outputs)):
            rest = [one for one in classes if one not in places]
            places |= {one: of[place] for one, place in match_names(rest, known).items()}
    if len(places) < len(classes) == len(opened.labels) and not opened.data:
        in_order = {one: place for place, one in enumerate(classes)} if _nameless(opened) else places
        places = _by_number(classes) or in_order
    unknown = [one for one in classes if one not in places]
    if unknown:
        raise UsageError(_unknown(unknown, classes, opened, name))
    return torch.tensor([places[one] for one in classes])


def imagenet_part(label_map: Tensor, opened: Opened) -> str:
    """Say whether these outputs of a model of ImageNet's classes are those of ImageNet-A or -R; "" if not.

    These sets (arXiv 1907.07174, 2006.16241) have images of 200 of the classes, among which alone models are ranked.
    """
    found = {opened.labels[output] for output in label_map.tolist()}
    if opened.data or len(found) == len(opened.labels):
        return ""
    lists = {name: files("timm.data") / "_info" / f"imagenet_{name}_synsets.txt" for name in ("a", "r")}
    same = (name for name, path in lists.items() if path.is_file() and found == set(path.read_text().split()))
    return next((f"ImageNet-{name.upper()}" for name in same), "")


def unique(titles: Sequence[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return titles, those that several outputs share with the label behind: "crane (n02012849)"."""
    counts = Counter(titles)
    return tuple(
        f"{title} ({label})" if counts[title] > 1 else title for title, label in zip(titles, labels, strict=True)
    )


def _names(titles: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Return the names in all titles and the output of each; those in several titles are left out."""
    pairs = [(part.strip(), output) for output, title in enumerate(titles) for part in title.split(",")]
    counts = Counter(name.casefold() for name, _ in pairs)
    own = [(name, output) for name, output in pairs if counts[name.casefold()] == 1]
    return [name for name, _ in own], [output for _, output in own]


def _by_number(classes: tuple[str, ...]) -> dict[str, int]:
    """Return the outputs of classes called 0, 1, ... or 1, 2, ..., with or without leading zeros."""
    if not all(one.isascii() and one.isdigit() for one in classes):
        return {}
    numbers = {one: int(one) for one in classes}
    first = min(numbers.values())
    if first > 1 or sorted(numbers.values()) != list(range(first, first + len(classes))):
        return {}
    return {one: number - first for one, number in numbers.items()}


def _nameless(opened: Opened) -> bool:
    return all(re.fullmatch(r"(class|output) \d+", label) for label in opened.labels)


def _unknown(unknown: list[str], classes: tuple[str, ...], opened: Opened, name: str) -> str:
    shown = f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}"
    line = (
        f"{name} has {len(classes)} classes but {opened.name} tells {len(opened.labels)} others apart: "
        f"it does not know {shown}; its first is {opened.labels[0]}"
    )
    if opened.titles != opened.labels:
        line += f" ({opened.titles[0]})"
        several = [
            label
            for label, title in zip(opened.labels, opened.titles, strict=True)
            if unknown[0].casefold() in (part.strip().casefold() for part in re.sub(r" \(.*\)", "", title).split(","))
        ]
        if len(several) > 1:
            line += f"; {unknown[0]} may be {' or '.join(several)}"
    return line
