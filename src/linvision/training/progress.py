"""What is told of a run while it goes."""

import time
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linvision.console import duration, notes
from linvision.training.callbacks import Recorder
from linvision.training.module import TrainingModule
from linvision.training.task import Task

# Without a terminal, and with one. Reading the loss makes a GPU wait, hence not at every step.
SECONDS_BETWEEN_UPDATES = (60.0, 0.2)


class Reporter(Callback):
    """Writes a line an epoch, below which a live bar runs on a terminal; elsewhere a line a minute in long epochs."""

    def __init__(self, recorder: Recorder, task: Task, epochs: int):
        self.recorder, self.task, self.epochs = recorder, task, epochs
        self.console = notes()
        self.bar: Progress | None = None
        self._task = TaskID(0)
        self._began = self._last = 0.0
        self._first_epoch = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self._began = self._last = time.perf_counter()
        self._first_epoch = trainer.current_epoch
        if not self.console.is_terminal:
            return
        numbers = TextColumn("{task.fields[numbers]}")
        left = TimeRemainingColumn(compact=True)
        columns = (TextColumn("{task.description}"), BarColumn(), numbers, left, TextColumn("left"))
        self.bar = Progress(*columns, console=self.console, transient=True)
        steps = int(trainer.num_training_batches)
        self._task = self.bar.add_task(
            "starting", total=self.epochs * steps, completed=trainer.current_epoch * steps, numbers=""
        )
        self.bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar on; without a terminal, write a line once a minute."""
        if self.bar is not None:
            self.bar.advance(self._task)
        now = time.perf_counter()
        if not outputs or now - self._last < SECONDS_BETWEEN_UPDATES[self.bar is not None]:
            return
        self._last = now
        epoch = f"epoch {trainer.current_epoch + 1}/{self.epochs}"
        parts = (
            f"loss {float(outputs['loss']):.3f}",
            cast(TrainingModule, pl_module).progress(),
            f"{self.recorder.images_per_second:,.0f} images/s",
        )
        numbers = "  ".join(part for part in parts if part)
        if self.bar is not None:
            self.bar.update(self._task, description=epoch, numbers=numbers)
        else:
            self.console.print(f"{epoch}  step {batch_idx + 1}/{trainer.num_training_batches}  {numbers}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's line."""
        row = self.recorder.rows[-1]
        now = self._last = time.perf_counter()
        done = trainer.current_epoch + 1
        left = (now - self._began) / (done - self._first_epoch) * (self.epochs - done)
        self.console.print(
            f"epoch {done}/{self.epochs}  {self.task.epoch_line(row)}  {row['images_per_second']:,.0f} images/s  "
            f"{duration(left)} left"
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
