"""The pictures of classification: a grid of test images with predictions, the confusion matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from linvision.training.curves import plain, save_figure

RIGHT, WRONG = "#1b7837", "#c51b29"


@dataclass(frozen=True)
class Examples:
    """Images (N, 3, H, W) in [0, 1] under a heading, what they were taken for (N,), what they are, and how surely."""

    heading: str
    images: Tensor
    predictions: Tensor
    labels: Tensor
    probabilities: Tensor


def draw_predictions(path: Path, groups: Sequence[Examples], classes: tuple[str, ...], title: str) -> None:
    """Draw groups of images with their predictions; wrong ones are red and name the true class."""
    groups = [group for group in groups if len(group.images)]
    columns = min(8, max(len(group.images) for group in groups))
    rows = [-(-len(group.images) // columns) for group in groups]
    figure = Figure(figsize=(1.35 * columns, 1.75 * sum(rows) + 0.4 * len(rows) + 0.3), layout="constrained")
    figure.suptitle(plain(title))
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
    for group, count, part in zip(groups, rows, parts, strict=True):
        part.suptitle(group.heading, fontsize=10)
        places = part.subplots(count, columns, squeeze=False).flat
        for index, axes in enumerate(places):
            axes.set(xticks=[], yticks=[])
            if index < len(group.images):
                _draw_answer(axes, group, index, classes)
            else:
                axes.set_axis_off()
    save_figure(figure, path)


def _draw_answer(axes: Axes, group: Examples, index: int, classes: tuple[str, ...]) -> None:
    prediction, label = int(group.predictions[index]), int(group.labels[index])
    right = prediction == label
    axes.imshow(group.images[index].permute(1, 2, 0).numpy())
    name = _short(classes[prediction]) if prediction >= 0 else "no number"
    text = f"{name} {float(group.probabilities[index]):.0%}"
    text = text if right else f"{text}\nnot {_short(classes[label])}"
    axes.set_title(text, fontsize=8, color=RIGHT if right else WRONG)
    for side in axes.spines.values():
        side.set(color=RIGHT if right else WRONG, linewidth=1 if right else 3)


def draw_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...], title: str) -> None:
    """Draw how many images of each class (rows) were taken for each class (columns)."""
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labelled = len(classes) <= 30
    side = 2.5 + 0.42 * min(len(classes), 30)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the class")
    axes.set(title=plain(title), xlabel="predicted", ylabel="true")
    if labelled:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)


def choose_examples(wrong: Tensor, count: int = 48) -> Tensor:
    """Choose images to show, in order: up to a third of them wrong ones, the others spread over the right ones."""
    mistakes, right = wrong.nonzero().flatten(), (~wrong).nonzero().flatten()
    mistakes = _spread(mistakes, max(count // 3, count - len(right)))
    return torch.cat([mistakes, _spread(right, count - len(mistakes))]).sort().values


def _spread(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, count).round().long()]


def _short(name: str, most: int = 16) -> str:
    return plain(name if len(name) <= most else f"{name[: most - 1]}…")
