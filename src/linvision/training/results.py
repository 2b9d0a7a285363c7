"""What a training run leaves behind: pictures and summary.json."""

import platform
import statistics
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from torch import nn

import linvision
from linvision.devices import cpu_name
from linvision.files import write_json
from linvision.training.callbacks import Recorder
from linvision.training.curves import draw_curves
from linvision.training.module import TrainingModule
from linvision.training.opened import count_parameters
from linvision.training.plan import Plan
from linvision.training.run_folder import RunFolder
from linvision.training.task import Measured


def finish(module: TrainingModule, plan: Plan, run: RunFolder, recorder: Recorder) -> Measured:
    """Measure the last weights, draw the pictures and write the summary."""
    task, opened = plan.task, plan.opened(module.final_model.to(plan.device).eval())
    precision = plan.options.precision
    measured = task.measure(opened, plan.test, data=plan.data, device=plan.device, precision=precision)
    title = f"{plan.settings.model} on {plan.data.name}"
    draw_curves(run.path / "curves.png", recorder.rows, title, task=task, best=recorder.best)
    task.draw(run.path, measured, plan.test, opened=opened, title=title)
    write_json(run.path / "summary.json", _summary(opened.model, plan, recorder, measured))
    return measured


def _summary(model: nn.Module, plan: Plan, recorder: Recorder, measured: Measured) -> dict[str, Any]:
    best = recorder.best
    gpu = torch.cuda.get_device_name() if plan.device.type == "cuda" else ""
    return {
        "task": plan.task.name,
        "model": plan.settings.model,
        "data": plan.options.data,
        "parameters": count_parameters(model),
        **measured.figures,
        "best": {plan.task.best.removeprefix("test_"): best[plan.task.best], "epoch": int(best["epoch"])},
        "epochs": len(recorder.rows),
        "seconds": round(sum(row["seconds"] for row in recorder.rows), 1),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in recorder.rows), 1),
        "test_images_per_second": round(measured.images_per_second, 1),
        "train_images": plan.train.num_images,
        "test_images": measured.num_images,
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
