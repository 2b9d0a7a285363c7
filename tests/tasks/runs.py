"""The smallest training runs, and what to compare of them."""

import csv
from pathlib import Path

import safetensors.torch
import torch

# Two epochs of two steps, of a ViL with 4x4 tokens.
TINY = (
    *("--model", "vil2_mini_patch4_32", "--img-size", "16", "--epochs", "2", "--batch-size", "6"),
    *("--workers", "0", "--device", "cpu"),
)


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / f"{which}.safetensors")


def same_weights(first: Path, second: Path, which: str = "last") -> bool:
    one, other = weights(first, which), weights(second, which)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def metrics(run: Path) -> list[dict[str, str]]:
    """Return the lines of metrics.csv without the times."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]
