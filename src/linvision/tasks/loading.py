"""Models for the commands: built for a data set, or opened by name or run folder with their labels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from linvision.data import Preprocess
from linvision.errors import UsageError
from linvision.models import create_model, list_models, load_checkpoint, resolve_name
from linvision.tasks.options import Checkpointing
from linvision.tasks.run_folder import RunFolder


def size_overrides(name: str, img_size: int | None) -> dict[str, Any]:
    """Return the ``img_size`` argument for a model that is built for one size; convolutional networks take any."""
    cfg = get_pretrained_cfg(name)
    ours = {split_model_name_tag(known)[0] for known in list_models()}
    sized = split_model_name_tag(name)[0] in ours or (cfg is not None and cfg.fixed_input_size)
    return {"img_size": img_size} if sized and img_size is not None else {}


def check_size(model: nn.Module, preprocess: Preprocess) -> None:
    """Run the model once on an empty image.

    Raises:
        UsageError: it does not take images of this size.
    """
    model.eval()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, *preprocess.size))
    except (ValueError, RuntimeError, AssertionError) as error:
        height, width = preprocess.size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{type(model).__name__} does not take {height}x{width} images: {reason}") from error


def set_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Let a model recompute activations in the backward pass of its training.

    Raises:
        UsageError: the model does not have this kind; "selective" is for the package's own.
    """
    if checkpointing == "none":
        return
    enable: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        enable(**({"selective": True} if checkpointing == "selective" else {}))
    except (TypeError, AssertionError) as error:  # timm's way to say so
        raise UsageError(f"--checkpointing {checkpointing}: {type(model).__name__} does not have it") from error


@dataclass(frozen=True)
class Opened:
    """A model that is ready to classify.

    Attributes:
        model: in eval mode, on its device.
        name: registered name.
        preprocess: from an image to an input.
        labels: what each output is called in a data set's folders, such as WordNet identifiers.
        titles: what each output is called by people.
        data: the data set that a run was trained on; empty for published weights.
    """

    model: nn.Module
    name: str
    preprocess: Preprocess
    labels: tuple[str, ...]
    titles: tuple[str, ...]
    data: str = ""


def open_model(
    spec: str, *, checkpoint: str | None = None, img_size: int | None = None, device: torch.device
) -> Opened:
    """Open the run in folder ``spec``, or the model of that name with its published weights or those of a file.

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
    return opened


def _open_run(run: RunFolder, checkpoint: str | None, img_size: int | None) -> Opened:
    card = run.load_card()
    preprocess = card.preprocess
    trained_size = size_overrides(card.model, preprocess.size[0])
    model = create_model(card.model, num_classes=len(card.classes), **trained_size)
    load_checkpoint(model, checkpoint or run.weights())
    if img_size is not None:
        preprocess = replace(preprocess, size=(img_size, img_size))
        _set_size(model, img_size)
    return Opened(model, card.model, preprocess, card.classes, card.classes, card.data)


def _open_named(spec: str, checkpoint: str | None, img_size: int | None) -> Opened:
    name = resolve_name(spec)
    model = create_model(name, pretrained=checkpoint is None, checkpoint_path=checkpoint)
    if img_size is not None:
        _set_size(model, img_size)
    labels, titles = _imagenet_names(model)
    return Opened(model, name, Preprocess.of_model(model, img_size), labels, titles)


def _set_size(model: Any, img_size: int) -> None:
    """Resize what a model learnt for each place; models that learnt no such thing take any size."""
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(img_size, img_size))


def _imagenet_names(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the WordNet identifiers and the descriptions of a model's outputs, or plain numbers for other models."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        numbers = tuple(f"class {index}" for index in range(int(getattr(model, "num_classes", 0) or 0)))
        return numbers, numbers
    info = ImageNetInfo(subset)
    labels = tuple(info.label_names())
    return labels, tuple(info.index_to_description(index) for index in range(len(labels)))


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
