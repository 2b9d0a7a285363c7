"""From a command's dataclass of options to a parser, and from what a parser says to one line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import yaml

from linvision.commands import COMMANDS
from linvision.errors import UsageError, nearest
from linvision.records import describe, parse_yaml, read_file

NEAR = 0.7  # how similar an option or a command has to be to be guessed at


def parse(command: ModuleType, name: str, arguments: list[str]) -> Any | None:
    """Return a command's options, or None where its help was asked for and shown.

    Raises:
        UsageError: an option does not exist or has a value of another type.
    """
    parser = build_parser(name, command, arguments)
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        return None
    arguments = _checked_flags(parser, name, arguments)
    try:
        namespace = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        reason = _readable(error, get_type_hints(command.Options))
        raise UsageError(f"{reason}; see linvision {name} --help") from error
    return command.Options(**{field.name: namespace[field.name] for field in fields(command.Options)})


def nearest_of(name: str, known: Sequence[str]) -> str:
    """Return ": did you mean ...?", or nothing where no name is near."""
    near = nearest(name, known, 2, cutoff=NEAR)
    return f": did you mean {' or '.join(near)}?" if near else ""


def build_parser(name: str, command: ModuleType, arguments: Sequence[str] = ()) -> jsonargparse.ArgumentParser:
    """Build a command's parser from its dataclass of options; the arguments decide which defaults its help shows."""
    options, positional = command.Options, getattr(command, "POSITIONAL", ())
    parser = jsonargparse.ArgumentParser(
        prog=f"linvision {name}",
        description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.",
        epilog=f"example:\n  {command.EXAMPLE}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        print_config="--print-%s",
    )
    texts, types = _help_texts(options), get_type_hints(options)
    shown = command.shown_defaults(arguments) if hasattr(command, "shown_defaults") else {}
    groups = _groups(parser, getattr(command, "GROUPS", {}))
    for field in sorted(fields(options), key=lambda field: list(groups).index(field.name) if groups else 0):
        default = f" ({shown[field.name]})" if field.name in shown else ""
        target = groups.get(field.name, parser)
        _add_argument(target, field, types[field.name], texts[field.name] + default, field.name in positional)
    if getattr(command, "CONFIG", False):
        jsonargparse.set_loader("yaml", parse_yaml, (yaml.YAMLError,))
        parser.add_argument("--config", action="config", help="read options from this YAML file, such as a run's own")
    return parser


def _help_texts(options: type) -> dict[str, str]:
    """Read what the docstrings of a dataclass and of what it derives from say about each field."""
    documented = [docstring_parser.parse(part.__doc__ or "").params for part in reversed(options.__mro__)]
    return {one.arg_name: " ".join((one.description or "").split()) for params in documented for one in params}


def _groups(parser: jsonargparse.ArgumentParser, names: dict[str, str]) -> dict[str, Any]:
    """Add a command's groups of options, and return the group of each option in the order of the help."""
    if names:
        parser.usage = f"{parser.prog} [options]"
    made = [(parser.add_argument_group(title), options.split()) for title, options in names.items()]
    return {name: group for group, options in made for name in options}


def _add_argument(target: Any, field: Field, kind: Any, help_text: str, positional: bool) -> None:
    flag = f"--{field.name.replace('_', '-')}"
    if field.default is MISSING and field.default_factory is MISSING:
        many = get_origin(kind) is list
        target.add_argument(field.name, type=str if many else kind, nargs="+" if many else None, help=help_text)
    elif positional:
        target.add_argument(field.name, type=kind, nargs="?", default=field.default, help=help_text)
    elif kind is bool:
        target.add_argument(flag, action="store_true", default=field.default, help=help_text)
    else:
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown = f" (default: {default})" if default not in (None, "") else ""
        target.add_argument(flag, type=kind, default=default, help=help_text + shown)


def _checked_flags(parser: jsonargparse.ArgumentParser, name: str, arguments: list[str]) -> list[str]:
    """Take --batch_size for --batch-size, and refuse flags that do not exist."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    checked = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and flag != "--":
            flag = flag.replace("_", "-")
            if flag not in known:
                raise UsageError(f"unknown option {flag}{nearest_of(flag, known)}; see linvision {name} --help")
        checked.append(flag + equals + value)
        if flag == "--config":
            path = Path(value or next(iter(arguments[len(checked) :]), ""))
            if not path.is_file():
                raise UsageError(f"--config {path}: there is no such file")
            read_file(path)
    return checked


def _readable(error: argparse.ArgumentError, types: dict[str, Any]) -> str:
    """Turn jsonargparse's report on a value into one line."""
    text = " ".join(str(error).split())
    report = re.match(r'Parser key "(\w+)":.*(?:Given value|Got value): (.*)', text)
    if report is None:
        return re.sub(r'^Parser key "(\w+)":', r"--\1:", text)
    name, value = report.groups()
    return f"--{name.replace('_', '-')} takes {describe(types[name])}, not {value}"


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's lines, and leaves jsonargparse's notes on types and defaults out."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""
