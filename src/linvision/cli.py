"""The command line: ``linvision COMMAND ...``, of the commands in ``linvision.commands``.

Help needs no torch, which commands import when work begins. A user's mistake is answered with one line on stderr and
exit code 2, a failure on the way with exit code 1; LINVISION_TRACEBACK=1 shows where either came from.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from linvision import __version__
from linvision.commands import COMMANDS
from linvision.errors import BackendError, RunError, UsageError, exit_code, printable

# What the extra "train" brings.
EXTRA = {
    "docstring_parser",
    "jsonargparse",
    "matplotlib",
    "pytorch_lightning",
    "rich",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "yaml",
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
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.stderr.write(f"linvision: error: commands need {error.name}: pip install 'linvision[train]'\n")
        return 1
    except _failures() as error:
        if os.environ.get("LINVISION_TRACEBACK"):
            raise
        message = printable(" ".join(str(error).split())) or type(error).__name__
        sys.stderr.write(f"linvision: error: {message}\n")
        return exit_code(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        sys.stdout.write(f"linvision {__version__}\n")
        return 0
    from linvision.commands.parser import nearest_of, parse

    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        raise UsageError(
            f"unknown {kind} {name}{nearest_of(name, list(COMMANDS))}; linvision --help lists the commands"
        )
    command = import_module(f"linvision.commands.{name}")
    options = parse(command, name, rest)
    return 0 if options is None else command.run(options)


def _overview() -> str:
    lines = [f"  {name:<10}{summary}" for name, summary in COMMANDS.items()]
    return (
        "usage: linvision COMMAND ...\n\nLinear-time vision backbones: train, measure and use them.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n  linvision COMMAND --help    the options of a command, with an example\n"
        "  linvision --version\n\nexample:\n  linvision train --data digits\n"
    )


def _failures() -> tuple[type[BaseException], ...]:
    """Return the errors that are answered with one line."""
    torch = sys.modules.get("torch")
    own = (ValueError, OSError, RunError, BackendError, MemoryError)
    return own if torch is None else (*own, torch.OutOfMemoryError)


if __name__ == "__main__":
    sys.exit(main())
