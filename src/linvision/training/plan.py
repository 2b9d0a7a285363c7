"""What a training run needs before it starts: data, model and device, everything checked."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from linvision.data import ArrayData, Batches, FolderData, Preprocess
from linvision.devices import available_cpus, choose_device
from linvision.errors import CheckpointError, UsageError
from linvision.models import (
    architecture_of,
    create_model,
    is_run,
    is_source,
    resolve_name,
    set_checkpointing,
    size_overrides,
)
from linvision.training.module import check_optimizer
from linvision.training.opened import Opened, check_size
from linvision.training.run_folder import ModelCard, RunFolder
from linvision.training.settings import RunOptions, Settings
from linvision.training.task import Data, Task

OF_ARRAYS = ("rotate", "shift", "scale", "shear", "border")
OF_FOLDERS = ("crop_scale", "auto_augment", "color_jitter")


@dataclass(frozen=True)
class Plan:
    """All that a run needs before it has a folder."""

    task: Task
    options: RunOptions
    settings: Settings
    device: torch.device
    data: Data
    outputs: tuple[str, ...]
    preprocess: Preprocess
    model: nn.Module
    train: Batches
    val: Batches
    test: Batches | None = None
    start: str = ""

    def unreadable(self) -> dict[str, str]:
        """Return the reason for each image that was skipped so far, by its path."""
        parts = (self.train, self.val, *([self.test] if self.test else []))
        return {path: reason for part in parts for path, reason in part.unreadable.items()}

    def opened(self, model: nn.Module) -> Opened:
        """Return a trained model, ready for use."""
        name, outputs = self.settings.model, self.outputs
        return Opened(model, name, self.task.name, self.preprocess, outputs, outputs, self.options.data)

    def card(self) -> ModelCard:
        """Return what it will take to use the run's weights."""
        return ModelCard(
            model=self.settings.model,
            classes=self.outputs,
            preprocess=self.preprocess,
            data=self.options.data,
            task=self.task.name,
            pictures=self.task.pictures,
            model_kwargs=self.settings.model_kwargs,
            start=self.start,
            val_split=self.options.val_split,
            images=(self.train.num_images, self.val.num_images),
        )

    def config(self) -> dict[str, Any]:
        """Return what config.yaml holds: settings and options by their names on the command line."""
        return {**asdict(self.options), **asdict(self.settings)}


def prepare(
    task: Task,
    options: RunOptions,
    settings: Settings,
    *,
    fresh: bool = True,
    given: Sequence[str] = (),
    card: ModelCard | None = None,
) -> Plan:
    """Open the data and build the model, everything checked.

    Args:
        task: what is learnt.
        options: of the run.
        settings: of the run.
        given: names of the settings that the user has given, to be refused where they have no effect.
        fresh: load the published weights or the checkpoint file that the options ask for; a resumed run has its own.
        card: of the run that is resumed, whose pre-processing and start stay as they were.

    Raises:
        ValueError, OSError, RunError: for whatever is wrong with the options, the data or the weights.
    """
    source, settings = _named(settings)
    if card is not None and is_source(card.start):
        source = card.start if fresh else settings.model
    check_optimizer(settings.opt)
    device = choose_device(options.device, options.precision)
    data = task.open_data(
        options.data,
        root=options.data_root,
        val_split=options.val_split,
        cache=options.cache,
        max_pixels=options.max_pixels,
    )
    _check_changes(given, data)
    pl.seed_everything(options.seed, verbose=False)
    outputs = task.outputs(data)
    start = _start(source, options, settings) if card is None else card.start
    model = _build(source, options, settings, len(outputs), fresh=fresh)
    if settings.freeze == "backbone" and fresh and not start:
        raise UsageError("--freeze backbone needs weights to freeze: give --pretrained or --checkpoint FILE")
    set_checkpointing(model, options.checkpointing)
    preprocess = _preprocess(source, model, options, settings, data) if card is None else card.preprocess
    check_size(model, preprocess)
    workers = options.workers if options.workers is not None else min(8, available_cpus())
    batches = {"batch_size": settings.batch_size, "workers": workers}
    return Plan(
        task=task,
        options=_absolute(options, data),
        settings=settings,
        device=device,
        data=data,
        outputs=outputs,
        preprocess=preprocess,
        model=model.train(),
        train=data.train_batches(preprocess, settings, seed=options.seed, **batches),
        val=data.test_batches(preprocess, **batches),
        test=data.held_out_batches(preprocess, **batches) if isinstance(data, FolderData) else None,
        start=start,
    )


def _absolute(options: RunOptions, data: Data) -> RunOptions:
    """Make the options' paths absolute, so that the run can be resumed from elsewhere."""
    place = str(Path(options.data).expanduser().resolve()) if isinstance(data, FolderData) else options.data
    checkpoint = str(Path(options.checkpoint).resolve()) if options.checkpoint else None
    return replace(options, data=place, checkpoint=checkpoint)


def _named(settings: Settings) -> tuple[str, Settings]:
    """Return what the model is to be created by, and the settings that do without it once it has been."""
    source = resolve_name(settings.model)
    if not is_source(source):
        return source, replace(settings, model=source)
    if is_run(source) and settings.img_size is None:
        settings = replace(settings, img_size=RunFolder(Path(source)).load_card().preprocess.size[0])
    kind, colon, place = source.rpartition(":")
    if kind != "hf-hub":  # absolute, so that the run can be resumed from elsewhere
        source = f"{kind}{colon}{Path(place).expanduser().resolve()}"
    model, model_kwargs = architecture_of(source)
    return source, replace(settings, model=model, model_kwargs={**model_kwargs, **settings.model_kwargs})


def _start(source: str, options: RunOptions, settings: Settings) -> str:
    """Name the weights that training starts from."""
    if source != settings.model:
        return source
    return options.checkpoint or ("published weights" if options.pretrained else "")


def _check_changes(given: Sequence[str], data: Data) -> None:
    """Raise UsageError for random changes of images that are not for this kind of data."""
    others = OF_FOLDERS if isinstance(data, ArrayData) else OF_ARRAYS
    for name in given:
        if name in others:
            kind = "photographs in folders" if others is OF_FOLDERS else "small images in memory"
            raise UsageError(f"--{name.replace('_', '-')} is for {kind}: it has no effect on {data.name}")


def _build(source: str, options: RunOptions, settings: Settings, num_outputs: int, *, fresh: bool) -> nn.Module:
    overrides: dict[str, Any] = {**settings.model_kwargs, **size_overrides(settings.model, settings.img_size)}
    if settings.drop_path:
        overrides["drop_path_rate"] = settings.drop_path
    if fresh and options.checkpoint:
        overrides |= {"checkpoint_path": options.checkpoint, "drop_head": options.drop_head}
    try:
        return create_model(source, pretrained=fresh and options.pretrained, num_classes=num_outputs, **overrides)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("drop_head=True", "--drop-head")) from error


def _preprocess(source: str, model: nn.Module, options: RunOptions, settings: Settings, data: Data) -> Preprocess:
    preprocess = Preprocess.of_model(model, settings.img_size)
    if is_run(source):
        learnt = RunFolder(Path(source)).load_card().preprocess
        return replace(learnt, size=preprocess.size)
    if not isinstance(data, ArrayData):
        return preprocess
    own = options.pretrained or options.checkpoint
    statistics = {} if own else {"mean": data.mean, "std": data.std}
    return replace(preprocess, crop_ratio=1.0, grey=data.grey, **statistics)
