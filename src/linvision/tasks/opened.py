"""Models opened for use: the run in a folder, or a name with its published weights or those of a file."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from linvision.data import Preprocess, UnreadableImageError, open_image, upright_rgb
from linvision.errors import UsageError
from linvision.models import create_model, resolve_name
from linvision.tasks import get_task
from linvision.training.opened import Opened, check_size
from linvision.training.run_folder import RunFolder


class Named(NamedTuple):
    """A task and its data; none for published weights."""

    task: str
    data: str = ""
    val_split: float | None = None


def open_model(
    spec: str,
    *,
    checkpoint: str | None = None,
    img_size: int | None = None,
    tta: bool = False,
    device: torch.device | str = "cpu",
) -> Opened:
    """Open the run in folder ``spec``, or the model of that name with its published weights or those of a file.

    Args:
        spec: a run's folder or a model's name.
        checkpoint: weights to take instead of the run's or the published ones.
        img_size: side of the input in pixels; default the model's own.
        tta: average the outputs for each image and for the mirrored one.
        device: where the model is to be.

    Raises:
        UsageError, UnknownNameError: there is no such run or model.
        CheckpointError, OSError: its weights cannot be had.
    """
    folder = Path(spec).expanduser()
    if folder.is_dir():
        opened = _open_run(RunFolder(folder), checkpoint, img_size)
    else:
        opened = _open_named(spec, checkpoint, img_size)
    check_size(opened.model, opened.preprocess)
    opened.model.to(device)
    return replace(opened, model=Mirrored(opened.model)) if tta else opened


@dataclass(frozen=True)
class Run(Opened):
    """A trained model of a run, ready to answer for images."""

    def predict(self, images: Any, *, top_k: int = 5) -> Any:
        """Answer for an image, or a list of them: PIL images or paths.

        Returns:
            What ``linvision predict --json`` holds of an image, or a list of that; {"error": ...} where an image cannot
            be read or the outputs are no numbers.
        """
        several = isinstance(images, list | tuple)
        answers: list[dict[str, Any]] = []
        for image in images if several else [images]:
            try:
                picture = image if isinstance(image, Image.Image) else open_image(image)
                inputs = self.preprocess(upright_rgb(picture))[None].to(next(self.model.parameters()).device)
            except UnreadableImageError as error:
                answers.append({"error": str(error)})
                continue
            with torch.inference_mode():
                (found,) = get_task(self.task).answer(self, inputs, top_k=top_k)
            answers.append(found or {"error": "the model's outputs are no numbers (NaN)"})
        return answers if several else answers[0]


def load_run(
    folder: str | Path, *, img_size: int | None = None, tta: bool = False, device: torch.device | str = "cpu"
) -> Run:
    """Open the folder of a run for use: its ``model`` in eval mode, ``labels``, ``preprocess`` and ``predict``.

    Raises:
        UsageError: there is no run, or it has no weights yet.
        RunError, CheckpointError: its files are damaged.
    """
    if not Path(folder).expanduser().is_dir():
        raise UsageError(f"{folder} is no folder: give that of a run, such as runs/vil2_mini_patch4_32-digits-1")
    opened = open_model(str(folder), img_size=img_size, tta=tta, device=device)
    return Run(**{field.name: getattr(opened, field.name) for field in fields(Opened)})


def named_by(spec: str) -> Named:
    """Return what is known of ``spec`` without its model: a run's task and data, those of published weights."""
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        return Named("classify")
    card = RunFolder(folder).load_card()
    return Named(card.task, card.data, card.val_split)


class Mirrored(nn.Module):
    """A model whose outputs are averaged over each image and the one mirrored left to right."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model twice on images (B, 3, H, W)."""
        return (self.model(x) + self.model(x.flip(-1))) / 2


def _open_run(run: RunFolder, checkpoint: str | None, img_size: int | None) -> Opened:
    card = run.load_card()
    preprocess = card.preprocess
    model = create_model(str(run.path), checkpoint_path=checkpoint or run.weights())
    if img_size is not None:
        preprocess = replace(preprocess, size=(img_size, img_size))
        _set_size(model, img_size)
    return Opened(model, card.model, card.task, preprocess, card.classes, card.classes, card.data)


def _open_named(spec: str, checkpoint: str | None, img_size: int | None) -> Opened:
    name = resolve_name(spec)
    model = create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    if img_size is not None:
        _set_size(model, img_size)
    labels, titles = get_task("classify").names_of(model)
    return Opened(model, name, "classify", Preprocess.of_model(model, img_size), labels, titles)


def _set_size(model: Any, img_size: int) -> None:
    """Resize what a model learnt for each place; models that learnt no such thing take any size."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(img_size, img_size))
