"""What a training run needs before it starts: data, model and device, everything checked."""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from linvision.data import ArrayData, Batches, FolderData, Preprocess, open_data
from linvision.devices import choose_device
from linvision.errors import CheckpointError
from linvision.models import create_model, resolve_name
from linvision.tasks.loading import check_size, set_checkpointing, size_overrides
from linvision.tasks.options import Recipe, TrainOptions


@dataclass(frozen=True)
class Plan:
    """All that a run needs before it has a folder."""

    options: TrainOptions
    recipe: Recipe
    device: torch.device
    data: ArrayData | FolderData
    preprocess: Preprocess
    model: nn.Module
    train: Batches
    test: Batches

    def unreadable(self) -> dict[str, str]:
        """Return the reason for each image that was skipped so far, by its path."""
        return {**self.train.unreadable, **self.test.unreadable}


def prepare(options: TrainOptions, *, fresh: bool = True) -> Plan:
    """Open the data and build the model, everything checked.

    Args:
        options: of the command.
        fresh: load the published weights or the checkpoint file that the options ask for; a resumed run has its own.

    Raises:
        ValueError, OSError, RunError: for whatever is wrong with the options, the data or the weights.
    """
    recipe = options.recipe()
    recipe = replace(recipe, model=resolve_name(recipe.model))
    device = choose_device(options.device, options.precision)
    data = open_data(options.data, root=options.data_root)
    pl.seed_everything(options.seed, verbose=False)
    overrides: dict[str, Any] = size_overrides(recipe.model, recipe.img_size)
    if recipe.drop_path:
        overrides["drop_path_rate"] = recipe.drop_path
    if fresh and options.checkpoint:
        overrides |= {"checkpoint_path": options.checkpoint, "drop_head": options.drop_head}
    try:
        model = create_model(
            recipe.model, pretrained=fresh and options.pretrained, num_classes=len(data.classes), **overrides
        )
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("drop_head=True", "--drop-head")) from error
    set_checkpointing(model, options.checkpointing)
    preprocess = Preprocess.of_model(model, recipe.img_size)
    if isinstance(data, ArrayData):
        own = options.pretrained or options.checkpoint
        statistics = {} if own else {"mean": data.mean, "std": data.std}
        preprocess = replace(preprocess, crop_ratio=1.0, grey=data.grey, **statistics)
    check_size(model, preprocess)
    workers = options.workers if options.workers is not None else min(8, os.cpu_count() or 1)
    batches = {"batch_size": recipe.batch_size, "workers": workers}
    # Absolute, so that the run can be resumed from elsewhere.
    place = str(Path(options.data).expanduser().resolve()) if isinstance(data, FolderData) else options.data
    checkpoint = str(Path(options.checkpoint).resolve()) if options.checkpoint else None
    return Plan(
        options=replace(options, **{**asdict(recipe), "data": place, "checkpoint": checkpoint}),
        recipe=recipe,
        device=device,
        data=data,
        preprocess=preprocess,
        model=model.train(),
        train=data.train_batches(preprocess, seed=options.seed, **batches),
        test=data.test_batches(preprocess, **batches),
    )
