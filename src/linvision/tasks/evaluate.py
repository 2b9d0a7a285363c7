"""Measuring a classifier: top-1, top-5, loss, by class, images a second; the command ``linvision eval``."""

import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linvision.console import notes, output, with_bar, write_json
from linvision.data import Batches, open_test_data
from linvision.devices import AUTOCAST, Device, Precision, choose_device
from linvision.errors import UsageError
from linvision.tasks.loading import Opened, open_model


@dataclass(frozen=True)
class EvalOptions:
    """What to measure, on what.

    Attributes:
        model: a run folder, or the name of a model with published weights
        data: digits, fashion-mnist, mnist, cifar10, cifar100, or a folder with val/ or with a folder of images for
            every class; default what the run was trained on
        checkpoint: weights to use instead of the run's or the published ones
        batch_size: images in a step
        img_size: side of the input in pixels; default the model's own
        by_class: show the accuracy of each class
        json: write the result as JSON
        device: auto takes a GPU if there is one
        precision: of the matrix products; 16 needs a GPU
        workers: processes that decode images of a folder
        data_root: folder of downloaded data; default $LINVISION_DATA or ~/.cache/linvision
    """

    model: str | None = None
    data: str | None = None
    checkpoint: str | None = None
    batch_size: int = 64
    img_size: int | None = None
    by_class: bool = False
    json: bool = False
    device: Device = "auto"
    precision: Precision = "32"
    workers: int = 2
    data_root: str | None = None


@dataclass(frozen=True)
class Measured:
    """The outcome of a pass over test images, in their order."""

    predictions: Tensor
    labels: Tensor
    top5: float
    loss: float
    seconds: float

    @property
    def top1(self) -> float:
        """The share of images whose most probable class is theirs."""
        return (self.predictions == self.labels).float().mean().item()

    @property
    def images_per_second(self) -> float:
        """Speed, reading the images included."""
        return len(self.labels) / self.seconds

    def confusion(self, num_classes: int) -> Tensor:
        """Count images by label (rows) and prediction (columns)."""
        cells = self.labels * num_classes + self.predictions
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def measure(
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    precision: Precision = "32",
    label_map: Tensor | None = None,
) -> Measured:
    """Classify all of ``batches`` with a model that is in eval mode on ``device``.

    ``label_map`` gives the model's output for each label of the data, where those differ.
    """
    dtype = AUTOCAST[precision]
    predictions, labels, losses, hits = [], [], [], []
    began = time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
        for inputs, targets in with_bar(batches, len(batches), "measuring"):
            if not len(targets):
                continue
            targets = targets if label_map is None else label_map[targets]
            logits = model(inputs.to(device)).float().cpu()
            top5 = logits.topk(min(5, logits.shape[1])).indices
            predictions.append(top5[:, 0])
            labels.append(targets)
            hits.append((top5 == targets[:, None]).any(dim=1))
            losses.append(cross_entropy(logits, targets, reduction="none"))
    seconds = time.perf_counter() - began
    return Measured(
        torch.cat(predictions), torch.cat(labels), _mean(torch.cat(hits)), _mean(torch.cat(losses)), seconds
    )


def evaluate(options: EvalOptions) -> int:
    """Run ``linvision eval``."""
    if options.model is None:
        raise UsageError("eval needs --model: a run folder, or the name of a model with published weights")
    if options.batch_size < 1:
        raise UsageError(f"--batch-size {options.batch_size} is out of range: it must be at least 1")
    device = choose_device(options.device, options.precision)
    opened = open_model(options.model, checkpoint=options.checkpoint, img_size=options.img_size, device=device)
    name = options.data or opened.data
    if not name:
        raise UsageError("eval needs --data: a folder of images, or a data set's name")
    data = open_test_data(name, root=options.data_root)
    label_map = match_labels(data.classes, opened, name)
    batches = data.test_batches(opened.preprocess, batch_size=options.batch_size, workers=options.workers)
    measured = measure(opened.model, batches, device=device, precision=options.precision, label_map=label_map)
    by_class = _by_class(measured, label_map, opened) if options.by_class else {}
    if options.json:
        write_json(_as_json(options, opened, name, measured, by_class, batches))
    else:
        _show(opened, name, measured, by_class)
    for reason in batches.unreadable.values():
        notes().print(f"skipped: {reason}", markup=False)
    return 0


def match_labels(classes: tuple[str, ...], opened: Opened, name: str) -> Tensor:
    """Return the model's output for each class of the data, by equal names.

    For published weights as many folders as there are outputs will do: by their numbers, or in order.

    Raises:
        UsageError: the classes are not among the model's.
    """
    index = {label: output for output, label in enumerate(opened.labels)}
    if all(label in index for label in classes):
        return torch.tensor([index[label] for label in classes])
    if len(classes) == len(index) and not opened.data:
        numbered = sorted(classes) == sorted(map(str, range(len(classes))))
        return torch.tensor([int(label) for label in classes]) if numbered else torch.arange(len(classes))
    unknown = [label for label in classes if label not in index]
    raise UsageError(
        f"{name} has {len(classes)} classes but {opened.name} tells {len(opened.labels)} others apart: "
        f"it does not know {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; "
        f"its first is {opened.labels[0]}"
    )


def _by_class(measured: Measured, label_map: Tensor, opened: Opened) -> dict[str, tuple[int, float]]:
    """Return the number of images and the accuracy of each class that has any."""
    result = {}
    for label in label_map.tolist():
        of_class = measured.labels == label
        if of_class.any():
            hits = (measured.predictions[of_class] == label).float().mean().item()
            result[opened.titles[label]] = (int(of_class.sum()), hits)
    return result


def _as_json(
    options: EvalOptions,
    opened: Opened,
    name: str,
    measured: Measured,
    by_class: dict[str, tuple[int, float]],
    batches: Batches,
) -> dict:
    result = {
        "model": opened.name,
        "data": name,
        "images": len(measured.labels),
        "top1": measured.top1,
        "top5": measured.top5,
        "loss": measured.loss,
        "images_per_second": measured.images_per_second,
        "skipped": sorted(batches.unreadable),
    }
    if options.by_class:
        result["by_class"] = {title: {"images": n, "top1": top1} for title, (n, top1) in by_class.items()}
    return result


def _show(opened: Opened, name: str, measured: Measured, by_class: dict[str, tuple[int, float]]) -> None:
    console = output()
    console.print(
        f"{opened.name} on {name}: top-1 {measured.top1:.2%}, top-5 {measured.top5:.2%}, loss {measured.loss:.4f}; "
        f"{len(measured.labels)} images, {measured.images_per_second:,.0f} images/s",
        markup=False,
    )
    if by_class:
        table = Table("class", "images", "top-1")
        for title, (count, top1) in by_class.items():
            table.add_row(title, str(count), f"{top1:.2%}")
        console.print(table)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
