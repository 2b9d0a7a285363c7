"""The command ``linvision models``: what is known about each model."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from linvision.console import output, with_bar, write_json

if TYPE_CHECKING:
    from linvision.models import ModelDescription

EXAMPLE = 'linvision models "vil2*"'
POSITIONAL = ("pattern",)


@dataclass(frozen=True)
class Options:
    """Which models to list.

    Attributes:
        pattern: shell pattern of names, such as "vil2*"; a published alias and timm's names are taken as well
        json: write the list as JSON
    """

    pattern: str = "*"
    json: bool = False


def run(options: Options) -> int:
    """Run ``linvision models``."""
    import timm

    from linvision.models import describe, list_models, resolve_name

    names = list_models(options.pattern) or timm.list_models(options.pattern) or [resolve_name(options.pattern)]
    descriptions = [describe(name) for name in with_bar(names, len(names), "counting")]
    if options.json:
        write_json([asdict(description) for description in descriptions])
        return 0
    table = Table("name", "parameters, M", "GFLOPs", "input", "top-1, %")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_column("weights", overflow="fold")
    for description in descriptions:
        table.add_row(*_cells(description))
    console = output()
    console.print(table)
    for description in descriptions:
        if description.note:
            console.print(f"{description.name}: {description.note}", markup=False)
    console.print("GFLOPs: 1e9 multiply-adds an image, scans included. top-1: as published, ImageNet-1K.")
    return 0


def _cells(description: "ModelDescription") -> tuple[str, ...]:
    _, height, width = description.input_size
    return (
        description.name,
        f"{description.parameters / 1e6:.2f}",
        f"{description.macs / 1e9:.2f}",
        f"{height}x{width}",
        "" if description.top1 is None else f"{description.top1:.1f}",
        description.source,
    )
