"""Every error class of the package, each with the exit code of a command that ends by it; near misses and odd names.

A user's mistake, which another request would mend, ends with 2; a sound request that failed on the way with 1.
"""

import difflib
import re
from collections.abc import Iterable, Sequence


class UsageError(ValueError):
    """A request that cannot be met as it was put, so that the caller must change it."""

    exit_code = 2


class UnknownNameError(ValueError):
    """A model, data set or other thing that does not exist was named."""

    exit_code = 2


class UnknownOptionError(TypeError, ValueError):
    """An option that does not exist was given."""

    exit_code = 2


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""

    exit_code = 2


class RunError(RuntimeError):
    """A sound request that failed on the way, by a file, the network or the numbers."""

    exit_code = 1


class WorkerError(RunError):
    """A process that works for this one was killed."""


class UnreadableImageError(RunError):
    """A file that is missing, truncated or no image."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model."""

    exit_code = 1


class DownloadError(OSError):
    """Published weights that could not be fetched."""

    exit_code = 1


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends by this error."""
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)


def nearest(name: str, names: Iterable[str], n: int = 3, *, cutoff: float = 0.5) -> list[str]:
    """Return up to ``n`` of ``names`` that resemble ``name``, by a similarity of ``cutoff`` at least, best first."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=cutoff)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean a, b or c?", or nothing where no name comes near."""
    return suggestion(nearest(name, names))


def suggestion(near: Sequence[str]) -> str:
    """Return "; did you mean a, b or c?" for names that come near, or nothing without any."""
    if not near:
        return ""
    return f"; did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?"


# Control characters, what turns the direction of writing, and the bytes of names that are no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(name: object, *, keep: str = "") -> str:
    r"""Return a name or path with what harms terminals and files written as ``\x1b`` or ``\u202e``; ``keep`` stays."""

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        code = ord(character)
        code -= 0xDC00 * (0xDC80 <= code <= 0xDCFF)  # Python's stand-ins for bytes
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escape, str(name))
