"""What the commands write: results to stdout, the rest to stderr; bars on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.text import Text

from linvision.errors import printable
from linvision.files import as_json

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 60.0


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
    sys.stdout.write(as_json(content, indent=2) + "\n")


def with_bar(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """Pass the items on, with a progress bar on a terminal, and a line a minute elsewhere."""
    console = notes()
    if not console.is_terminal:
        last = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                console.print(f"{what}: {done} of {total}", markup=False)
            yield item
        return
    yield from track(items, total=total, description=what, console=console, transient=True)


def duration(seconds: float) -> str:
    """Write a time as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
