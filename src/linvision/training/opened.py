"""A model that is ready for use, with all that its inputs and outputs need."""

from dataclasses import dataclass

import torch
from torch import nn

from linvision.data import Preprocess
from linvision.errors import UsageError


@dataclass(frozen=True)
class Opened:
    """A model that is ready for use.

    Attributes:
        model: in eval mode, on its device.
        name: registered name.
        task: what it was trained for.
        preprocess: from an image to an input.
        labels: what each output is called in a data set, such as WordNet identifiers.
        titles: what each output is called by people.
        data: the data set that a run was trained on; empty for published weights.
    """

    model: nn.Module
    name: str
    task: str
    preprocess: Preprocess
    labels: tuple[str, ...]
    titles: tuple[str, ...]
    data: str = ""


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


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
