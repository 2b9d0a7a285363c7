"""What a training run leaves behind: pictures and summary.json."""

import platform
import statistics
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from torch import nn

import linvision
from linvision.data import Batches
from linvision.files import write_json
from linvision.tasks.callbacks import Recorder
from linvision.tasks.classify import Classifier
from linvision.tasks.evaluate import Measured, measure
from linvision.tasks.loading import count_parameters
from linvision.tasks.pictures import choose_examples, draw_confusion, draw_curves, draw_predictions
from linvision.tasks.plan import Plan
from linvision.tasks.run_folder import RunFolder


def finish(classifier: Classifier, plan: Plan, run: RunFolder, recorder: Recorder) -> Measured:
    """Measure the last weights, draw the pictures and write the summary."""
    model = classifier.final_model.to(plan.device).eval()
    measured = measure(model, plan.test, device=plan.device, precision=plan.options.precision)
    classes = plan.data.classes
    title = f"{plan.recipe.model} on {plan.data.name}"
    draw_curves(run.path / "curves.png", recorder.rows, title)
    confusion = measured.confusion(len(classes))
    draw_confusion(run.path / "confusion_matrix.png", confusion, classes, f"{title}: {measured.top1:.2%}")
    chosen = choose_examples(measured.predictions, measured.labels)
    images = plan.preprocess.denormalise(_take(plan.test, chosen))
    wrong = int((measured.predictions != measured.labels).sum())
    draw_predictions(
        run.path / "predictions.png",
        images,
        measured.predictions[chosen],
        measured.labels[chosen],
        classes,
        f"{title}: {wrong} of {len(measured.labels)} test images wrong",
    )
    write_json(run.path / "summary.json", _summary(model, plan, recorder, measured))
    return measured


def _take(batches: Batches, chosen: torch.Tensor) -> torch.Tensor:
    """Return the inputs at the given places, in ascending order, of a pass over ``batches``."""
    taken, start = [], 0
    for inputs, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            taken.append(inputs[here])
        start += len(labels)
        if start > chosen[-1]:
            break
    return torch.cat(taken)


def _summary(model: nn.Module, plan: Plan, recorder: Recorder, measured: Measured) -> dict[str, Any]:
    best = recorder.best
    gpu = torch.cuda.get_device_name() if plan.device.type == "cuda" else ""
    return {
        "model": plan.recipe.model,
        "data": plan.options.data,
        "parameters": count_parameters(model),
        "top1": measured.top1,
        "top5": measured.top5,
        "loss": measured.loss,
        "best": {"top1": best["test_top1"], "epoch": int(best["epoch"])},
        "epochs": len(recorder.rows),
        "seconds": round(sum(row["seconds"] for row in recorder.rows), 1),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in recorder.rows), 1),
        "test_images_per_second": round(measured.images_per_second, 1),
        "train_images": plan.train.num_images,
        "test_images": len(measured.labels),
        "unreadable": plan.unreadable(),
        "seed": plan.options.seed,
        "device": gpu or _cpu_name(),
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


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
