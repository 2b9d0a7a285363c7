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

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from linvision.data import Preprocess
from linvision.errors import RunError, UsageError
from linvision.files import write_json, write_text
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
    """

    model: str
    classes: tuple[str, ...]
    preprocess: Preprocess
    data: str
    task: str = "classify"  # the first there was: runs from before there were others do not name it
    pictures: tuple[str, ...] = ("predictions.png", "confusion_matrix.png")


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
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """The weights of the last epoch."""
        return self.path / "last.safetensors"

    def exists(self) -> bool:
        """Tell whether there is a run here."""
        return (self.path / "config.yaml").is_file()

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
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path / 'config.yaml'} is damaged: {str(error).splitlines()[0]}") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.path / 'config.yaml'} is damaged: it holds no options")
        return content

    def save_card(self, card: ModelCard) -> None:
        """Write model.json."""
        write_json(self.path / "model.json", asdict(card))

    def load_card(self) -> ModelCard:
        """Read model.json.

        Raises:
            UsageError: there is no run here, or not yet.
            RunError: the file is damaged.
        """
        path = self.path / "model.json"
        if not path.is_file():
            raise UsageError(f"{self.path} holds no run: it has no model.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            preprocess = {key: _frozen(value) for key, value in content.pop("preprocess").items()}
            content = {key: _frozen(value) for key, value in content.items()}
            return ModelCard(**content, preprocess=Preprocess(**preprocess))
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged: {error}") from error

    def weights(self) -> Path:
        """Return the file of the best weights, or of the last ones where no epoch has been the best.

        Raises:
            UsageError: the run has not finished its first epoch.
        """
        for path in (self.best, self.last):
            if path.is_file():
                return path
        raise UsageError(f"{self.path} has no weights yet: its first epoch is not finished")

    def _pictures(self) -> tuple[str, ...]:
        try:
            return tuple(Path(name).name for name in self.load_card().pictures)
        except (UsageError, RunError):
            return ()

    def tidy(self) -> None:
        """Remove the unfinished files that a killed process left."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything that a run writes, and nothing else."""
        self.tidy()
        for name in (*FILES, *self._pictures()):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def create_run_folder(options: RunOptions, model: str) -> RunFolder:
    """Create the folder that the options ask for, or the next free one.

    Raises:
        UsageError: it exists and may not be replaced.
    """
    if options.out is None:
        return _next_free(Path("runs"), f"{_slug(model)}-{_slug(Path(options.data).name)}")
    check_out(options)
    run = RunFolder(Path(options.out))
    run.path.mkdir(parents=True, exist_ok=True)
    run.clear()
    return run


def check_out(options: RunOptions) -> None:
    """Raise UsageError where create_run_folder would."""
    if options.out is None:
        if options.overwrite:
            raise UsageError("--overwrite needs --out RUN_DIR, the run to replace")
        return
    run = RunFolder(Path(options.out))
    if run.path.exists() and not options.overwrite:
        resume = f" continue it with --resume {run.path}," if run.exists() else ""
        raise UsageError(f"{run.path} exists already:{resume} replace it with --overwrite, or choose another --out")
    if run.path.exists() and not run.exists():
        raise UsageError(f"{run.path} holds no run, so --overwrite does not touch it: choose another --out")


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


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
