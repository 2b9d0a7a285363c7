"""What a training run leaves behind: pictures and summary.json."""

import os
import platform
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import linvision
from linvision.data import Batches
from linvision.devices import cpu_name
from linvision.files import write_json
from linvision.models import load_checkpoint
from linvision.training.callbacks import Recorder
from linvision.training.curves import draw_curves
from linvision.training.module import TrainingModule
from linvision.training.opened import count_parameters
from linvision.training.plan import Plan
from linvision.training.run_folder import RunFolder
from linvision.training.task import Measured


@dataclass(frozen=True)
class Outcome:
    """What a run has reached with the weights of its best epoch.

    Attributes:
        split: the images that it is quoted for: "test" where there is such a folder, else "validation".
        measured: on these.
        validation: on those that the best epoch was told by.
        epoch: the best.
    """

    split: str
    measured: Measured
    validation: Measured
    epoch: int


def finish(module: TrainingModule, plan: Plan, run: RunFolder, recorder: Recorder) -> Outcome:
    """Measure the best weights, draw the pictures and write the summary, all with these weights."""
    load_checkpoint(module.final_model, run.weights())
    task, opened = plan.task, plan.opened(module.final_model.to(plan.device).eval())

    def measure(batches: Batches) -> Measured:
        return task.measure(opened, batches, data=plan.data, device=plan.device, precision=plan.options.precision)

    validation = measure(plan.val)
    split, batches = ("validation", plan.val) if plan.test is None else ("test", plan.test)
    measured = validation if plan.test is None else measure(plan.test)
    outcome = Outcome(split, measured, validation, int(recorder.best["epoch"]))
    name = f"{plan.settings.model} on {plan.data.name}"
    note = "training: changed images and smoothed or mixed targets, as far as the settings ask; validation: plain ones"
    draw_curves(run.path / "curves.png", recorder.rows, name, task=task, best=recorder.best, note=note)
    title = f"{name}, {split}: {task.result_line(measured)} with the weights of epoch {outcome.epoch}"
    task.draw(run.path, measured, batches, opened=opened, title=title)
    write_json(run.path / "summary.json", _summary(opened.model, plan, recorder, outcome))
    _show_in_tensorboard(plan, run, outcome)
    return outcome


def _show_in_tensorboard(plan: Plan, run: RunFolder, outcome: Outcome) -> None:
    with SummaryWriter(os.fspath(run.path / "tensorboard")) as writer:
        for name in ("curves.png", *plan.task.pictures):
            with Image.open(run.path / name) as picture:
                writer.add_image(name.removesuffix(".png"), np.asarray(picture.convert("RGB")), dataformats="HWC")
        config = plan.config().items()
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in config}
        reached = {f"reached/{key}": value for key, value in outcome.measured.figures.items()}
        writer.add_hparams(settings, reached, run_name=".")


def _summary(model: nn.Module, plan: Plan, recorder: Recorder, outcome: Outcome) -> dict[str, Any]:
    measured = outcome.measured
    gpu = torch.cuda.get_device_name() if plan.device.type == "cuda" else ""
    return {
        "task": plan.task.name,
        "model": plan.settings.model,
        "data": plan.options.data,
        "parameters": count_parameters(model),
        "start": plan.start or "scratch",
        "measured_on": outcome.split,
        "weights": f"best.safetensors, epoch {outcome.epoch}",
        **measured.figures,
        "validation": outcome.validation.figures,
        "epochs": len(recorder.rows),
        "seconds": round(sum(row["seconds"] for row in recorder.rows), 1),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in recorder.rows), 1),
        "eval_images_per_second": round(measured.images_per_second, 1),
        "train_images": plan.train.num_images,
        "validation_images": outcome.validation.num_images,
        "measured_images": measured.num_images,
        "unreadable": plan.unreadable(),
        "seed": plan.options.seed,
        "device": gpu or cpu_name(),
        "precision": plan.options.precision,
        "threads": torch.get_num_threads(),
        "versions": {
            "linvision": linvision.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "pytorch_lightning": pl.__version__,
        },
    }
