"""What happens around the epochs of a run: seeding, recording and saving, ending after a signal."""

import csv
import io
import math
import time
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from linvision.data.batches import Batches, epoch_seed
from linvision.errors import RunError
from linvision.files import write_text, write_weights
from linvision.interruption import Interruption
from linvision.training.module import TrainingModule
from linvision.training.run_folder import RunFolder
from linvision.training.task import Task


class EpochSeed(Callback):
    """Sets every random state from the seed and the epoch, so that a resumed run is an uninterrupted one."""

    def __init__(self, batches: Batches, seed: int):
        self.batches, self.seed = batches, seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed the epoch."""
        self.batches.epoch = trainer.current_epoch
        pl.seed_everything(epoch_seed(self.seed, trainer.current_epoch) % 2**32, verbose=False)


class Obedience(Callback):
    """Ends a run between two batches after a signal."""

    def __init__(self, interruption: Interruption):
        self.interruption = interruption

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Obey before a training step."""
        self.interruption.obey()

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Obey before a batch is evaluated."""
        self.interruption.obey()


class Recorder(Callback):
    """Writes a line of metrics.csv and the weights after each epoch, and last of all the state to resume from.

    The state decides how far a run has come: lines of epochs after it are dropped when the run is resumed.
    """

    def __init__(self, run: RunFolder, task: Task):
        self.run, self.task = run, task
        self.rows: list[dict[str, float]] = []
        self.began = False
        self._started = self._trained = 0.0
        self._images = 0

    @property
    def best(self) -> dict[str, float]:
        """The line of the best epoch, the first of equals."""
        choose = max if self.task.highest else min
        return choose(self.rows, key=lambda row: row[self.task.best])

    @property
    def images_per_second(self) -> float:
        """Training images a second in this epoch so far, validation not counted."""
        return self._images / max(self._trained - self._started, 1e-9)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the epochs of the run that is resumed."""
        self.rows = [row for row in read_metrics(self.run.metrics) if row["epoch"] <= checkpoint["epoch"] + 1]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the state, if there was one, has been taken up."""
        self.began = True

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
        silent = [name for name in self.task.columns if name not in measured and f"{name}_epoch" not in measured]
        if silent:
            raise RunError(
                f"the task {self.task.name} has not logged {', '.join(silent)}; it logged {', '.join(measured)}"
            )
        row = {
            "epoch": trainer.current_epoch + 1,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            **{name: measured.get(f"{name}_epoch", measured.get(name, math.nan)) for name in self.task.columns},
            "images_per_second": self.images_per_second,
            "seconds": time.perf_counter() - self._started,
        }
        if not math.isfinite(row["train_loss"]):
            raise RunError(
                f"the training loss became {row['train_loss']} in epoch {row['epoch']}: lower --lr, "
                "set --clip-grad, or use --precision 32"
            )
        if trainer.logger is not None:
            trainer.logger.log_metrics({"images_per_second": row["images_per_second"]}, step=trainer.global_step)
        # Rounded as in the file, so that a resumed run compares the same figures.
        self.rows.append({name: float(f"{value:.6g}") for name, value in row.items()})
        weights = cast(TrainingModule, pl_module).final_model.state_dict()
        write_weights(self.run.last, weights)
        if self.best is self.rows[-1]:
            write_weights(self.run.best, weights)
        write_metrics(self.run.metrics, self.rows)
        trainer.save_checkpoint(self.run.state)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.csv; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write_metrics(path: Path, rows: list[dict[str, float]]) -> None:
    """Write metrics.csv, of one line or more, in one piece."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write_text(path, text.getvalue())
