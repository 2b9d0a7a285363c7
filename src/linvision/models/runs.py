"""The models in the folders of ``linvision train``, by the folder's path."""

from pathlib import Path
from typing import Any, NamedTuple

from linvision.errors import CheckpointError, RunError
from linvision.records import fits, read_file

CARD = "model.json"
WEIGHTS = ("best.safetensors", "last.safetensors")  # the first that is there


class RunModel(NamedTuple):
    """A registered name, its constructor's arguments, and the file of the trained weights."""

    name: str
    arguments: dict[str, Any]
    weights: Path


def is_run(name: str) -> bool:
    """Say whether a path leads to the folder of a run."""
    return (Path(name).expanduser() / CARD).is_file()


def read_run(folder: str | Path) -> RunModel:
    """Return the model of a run.

    Raises:
        CheckpointError: its model.json is damaged, or it has no weights yet.
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
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{folder} has no weights yet: its first epoch is not finished")
    arguments = {**card["model_kwargs"], "num_classes": len(card["classes"]), "img_size": (size[0], size[1])}
    return RunModel(card["model"], arguments, weights)
