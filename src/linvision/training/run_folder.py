"""A run's folder: its configuration, weights, training state and results.

config.yaml              the resolved options; feed it to ``linvision train --config``
model.json               what it takes to use the weights: model, classes, pre-processing
best.safetensors         the weights of the best epoch
last.safetensors         the weights of the last epoch
state.ckpt               optimiser, schedule and weights after the last epoch, for ``--resume``
metrics.csv              one line an epoch
tensorboard/             the same, and the loss of every step
curves.png, and the task's own pictures
summary.json             the result, and what it was reached with
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from linvision.data import Preprocess
from linvision.errors import CheckpointError, RunError, UsageError
from linvision.files import write_json, write_text
from linvision.models.runs import BEST, LAST, trained_weights
from linvision.records import read_file, read_record
from linvision.training.settings import RunOptions

FILES = (
    "config.yaml",
    "model.json",
    "best.safetensors",
    "last.safetensors",
    "state.ckpt",
    "metrics.csv",
    "curves.png",
    "summary.json",
)
LOCK = ".lock"
SECONDS_OF_ORPHANS = 6.0  # loader workers of a killed run hold on to its lock until they notice
# What concerns the place of a run and not its content.
PLACE = ("out", "resume", "overwrite")


@dataclass(frozen=True)
class ModelCard:
    """What it takes to use the weights of a run.

    Attributes:
        model: registered name.
        classes: name of each output.
        preprocess: from an image to its input.
        data: name or path of the data set that it learnt.
        task: what it learnt.
        pictures: files that the task draws into the run's folder.
        model_kwargs: arguments of the model's constructor.
        start: the weights that training started from; empty for none.
        val_split: the share of these that was held back for validation, where they have none of their own.
        images: how many there were to train on and to measure on; none in runs from before they were counted.
    """

    model: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: str
    task: str = "classify"  # the first there was: runs from before there were others do not name it
    pictures: tuple[str, ...] = ("predictions.png", "confusion_matrix.png")
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    images: tuple[int, ...] = ()
    val_split: float | None = None

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("classes are missing")

    def check_same_data(self, now: "ModelCard") -> None:
        """Compare with the card that the run would get now.

        Raises:
            UsageError: classes or images have come, gone or changed their names since the run began.
        """
        changes = []
        for what, old, new in (("outputs", self.classes, now.classes), ("images", self.images, now.images)):
            gone, come = (tuple(x for x in a if x not in b) for a, b in ((old, new), (new, old)))
            if old and old != new:
                changes.append(f"{what} were {_list(gone or old)} and are {_list(come or new)}")
        if changes:
            raise UsageError(
                f"{now.data} has changed since the run began: {'; '.join(changes)}; put the data back as it was, "
                "or start a new run"
            )


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and how they are read and written."""

    path: Path

    @property
    def state(self) -> Path:
        """The training state after the last whole epoch."""
        return self.path / "state.ckpt"

    @property
    def metrics(self) -> Path:
        """The table of epochs."""
        return self.path / "metrics.csv"

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.path / BEST

    @property
    def last(self) -> Path:
        """The weights of the last epoch."""
        return self.path / LAST

    def exists(self) -> bool:
        """Tell whether there is a run here."""
        return (self.path / "config.yaml").is_file()

    def has_state(self) -> bool:
        """Tell whether there is a training state to go on from.

        Raises:
            RunError: there is something else in its place, or it is gone though epochs have ended.
        """
        if self.state.is_file():
            return True
        if os.path.lexists(self.state):
            raise RunError(f"{self.state} is no regular file: the run cannot go on from it")
        # The state comes last in an epoch, so that a run killed in its first has weights and a line, and no state.
        if self.metrics.is_file() and len(self.metrics.read_text(encoding="utf-8").splitlines()) > 2:
            raise RunError(
                f"{self.state} is gone, so that the run cannot go on where it ended; start a new one from its weights "
                f"with --checkpoint {self.last}"
            )
        return False

    def save_config(self, options: dict[str, Any]) -> None:
        """Write config.yaml."""
        content = {key: value for key, value in options.items() if key not in PLACE}
        write_text(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def load_config(self) -> dict[str, Any]:
        """Read config.yaml.

        Raises:
            UsageError: there is no run here.
            RunError: the file is damaged.
        """
        if not self.exists():
            raise UsageError(f"{self.path} holds no run: it has no config.yaml")
        content = read_file(self.path / "config.yaml")
        if not isinstance(content, dict):
            raise RunError(f"{self.path / 'config.yaml'} is damaged: it holds no options")
        return content

    def save_card(self, card: ModelCard) -> None:
        """Write model.json."""
        write_json(self.path / "model.json", asdict(card), digits=17)

    def has_card(self) -> bool:
        """Tell whether the run has come to its first step."""
        return os.path.lexists(self.path / "model.json")

    def load_card(self) -> ModelCard:
        """Read model.json.

        Raises:
            UsageError: there is no run here, or not yet.
            RunError: the file is damaged.
        """
        path = self.path / "model.json"
        if not self.has_card():
            raise UsageError(f"{self.path} holds no run: it has no model.json")
        return read_record(ModelCard, read_file(path), str(path))

    def weights(self) -> Path:
        """Return the file of the best weights, or of the last ones where no epoch has been the best.

        Raises:
            UsageError: the run has not finished its first epoch.
        """
        try:
            return trained_weights(self.path)
        except CheckpointError as error:
            raise UsageError(str(error)) from error

    def _pictures(self) -> tuple[str, ...]:
        try:
            return tuple(Path(name).name for name in self.load_card().pictures)
        except (UsageError, RunError):
            return ()

    def tidy(self) -> None:
        """Remove the unfinished files that a killed process left."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def foreign(self) -> list[str]:
        """List what is here and was not written by a run."""
        ours = {*FILES, LOCK, "tensorboard"}
        return sorted(
            path.name for path in self.path.iterdir() if path.name not in ours and not path.match(".*.tmp")
        )  # fmt: skip

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the folder; the system takes the lock away when this one ends, however it does.

        Raises:
            UsageError: another process is at work here.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=SECONDS_OF_ORPHANS)
        except Timeout as error:
            raise UsageError(
                f"{self.path} is in use by another process: wait until that ends, or choose another --out"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def clear(self) -> None:
        """Remove everything that a run writes, and nothing else."""
        self.tidy()
        for name in (*FILES, *self._pictures()):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def check_out(options: RunOptions) -> None:
    """Raise UsageError where the folder that the options ask for may not be written to."""
    if options.out is None:
        if options.overwrite:
            raise UsageError("--overwrite needs --out RUN_DIR, the run to replace")
        return
    run = RunFolder(Path(options.out))
    if run.exists() and not options.overwrite:
        raise UsageError(
            f"{run.path} exists already: continue it with --resume {run.path}, replace it with --overwrite, "
            "or choose another --out"
        )
    if run.path.exists() and not run.exists() and run.foreign():
        raise UsageError(
            f"{run.path} exists already and holds {run.foreign()[0]}, which is no part of a run: it is left as it is, "
            "choose another --out"
        )


@contextmanager
def new_run(options: RunOptions, model: str) -> Iterator[RunFolder]:
    """Create the folder that the options ask for, or the next free one, and keep other processes out of it.

    Raises:
        UsageError: it may not be replaced, or another process writes to it.
    """
    check_out(options)
    stem = f"{_slug(model)}-{_slug(Path(options.data).name)}"
    run = RunFolder(Path(options.out)) if options.out else _next_free(Path("runs"), stem)
    run.path.mkdir(parents=True, exist_ok=True)
    with run.locked():
        run.clear()
        yield run


def _next_free(parent: Path, stem: str) -> RunFolder:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            (parent / f"{stem}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return RunFolder(parent / f"{stem}-{number}")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


def _list(values: tuple[Any, ...], most: int = 5) -> str:
    return ", ".join(map(str, values[:most])) + (", ..." if len(values) > most else "")
