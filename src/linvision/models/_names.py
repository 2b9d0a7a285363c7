"""Errors for names that do not exist, with the nearest ones that do."""

import difflib
from collections.abc import Iterable


class UnknownNameError(ValueError):
    """A model, data set or other thing that does not exist was named."""


class UnknownOptionError(TypeError, ValueError):
    """An option that does not exist was given."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """Return up to ``n`` of ``names`` that resemble ``name``, most similar first."""
    by_lower = {known.lower(): known for known in names}
    return [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.5)]


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean a, b or c?", or nothing where no name comes near."""
    near = nearest(name, names)
    if not near:
        return ""
    return f"; did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?"
