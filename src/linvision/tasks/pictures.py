"""The pictures of classification: a grid of test images with predictions, the confusion matrix."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from linvision.training.curves import save_figure

RIGHT, WRONG = "#1b7837", "#c51b29"


def draw_predictions(
    path: Path, images: Tensor, predictions: Tensor, labels: Tensor, classes: tuple[str, ...], title: str
) -> None:
    """Draw images (N, 3, H, W) in [0, 1] with what they were taken for; wrong ones are red and name the true class."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.35 * columns, 1.65 * rows + 0.4), layout="constrained")
    figure.suptitle(title)
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set(xticks=[], yticks=[])
        if index >= len(images):
            axes.set_axis_off()
            continue
        prediction, label = int(predictions[index]), int(labels[index])
        right = prediction == label
        axes.imshow(images[index].permute(1, 2, 0).numpy())
        text = _short(classes[prediction]) if right else f"{_short(classes[prediction])}\nnot {_short(classes[label])}"
        axes.set_title(text, fontsize=8, color=RIGHT if right else WRONG)
        for side in axes.spines.values():
            side.set(color=RIGHT if right else WRONG, linewidth=1 if right else 3)
    save_figure(figure, path)


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
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if labelled:
        names = [_short(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    save_figure(figure, path)


def choose_examples(predictions: Tensor, labels: Tensor, count: int = 48) -> Tensor:
    """Choose images to show, in order: up to a third wrong ones, the others spread over the right ones."""
    wrong = (predictions != labels).nonzero().flatten()
    right = (predictions == labels).nonzero().flatten()
    wrong = _spread(wrong, max(count // 3, count - len(right)))
    return torch.cat([wrong, _spread(right, count - len(wrong))]).sort().values


def _spread(indices: Tensor, count: int) -> Tensor:
    if len(indices) <= count:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, count).round().long()]


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
