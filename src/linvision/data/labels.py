"""Names of classes, as data sets and people write them."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence


def spelling(name: str) -> str:
    """Return what "Domestic Cat", "domestic_cat" and "domestic-cat" have in common."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()


def match_names(names: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Return the place in ``known`` of each of ``names`` that is found there.

    Equal names go first. Others may differ in case, spaces, underscores, dashes and Unicode's forms, where only one of
    ``names`` and one of ``known`` has that spelling.
    """
    places = {name: place for place, name in enumerate(known)}
    found = {name: places[name] for name in names if name in places}
    spelt = defaultdict(list)
    for name, place in places.items():
        spelt[spelling(name)].append(place)
    taken, given = set(found.values()), Counter(map(spelling, names))
    for name in names:
        candidates = spelt[spelling(name)]
        if name not in found and len(candidates) == given[spelling(name)] == 1 and candidates[0] not in taken:
            found[name] = candidates[0]
    return found
