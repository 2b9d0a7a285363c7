"""The command line: ``linvision COMMAND ...``.

A command is a dataclass of options, whose docstring holds the help texts, and a function that takes one and returns the
exit code. A user's mistake is answered with one line on stderr and exit code 2, a failure on the way with exit code 1;
LINVISION_TRACEBACK=1 shows where either came from.
"""

import argparse
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from linvision.errors import BackendError, RunError, UsageError, exit_code, nearest


@dataclass(frozen=True)
class Command:
    """One command; its modules are imported when it is called.

    Attributes:
        options: where the dataclass of its options is, as "module:name". A field without a default is a positional
            argument.
        function: where the function is that takes such options and returns the exit code.
        summary: what it does, for the list of commands.
        example: shown by --help.
        positional: fields with a default that are positional arguments nevertheless.
        config: whether --config FILE reads options from YAML.
    """

    options: str
    function: str
    summary: str
    example: str
    positional: tuple[str, ...] = ()
    config: bool = False


COMMANDS = {
    "models": Command(
        "linvision.tasks.listing:ModelsOptions",
        "linvision.tasks.listing:models",
        "list models with their size, cost and published accuracy",
        'linvision models "vil2*"',
        positional=("pattern",),
    ),
    "train": Command(
        "linvision.tasks.options:TrainOptions",
        "linvision.tasks.train:train",
        "train a classifier",
        "linvision train --data digits\n  linvision train --model vil2-tiny --pretrained --data photos/ --epochs 20 "
        "--lr 1e-4\n  linvision train --resume runs/vil2_mini_patch4_32-digits-1",
        config=True,
    ),
    "eval": Command(
        "linvision.tasks.evaluate:EvalOptions",
        "linvision.tasks.evaluate:evaluate",
        "measure the accuracy of a run or of published weights",
        "linvision eval --model runs/vil2_mini_patch4_32-digits-1 --by-class\n"
        "  linvision eval --model vil2-tiny --data imagenet/",
    ),
    "predict": Command(
        "linvision.tasks.predict:PredictOptions",
        "linvision.tasks.predict:predict",
        "classify images",
        'linvision predict --model vil2-tiny cat.jpg "holiday/**/*.png"',
    ),
    "convert": Command(
        "linvision.tasks.convert:ConvertOptions",
        "linvision.tasks.convert:convert",
        "turn released files into safetensors and back",
        "linvision convert vil2_tiny16_e800_in1k.th vil2_tiny.safetensors\n"
        "  linvision convert vil2_tiny.safetensors vil2_tiny.th --model vil2-tiny",
    ),
    "bench": Command(
        "linvision.bench:BenchOptions",
        "linvision.bench:bench",
        "measure time and memory beside DeiT",
        "linvision bench --models vil2-tiny,vim_tiny_patch16_224 --sizes 224,512,1248 --out bench\n"
        "  linvision bench --op mlstm --modes inference,training",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone; a second failure when Python flushes at exit would be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        ValueError,
        OSError,
        RunError,
        BackendError,
        MemoryError,
        argparse.ArgumentError,
        _out_of_memory(),
    ) as error:
        if os.environ.get("LINVISION_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"linvision: error: {message}\n")
        return exit_code(error)


def build_parser(name: str, command: Command) -> jsonargparse.ArgumentParser:
    """Build a command's parser from the dataclass of its options."""
    options = pkgutil.resolve_name(command.options)
    parser = jsonargparse.ArgumentParser(
        prog=f"linvision {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"example:\n  {command.example}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
        print_config="--print-%s",
    )
    texts = {parameter.arg_name: parameter.description for parameter in docstring_parser.parse(options.__doc__).params}
    types = get_type_hints(options)
    for field in fields(options):
        help_text = " ".join((texts.get(field.name) or "").split())
        _add_argument(parser, field, types[field.name], help_text, field.name in command.positional)
    if command.config:
        parser.add_argument("--config", action="config", help="read options from this YAML file, such as a run's own")
    return parser


def _add_argument(
    parser: jsonargparse.ArgumentParser, field: Field, kind: Any, help_text: str, positional: bool
) -> None:
    help_text = help_text.replace("%", "%%")
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


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from linvision import __version__

        sys.stdout.write(f"linvision {__version__}\n")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name}{_nearest(name, COMMANDS)}; linvision --help lists the commands")
    command = COMMANDS[name]
    options = pkgutil.resolve_name(command.options)
    parser = build_parser(name, command)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        return 0
    rest = _checked_flags(parser, name, rest)
    try:
        namespace = parser.parse_args(rest)
    except argparse.ArgumentError as error:
        reason = _readable(error, get_type_hints(options))
        raise UsageError(f"{reason}; see linvision {name} --help") from error
    values = {field.name: namespace[field.name] for field in fields(options)}
    function: Callable[[Any], int] = pkgutil.resolve_name(command.function)
    return function(options(**values))


def _checked_flags(parser: jsonargparse.ArgumentParser, name: str, arguments: list[str]) -> list[str]:
    """Take --batch_size for --batch-size, and refuse flags that do not exist."""
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    checked = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and flag != "--":
            flag = flag.replace("_", "-")
            if flag not in known:
                raise UsageError(f"unknown option {flag}{_nearest(flag, known)}; see linvision {name} --help")
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


def _overview() -> str:
    lines = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: linvision COMMAND ...\n\nLinear-time vision backbones: train, measure and use them.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n  linvision COMMAND --help    the options of a command, with an example\n"
        "  linvision --version\n\nexample:\n  linvision train --data digits\n"
    )


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = nearest(name, known, 2)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _out_of_memory() -> type[BaseException]:
    import torch

    return torch.OutOfMemoryError


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's lines, and leaves jsonargparse's notes on types and defaults out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or ""
