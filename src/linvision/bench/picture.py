"""The picture of a benchmark: time and memory against size, with the crossovers."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from linvision.bench.report import Group, Report, Row, crossovers
from linvision.files import replacing

MARKERS = "osD^vPX*"


def draw(path: Path, report: Report) -> None:
    """Draw a row of two log-log pictures for each mode, type and batch size."""
    groups = report.groups()
    figure = Figure(figsize=(12, 4.4 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), 2, squeeze=False)
    for (left, right), (group, rows) in zip(grid, groups, strict=True):
        sizes = sorted({row.setting.size for row in rows})
        held = f"peak memory above the {'model' if report.unit == 'image' else 'inputs'}, MB"
        for axes, what, value, label in (
            (left, "time", _milliseconds, f"ms/{report.unit}"),
            (right, "memory", _megabytes, held),
        ):
            curves = {
                name: [(row.setting.size, value(row)) for row in rows if row.contender == name and value(row)]
                for name in dict.fromkeys(row.contender for row in rows)
            }
            for index, (name, curve) in enumerate(curves.items()):
                marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
                axes.plot([x for x, _ in curve], [y for _, y in curve], marker=marker, color=color, label=name)
            crossed = [cross for cross in crossovers(report) if cross[what] and _group(cross) == group]
            for cross in crossed:
                _mark(axes, cross[what], curves[cross["contender"]], labelled=cross is crossed[0])
            axes.set(xscale="log", yscale="log", ylabel=label, title=report.title(group))
            axes.set_xlabel("image side, pixels" if report.unit == "image" else "tokens")
            axes.set_xticks(sizes, list(map(str, sizes)))
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    figure.suptitle(
        f"{report.machine['gpu'] or report.machine['cpu']}, CPU threads: {report.machine['threads']}", fontsize=10
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _milliseconds(row: Row) -> float | None:
    return row.seconds and 1e3 * row.seconds.median / row.setting.batch_size


def _megabytes(row: Row) -> float | None:
    return row.peak_memory and row.peak_memory / 1e6


def _group(cross: dict[str, Any]) -> Group:
    return cross["mode"], cross["dtype"], cross["batch_size"]


def _mark(axes: Axes, size: float, curve: list[tuple[int, float | None]], *, labelled: bool) -> None:
    """Draw a ring with its size where what is under test gets below a peer."""
    logs = np.log([(x, y) for x, y in curve if y])
    height = np.exp(np.interp(np.log(size), logs[:, 0], logs[:, 1]))
    style = {"marker": "o", "markersize": 13, "color": "black", "fillstyle": "none", "linestyle": "none"}
    axes.plot([size], [height], label="gets below a peer" if labelled else None, **style)
    axes.annotate(f"{size:.0f}", (size, height), (0, 10), textcoords="offset points", ha="center", fontsize=8)
