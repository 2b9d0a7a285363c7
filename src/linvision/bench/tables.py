"""Results as tables, for a terminal or in Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from linvision.bench.measure import Spread
from linvision.bench.report import Group, Report, Row, crossovers, growth, record


@dataclass(frozen=True)
class Grid:
    """A table before it has a form: text, the first columns to the left, numbers to the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1

    def rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table for a page."""
        rule = ["---" if index < self.left else "---:" for index in range(len(self.header))]
        lines = [f"| {' | '.join(row)} |" for row in (self.header, tuple(rule), *self.rows)]
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def grids(report: Report) -> list[Grid]:
    """Lay all results out as tables."""
    tables = [_figures(report, group, rows) for group, rows in report.groups()]
    return [*tables, *_growth_grids(report)]


def _figures(report: Report, group: Group, rows: list[Row]) -> Grid:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.ratios))
    header = (
        "contender",
        "side" if report.unit == "image" else "tokens",
        f"ms/{report.unit}",
        f"{report.unit}s/s",
        "peak MB",
        *(f"{what} / {kind}" for kind in kinds for what in ("time", "memory")),
        f"GFLOP/{report.unit}",
        "GFLOP/s (of peak)",
        "GB/s (of copy)",
    )
    return Grid(report.title(group), header, tuple(_cells(report, row, kinds) for row in rows))


def _cells(report: Report, row: Row, kinds: list[str]) -> tuple[str, ...]:
    figures = record(report, row)
    batch_size = row.setting.batch_size
    ratios = []
    for kind in kinds:
        ratio = row.ratios.get(kind)
        ratios.append(_spread(ratio.time, "{:.3g}") if ratio and ratio.time else "")
        ratios.append(f"{ratio.memory:.3g}" if ratio and ratio.memory is not None else "")
    seconds = row.seconds
    scaled = seconds and Spread(*(1e3 * x / batch_size for x in (seconds.median, seconds.low, seconds.high)))
    return (
        row.contender,
        str(row.setting.size),
        _spread(scaled, "{:.4g}") if scaled else row.status,
        _number(figures[f"{report.unit}s_per_second"]),
        "" if row.peak_memory is None else _megabytes(row.peak_memory),
        *ratios,
        "" if row.flops is None else f"{row.flops / 1e9 / batch_size:.3g}",
        _rate(figures["flops_per_second"], figures["flops_share_of_peak"]),
        _rate(figures["bytes_per_second"], figures["bytes_share_of_peak"]),
    )


def _growth_grids(report: Report) -> Iterable[Grid]:
    fits = [fit for fit in growth(report) if fit["time"] is not None]
    what = "pixels" if report.unit == "image" else "tokens"
    if fits:
        rows = tuple(
            (fit["contender"], *_place(report, fit), _span(fit["sizes"]), _number(fit["time"]), _number(fit["memory"]))
            for fit in fits
        )
        header = ("contender", "setting", "sizes", "time", "memory")
        yield Grid(f"growth with {what}: exponents (1 is linear, 2 quadratic)", header, rows, left=3)
    crossed = [cross for cross in crossovers(report) if cross["time"] is not None or cross["memory"] is not None]
    if crossed:
        rows = tuple(
            (cross["contender"], cross["peer"], *_place(report, cross), _size(cross["time"]), _size(cross["memory"]))
            for cross in crossed
        )
        unit = "side, pixels" if report.unit == "image" else "tokens"
        header = ("contender", "peer", "setting", f"faster from ({unit})", f"less memory from ({unit})")
        yield Grid("crossovers, between measured sizes", header, rows, left=3)


def _place(report: Report, entry: dict[str, Any]) -> tuple[str]:
    return (report.title((entry["mode"], entry["dtype"], entry["batch_size"])),)


def _span(sizes: list[int]) -> str:
    return f"{min(sizes)}–{max(sizes)}"


def _spread(values: Spread, form: str) -> str:
    return f"{form.format(values.median)} ({form.format(values.low)}–{form.format(values.high)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}" if count >= 100e6 else f"{count / 1e6:.3g}"


def _size(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _rate(value: float | None, share: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.3g}" + ("" if share is None else f" ({share:.0%})")
