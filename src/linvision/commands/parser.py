"""From a command's dataclass of options to a parser, and from what a parser says to one line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from linvision.commands import COMMANDS
from linvision.errors import UsageError, nearest

NEAR = 0.7  # how similar an option or a command has to be to be guessed at


def parse(command: ModuleType, name: str, arguments: list[str]) -> Any | None:
    """Return a command's options, or None where its help was asked for and shown.

    Raises:
        UsageError: an option does not exist or has a value of another type.
    """
    parser = build_parser(name, command)
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


def build_parser(name: str, command: ModuleType) -> jsonargparse.ArgumentParser:
    """Build a command's parser from the dataclass of its options."""
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
    texts = {parameter.arg_name: parameter.description for parameter in docstring_parser.parse(options.__doc__).params}
    types = get_type_hints(options)
    for field in fields(options):
        help_text = " ".join((texts.get(field.name) or "").split())
        _add_argument(parser, field, types[field.name], help_text, field.name in positional)
    if getattr(command, "CONFIG", False):
        parser.add_argument("--config", action="config", help="read options from this YAML file, such as a run's own")
    return parser


def _add_argument(
    parser: jsonargparse.ArgumentParser, field: Field, kind: Any, help_text: str, positional: bool
) -> None:
    flag = f"--{field.name.replace('_', '-')}"
    if field.default is MISSING and field.default_factory is MISSING:
        many = get_origin(kind) is list
        parser.add_argument(field.name, type=str if many else kind, nargs="+" if many else None, help=help_text)
    elif positional:
        parser.add_argument(field.name, type=kind, nargs="?", default=field.default, help=help_text)
    elif kind is bool:
        parser.add_argument(flag, action="store_true", default=field.default, help=help_text)
    else:
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown = f" (default: {default})" if default not in (None, "") else ""
        parser.add_argument(flag, type=kind, default=default, help=help_text + shown)


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
    return checked


def _readable(error: argparse.ArgumentError, types: dict[str, Any]) -> str:
    """Turn jsonargparse's report on a value into one line."""
    text = " ".join(str(error).split())
    report = re.match(r'Parser key "(\w+)":.*(?:Given value|Got value): (.*)', text)
    if report is None:
        return re.sub(r'^Parser key "(\w+)":', r"--\1:", text)
    name, value = report.groups()
    return f"--{name.replace('_', '-')} takes {_describe(types[name])}, not {value}"


def _describe(kind: Any) -> str:
    """Say what values an option takes."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    plain = next((part for part in get_args(kind) if part is not type(None)), kind)
    return {int: "a whole number", float: "a number"}.get(plain, "text")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's lines, and leaves jsonargparse's notes on types and defaults out."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""
