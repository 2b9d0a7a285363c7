"""Times of contenders that take turns, ratios with their spread, growth over sizes and crossovers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import linear_regression, median, quantiles
from time import perf_counter

MIN_ROUNDS = 3
WARM_UP_CALLS = 3
SLOW_CALL = 2.0  # seconds; one call of this length warms up enough
SHORTEST_SAMPLE = 0.05  # seconds; shorter calls are timed several together


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Summarise one or more values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), low, high)


def ratios(own: Sequence[float], reference: Sequence[float]) -> Spread:
    """Summarise the ratios of times that were taken in the same rounds."""
    return spread([a / b for a, b in zip(own, reference, strict=True)])


def alternate(
    steps: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    seconds: float,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = perf_counter,
) -> dict[str, list[float]]:
    """Time steps that take turns, so that whatever else the machine does meets all of them alike.

    Every second round runs in reverse order. Short steps are repeated within a sample.

    Args:
        steps: functions that run one contender once, by label.
        rounds: samples of each.
        seconds: no round is begun after this time, once there are ``MIN_ROUNDS``.
        synchronize: waits until the device has finished.
        clock: returns the time in seconds.

    Returns:
        seconds of one call, a number for every round, by label; none for a contender that ran out of memory.
    """
    times: dict[str, list[float]] = {label: [] for label in steps}
    calls = {}
    for label, step in steps.items():
        took = _attempt(lambda step=step: _warm_up(step, synchronize, clock))
        if took is not None:
            calls[label] = max(1, math.ceil(SHORTEST_SAMPLE / max(took, 1e-6)))
    start = clock()
    for index in range(rounds):
        if index >= MIN_ROUNDS and clock() - start > seconds:
            break
        for label in list(calls)[:: -1 if index % 2 else 1]:
            sample = _attempt(
                lambda step=steps[label], count=calls[label]: _timed(step, count, synchronize, clock) / count
            )
            if sample is None:
                del calls[label]
                times[label] = []
            else:
                times[label].append(sample)
    return times


def _warm_up(step: Callable[[], None], synchronize: Callable[[], None], clock: Callable[[], float]) -> float:
    took = 0.0
    for _ in range(WARM_UP_CALLS):
        took = _timed(step, 1, synchronize, clock)
        if took > SLOW_CALL:
            break
    return took


def _timed(step: Callable[[], None], count: int, synchronize: Callable[[], None], clock: Callable[[], float]) -> float:
    synchronize()
    start = clock()
    for _ in range(count):
        step()
    synchronize()
    return clock() - start


def _attempt(measurement: Callable[[], float]) -> float | None:
    try:
        return measurement()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out; torch has no class of its own for that on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    )


def growth_exponent(amounts: Sequence[float], values: Sequence[float]) -> float | None:
    """Fit values ~ amounts^p and return p (least squares of the logarithms); None with fewer than two amounts."""
    points = [(math.log(a), math.log(v)) for a, v in zip(amounts, values, strict=True) if v > 0]
    if len({a for a, _ in points}) < 2:
        return None
    return linear_regression(*zip(*points, strict=True)).slope


def crossover(sizes: Sequence[float], own: Sequence[float], other: Sequence[float]) -> float | None:
    """Find the size from which ``own`` is below ``other`` for good, between two sizes by a line in logarithms.

    Returns:
        the size; None where that is so at all sizes or not at the largest.
    """
    points = sorted(zip(sizes, own, other, strict=True))
    logs = [(math.log(size), math.log(a / b)) for size, a, b in points]
    if not logs or logs[-1][1] >= 0:
        return None
    for (left, above), (right, below) in reversed(list(pairwise(logs))):
        if above >= 0:
            return math.exp(left + (right - left) * above / (above - below))
    return None
