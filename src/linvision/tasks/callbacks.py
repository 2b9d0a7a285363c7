"""What happens around the epochs of a run: seeding, recording, saving and telling."""

import csv
import io
import math
import pickle
import time
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linvision.console import duration, notes
from linvision.data.batches import Batches, epoch_seed
from linvision.errors import RunError
from linvision.files import replacing, write_text, write_weights
from linvision.tasks.classify import Classifier
from linvision.tasks.run_folder import RunFolder

COLUMNS: tuple[str, ...] = (
    "epoch",
    "lr",
    "train_loss",
    "train_top1",
    "test_loss",
    "test_top1",
    "test_top5",
    "images_per_second",
    "seconds",
)
# Without a terminal, and with one. Reading the loss makes a GPU wait, hence not at every step.
SECONDS_BETWEEN_UPDATES = (60.0, 0.2)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a training state so that the old one stays until the new one is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` in one piece."""
        with replacing(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a training state, as data only.

        Raises:
            RunError: the file is damaged.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, KeyError) as error:
            raise RunError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


class EpochSeed(Callback):
    """Sets every random state from the seed and the epoch, so that a resumed run is an uninterrupted one."""

    def __init__(self, batches: Batches, seed: int):
        self.batches, self.seed = batches, seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the epoch."""
        self.batches.epoch = trainer.current_epoch
        pl.seed_everything(epoch_seed(self.seed, trainer.current_epoch) % 2**32, verbose=False)


class Interruption(Callback):
    """Ends a run between two batches after a signal, and at once after a second one.

    A handler that raised would not always be heard: Python drops what is raised inside a finaliser.
    """

    def __init__(self):
        self._number: int | None = None

    def note(self, number: int, frame: Any) -> None:
        """Take a signal, as its handler."""
        again = self._number is not None
        self._number = number
        if again:
            self.obey()

    def obey(self) -> None:
        """End the run if a signal came.

        Raises:
            SystemExit: with the code of a process that the signal ended, 128 and its number.
        """
        if self._number is not None:
            raise SystemExit(128 + self._number)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Obey before a training step."""
        self.obey()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Obey before a batch is evaluated."""
        self.obey()


class Recorder(Callback):
    """Writes a line of metrics.csv and the weights after each epoch, and last of all the state to resume from.

    The state decides how far a run has come: lines of epochs after it are dropped when the run is resumed.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self.rows: list[dict[str, float]] = []
        self._started = self._trained = 0.0
        self._images = 0

    @property
    def best(self) -> dict[str, float]:
        """The line of the best epoch, the first of equals."""
        return max(self.rows, key=lambda row: row["test_top1"])

    @property
    def images_per_second(self) -> float:
        """Training images a second in this epoch so far, validation not counted."""
        return self._images / max(self._trained - self._started, 1e-9)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the epochs of the run that is resumed."""
        self.rows = [row for row in read_metrics(self.run.metrics) if row["epoch"] <= checkpoint["epoch"] + 1]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started, self._images = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images."""
        self._images += len(batch[1])
        self._trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record and save the epoch.

        Raises:
            RunError: the loss is no number any more.
        """
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        row = {
            "epoch": trainer.current_epoch + 1,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train_loss": measured.get("train_loss_epoch", math.nan),
            **{name: measured.get(name, math.nan) for name in COLUMNS[3:7]},
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self._started,
        }
        if not math.isfinite(row["train_loss"]):
            raise RunError(
                f"the training loss became {row['train_loss']} in epoch {row['epoch']}: lower --lr, "
                "set --clip-grad, or use --precision 32"
            )
        # Rounded as in the file, so that a resumed run compares the same figures.
        self.rows.append({name: float(f"{value:.6g}") for name, value in row.items()})
        weights = cast(Classifier, pl_module).final_model.state_dict()
        write_weights(self.run.last, weights)
        if self.best is self.rows[-1]:
            write_weights(self.run.best, weights)
        write_metrics(self.run.metrics, self.rows)
        trainer.save_checkpoint(self.run.state)


class Reporter(Callback):
    """Writes a line an epoch, below which a live bar runs on a terminal; elsewhere a line a minute in long epochs."""

    def __init__(self, recorder: Recorder, epochs: int):
        self.recorder, self.epochs = recorder, epochs
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
        numbers = (
            f"loss {float(outputs['loss']):.3f}  accuracy {float(cast(Classifier, pl_module).train_top1.compute()):.1%}"
            f"  {self.recorder.images_per_second:,.0f} images/s"
        )
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
            f"epoch {done}/{self.epochs}  loss {row['train_loss']:.3f}  train {row['train_top1']:.2%}  "
            f"test {row['test_top1']:.2%}  {row['images_per_second']:,.0f} images/s  {duration(left)} left"
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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.csv; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Write metrics.csv in one piece."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())
