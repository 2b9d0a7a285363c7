"""What the commands write: results to stdout, the rest to stderr; bars on a terminal, plain lines elsewhere."""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

from linvision.errors import printable

Item = TypeVar("Item")


class _Console(Console):
    """Shows control characters, and what the stream's encoding lacks, as escapes: they come with names of files."""

    def render_str(self, text: str, **style: Any) -> Text:
        """Make rich's text of a string."""
        text = printable(text, keep="\n").encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(text, **style)


def output() -> Console:
    """Return the console of results. Away from a terminal nothing is cut or folded to a screen's width."""
    return _Console(width=None if sys.stdout.isatty() else 1000, highlight=False, soft_wrap=not sys.stdout.isatty())


def notes() -> Console:
    """Return the console of progress and warnings, which leaves stdout to the results."""
    return _Console(stderr=True, highlight=False, soft_wrap=True)


def write_json(content: Any) -> None:
    r"""Write a result for another program to read; bytes of names that are no UTF-8 as ``\udce9``."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def with_bar(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass the items on, with a progress bar on a terminal."""
    console = notes()
    if not console.is_terminal:
        yield from items
        return
    yield from track(items, total=total, description=what, console=console, transient=True)


def duration(seconds: float) -> str:
    """Write a time as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
