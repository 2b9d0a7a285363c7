"""What training, evaluating and predicting ask of a task, and all that they know of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from linvision.data import ArrayData, Batches, FolderData, open_data, open_test_data
from linvision.devices import Precision
from linvision.training.module import TrainingModule
from linvision.training.opened import Opened
from linvision.training.settings import Settings

Data = ArrayData | FolderData


@dataclass(frozen=True)
class Curve:
    """A picture of columns over the epochs: ``train_NAME`` and ``val_NAME``, as far as they are there."""

    name: str
    label: str
    scale: float = 1.0


@dataclass(frozen=True)
class Measured:
    """The outcome of a pass over test images.

    Attributes:
        figures: by name, as summary.json and ``eval --json`` have them.
        num_images: that were measured.
        seconds: that it took, reading the images included.
        not_numbers: images of these whose outputs are no numbers (NaN); they count as wrong.
    """

    figures: dict[str, float]
    num_images: int
    seconds: float
    not_numbers: int = 0

    def warning(self) -> str:
        """Say how many outputs are no numbers; nothing where all are."""
        if not self.not_numbers:
            return ""
        return (
            f"{self.not_numbers} of {self.num_images} images have outputs that are no numbers (NaN) and count as "
            "wrong: the weights may be damaged, or --precision 32 may help"
        )

    @property
    def images_per_second(self) -> float:
        """Speed, reading the images included."""
        return self.num_images / self.seconds


class Task(ABC):
    """What is learnt, how it is measured and what is drawn.

    Attributes:
        name: by which the command line knows it.
        columns: what is recorded of each epoch beside its number, learning rate and speed; ``train_loss`` among them.
        best: the column by which the best epoch is told.
        highest: whether that is its highest value, or its lowest.
        curves: what to draw of them.
        pictures: the files that ``draw`` writes.
    """

    name: str
    columns: tuple[str, ...]
    best: str
    highest: bool
    curves: tuple[Curve, ...]
    pictures: tuple[str, ...]

    def open_data(self, name: str, **options: Any) -> Data:
        """Open data to train on, by name, folder or CSV file; options as of ``linvision.data.open_data``."""
        return open_data(name, **options)

    def open_test_data(self, name: str, **options: Any) -> Data:
        """Open data to measure on, by name, folder or CSV file; options as of ``linvision.data.open_test_data``."""
        return open_test_data(name, **options)

    @abstractmethod
    def outputs(self, data: Data) -> tuple[str, ...]:
        """Name the outputs of a model for this data."""

    def names_of(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Name the outputs of a model with published weights, as data sets do and as people do."""
        numbers = tuple(f"output {index}" for index in range(int(getattr(model, "num_classes", 0) or 0)))
        return numbers, numbers

    @abstractmethod
    def module(
        self, model: nn.Module, settings: Settings, *, outputs: tuple[str, ...], batches: Batches
    ) -> TrainingModule:
        """Make what computes the loss of one of the batches and measures one; it logs the task's columns."""

    @abstractmethod
    def measure(
        self, opened: Opened, batches: Batches, *, data: Data, device: torch.device, precision: Precision
    ) -> Measured:
        """Measure a model on batches of some data; whether the two fit together is checked first."""

    @abstractmethod
    def format(self, column: str, value: float) -> str:
        """Write a value of a column for people."""

    def epoch_line(self, row: dict[str, float]) -> str:
        """Summarise an epoch."""
        return "  ".join(f"{name} {self.format(name, row[name])}" for name in self.columns)

    @abstractmethod
    def result_line(self, measured: Measured) -> str:
        """Summarise what a run has reached, in few words."""

    @abstractmethod
    def eval_line(self, measured: Measured) -> str:
        """Summarise a measurement."""

    def by_class(self, measured: Measured, opened: Opened) -> tuple[dict[str, dict[str, float]], Table | None]:
        """Return the measurement for each class, for programs and for people; nothing where there are none."""
        return {}, None

    @abstractmethod
    def draw(self, folder: Path, measured: Measured, batches: Batches, *, opened: Opened, title: str) -> None:
        """Draw what shows a run's result into its folder."""

    @abstractmethod
    def answer(self, opened: Opened, inputs: Tensor, *, top_k: int) -> list[dict[str, Any] | None]:
        """Answer for each of the inputs (B, 3, H, W) on the model's device, in JSON's terms.

        None is for outputs that are no numbers.
        """

    @abstractmethod
    def answer_rows(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """Lay an answer out as lines of a CSV file."""

    @abstractmethod
    def answer_table(self, answers: Sequence[tuple[str, dict[str, Any]]]) -> Table:
        """Lay answers for images, by their paths, out for people."""


def take(batches: Batches, chosen: Tensor) -> Tensor:
    """Return the inputs at the given places, in ascending order, of a pass over ``batches``."""
    taken, start = [], 0
    for inputs, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            taken.append(inputs[here])
        start += len(labels)
        if start > chosen[-1]:
            break
    return torch.cat(taken)
