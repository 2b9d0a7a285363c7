"""Dataclasses read from YAML and JSON, whose files may hold anything."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from linvision.errors import RunError, did_you_mean

Record = TypeVar("Record")
LARGEST = 4 << 20  # bytes of a file, far above those of 22k classes


class PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few nested lines make more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose all but aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: it is no YAML, has aliases or is nested too deeply.
    """
    try:
        return yaml.load(text, PlainLoader)
    except (RecursionError, ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error) or "nested too deeply") from error


def read_file(path: Path) -> Any:
    """Return what a small file holds, JSON by its suffix and YAML otherwise.

    Raises:
        RunError: it is missing, no regular file, too large or damaged.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing or no regular file")
    if path.stat().st_size > LARGEST:
        raise RunError(f"{path} is damaged: it has more than {LARGEST >> 20} MiB")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path} is damaged: {reason}") from error


def read_record(cls: type[Record], content: Any, where: str, error: type[Exception] = RunError) -> Record:
    """Make a dataclass of a mapping; lists become tuples where those are declared, mappings nested dataclasses.

    Raises:
        error: naming ``where``: an unknown key, with the nearest known one, a missing one, a value of another type.
    """
    if not isinstance(content, Mapping):
        raise error(f"{where}: it must hold names and values, not {_shown(content)}")
    types, values = get_type_hints(cls), {}
    for key, value in content.items():
        if key not in types:
            raise error(f"{where}: there is no key {_shown(key)}{did_you_mean(str(key)[:80], types)}")
        if is_dataclass(types[key]):
            values[key] = read_record(types[key], value, f"{where}, {key}", error)
        elif fits(value, types[key]):
            values[key] = tuple(value) if isinstance(value, list) else value
        else:
            hint = " (YAML takes 2e-3 for text: write 2.0e-3)" if isinstance(value, str) and "e" in value else ""
            raise error(f"{where}: {key} takes {describe(types[key])}, not {_shown(value)}{hint}")
    missing = [
        field.name
        for field in fields(cast(Any, cls))
        if field.default is MISSING and field.default_factory is MISSING and field.name not in content
    ]
    if missing:
        raise error(f"{where}: it lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as problem:
        raise error(f"{where}: {problem}") from problem


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value read from a file is of a declared type; lists stand for tuples."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin in (UnionType, Union):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        return len(each) == len(value) and all(map(fits, value, each))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))


def describe(kind: Any) -> str:
    """Say in words what values a type takes."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list"
    plain = next((part for part in get_args(kind) if part is not type(None)), kind)
    words = {int: "a whole number", float: "a number", bool: "true or false", dict: "names and values"}
    return words.get(get_origin(plain) or plain, "text")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
