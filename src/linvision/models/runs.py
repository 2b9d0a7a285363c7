"""The models in the folders of ``linvision train``, by the folder's path."""

from pathlib import Path
from typing import Any, NamedTuple

from linvision.errors import CheckpointError, RunError
from linvision.records import fits, read_file

CARD = "model.json"
WEIGHTS = BEST, LAST = "best.safetensors", "last.safetensors"


class RunModel(NamedTuple):
    """A model's name, its constructor's arguments, and its numbers of classes and of pixels along the sides."""

    name: str
    arguments: dict[str, Any]
    num_classes: int
    size: tuple[int, int]


def is_run(name: str) -> bool:
    """Say whether a path leads to the folder of a run."""
    return (Path(name).expanduser() / CARD).is_file()


def read_run(folder: str | Path) -> RunModel:
    """Return the model of a run.

    Raises:
        CheckpointError: its model.json is damaged.
    """
    folder = Path(folder).expanduser()
    try:
        card = read_file(folder / CARD)
    except RunError as error:
        raise CheckpointError(str(error)) from error
    kinds = {"model": str, "classes": tuple[str, ...], "model_kwargs": dict, "preprocess": dict}
    card = {"model_kwargs": {}, **card} if isinstance(card, dict) else {}
    wrong = [key for key, kind in kinds.items() if not fits(card.get(key), kind)]
    size: Any = None if wrong else card["preprocess"].get("size")
    if wrong or not fits(size, tuple[int, int]):
        raise CheckpointError(f"{folder / CARD} is damaged: {', '.join(wrong) or 'size'} is missing or of another type")
    if is_run(card["model"]):
        raise CheckpointError(f"{folder / CARD} is damaged: its model is a run, {card['model']}")
    return RunModel(card["model"], card["model_kwargs"], len(card["classes"]), (size[0], size[1]))


def trained_weights(folder: str | Path) -> Path:
    """Return the file of a run's best weights, or of the last ones where no epoch has been the best.

    Raises:
        CheckpointError: the run has not finished its first epoch.
    """
    folder = Path(folder).expanduser()
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} has no weights yet: its first epoch is not finished")
