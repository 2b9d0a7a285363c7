"""Results: the rows, what is derived from them, and their form as CSV and JSON."""

import csv
import io
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from linvision.bench.contenders import Setting
from linvision.bench.measure import Spread, crossover, growth_exponent


@dataclass(frozen=True)
class Ratio:
    """A contender's time and peak memory over those of a peer."""

    peer: str
    time: Spread | None
    memory: float | None


Group = tuple[str, str, int]  # mode, type, batch size: rows of one group differ in size and contender only


@dataclass(frozen=True)
class Row:
    """The outcome of one contender in one setting; times are seconds of a call."""

    contender: str
    setting: Setting
    status: str = "ok"
    note: str = ""
    seconds: Spread | None = None
    rounds: int = 0
    peak_memory: int | None = None
    flops: int | None = None
    traffic: int | None = None
    ratios: dict[str, Ratio] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        """Mode, type and batch size."""
        return self.setting.mode, self.setting.dtype, self.setting.batch_size


@dataclass(frozen=True)
class Report:
    """All results.

    Attributes:
        rows: by setting, then contender.
        machine: what it ran on.
        command: what measures it again.
        options: all options that say what is measured.
        peaks: of the machine, measured.
        unit: "image" or "sequence".
    """

    rows: tuple[Row, ...]
    machine: dict[str, Any]
    command: str
    options: dict[str, Any]
    peaks: dict[str, Any]
    unit: str

    def amount(self, size: int) -> int:
        """Return what grows with the size: pixels of an image, tokens of a sequence."""
        return size * size if self.unit == "image" else size

    def groups(self) -> list[tuple[Group, list[Row]]]:
        """Return the rows of each mode, type and batch size."""
        return [(group, list(rows)) for group, rows in groupby(self.rows, key=lambda row: row.group)]

    def title(self, group: Group) -> str:
        """Name a group."""
        mode, dtype, batch_size = group
        if self.unit == "image":
            names = {"inference": "inference", "training": "training step"}
        else:
            names = {"inference": "forward", "training": "forward and backward"}
        return f"{names[mode]}, {dtype}, batch {batch_size}"


def record(report: Report, row: Row) -> dict[str, Any]:
    """Return everything about a row as plain numbers; None where a figure does not exist."""
    setting, seconds = row.setting, row.seconds
    result: dict[str, Any] = {
        "contender": row.contender,
        "mode": setting.mode,
        "dtype": setting.dtype,
        "batch_size": setting.batch_size,
        "size": setting.size,
        "status": row.status,
        "note": row.note,
        "rounds": row.rounds,
    }
    for name in ("median", "low", "high"):
        took = getattr(seconds, name) if seconds else None
        key = f"ms_per_{report.unit}" if name == "median" else f"ms_per_{report.unit}_{name}"
        result[key] = None if took is None else 1e3 * took / setting.batch_size
    result[f"{report.unit}s_per_second"] = setting.batch_size / seconds.median if seconds else None
    result["peak_memory_bytes"] = row.peak_memory
    result["flops"], result["traffic_bytes"] = row.flops, row.traffic
    achieved = [(row.flops, "flops"), (row.traffic, "bytes")]
    peaks = {
        "flops": report.peaks.get("flops_per_second", {}).get(setting.dtype),
        "bytes": report.peaks.get("bytes_per_second"),
    }
    for count, name in achieved:
        rate = count / seconds.median if count is not None and seconds else None
        result[f"{name}_per_second"] = rate
        result[f"{name}_share_of_peak"] = rate / peaks[name] if rate is not None and peaks[name] else None
    for kind, ratio in row.ratios.items():
        result |= {
            f"time_over_{kind}": ratio.time.median if ratio.time else None,
            f"time_over_{kind}_low": ratio.time.low if ratio.time else None,
            f"time_over_{kind}_high": ratio.time.high if ratio.time else None,
            f"memory_over_{kind}": ratio.memory,
        }
    return result


def growth(report: Report) -> list[dict[str, Any]]:
    """Fit the growth of time and memory with pixels or tokens: the exponent p of amount^p, for every contender."""
    results = []
    for (mode, dtype, batch_size), rows in report.groups():
        for contender in dict.fromkeys(row.contender for row in rows):
            own = [row for row in rows if row.contender == contender and row.seconds]
            amounts = [report.amount(row.setting.size) for row in own]
            measured = [row for row in own if row.peak_memory]
            results.append(
                {
                    "contender": contender,
                    "mode": mode,
                    "dtype": dtype,
                    "batch_size": batch_size,
                    "sizes": [row.setting.size for row in own],
                    "time": growth_exponent(amounts, [row.seconds.median for row in own if row.seconds]),
                    "memory": growth_exponent(
                        [report.amount(row.setting.size) for row in measured],
                        [float(row.peak_memory or 0) for row in measured],
                    ),
                }
            )
    return results


def crossovers(report: Report) -> list[dict[str, Any]]:
    """Find the size from which what is under test is faster than a peer, and that from which it takes less memory."""
    results = []
    for (mode, dtype, batch_size), rows in report.groups():
        by_place = {(row.contender, row.setting.size): row for row in rows}
        peers = {ratio.peer for row in rows for ratio in row.ratios.values()}
        for contender in dict.fromkeys(row.contender for row in rows if row.contender not in peers):
            own = [row for row in rows if row.contender == contender]
            for kind, ratio in (own[0].ratios if own else {}).items():
                pairs = [(row, by_place[ratio.peer, row.setting.size]) for row in own]
                timed = [
                    (a.setting.size, a.seconds.median, b.seconds.median) for a, b in pairs if a.seconds and b.seconds
                ]
                held = [
                    (a.setting.size, float(a.peak_memory), float(b.peak_memory))
                    for a, b in pairs
                    if a.peak_memory and b.peak_memory
                ]
                results.append(
                    {
                        "contender": contender,
                        "peer": ratio.peer,
                        "kind": kind,
                        "mode": mode,
                        "dtype": dtype,
                        "batch_size": batch_size,
                        "time": crossover(*zip(*timed, strict=True)) if timed else None,
                        "memory": crossover(*zip(*held, strict=True)) if held else None,
                    }
                )
    return results


def as_json(report: Report) -> dict[str, Any]:
    """Return all of it for JSON."""
    return {
        "command": report.command,
        "options": report.options,
        "machine": report.machine,
        "peaks": report.peaks,
        "rows": [record(report, row) for row in report.rows],
        "growth": growth(report),
        "crossovers": crossovers(report),
    }


def as_csv(report: Report) -> str:
    """Return the rows for a spreadsheet; a figure that does not exist is empty."""
    records = [record(report, row) for row in report.rows]
    columns = list(dict.fromkeys(key for each in records for key in each))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
