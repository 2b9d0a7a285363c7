"""Classification: what it records, how it is measured, and what it draws."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.markup import escape
from rich.table import Table
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from linvision.console import with_bar
from linvision.data import Batches
from linvision.devices import Precision, autocast_dtype
from linvision.tasks.classifier import Classifier
from linvision.tasks.labels import imagenet_part, match_labels, unique
from linvision.tasks.pictures import choose_examples, draw_confusion, draw_predictions
from linvision.training.opened import Opened
from linvision.training.settings import Settings
from linvision.training.task import Curve, Data, Measured, Task, take


@dataclass(frozen=True)
class Classified(Measured):
    """The outcome of a pass over test images, in their order: figures "top1", "top5" and "loss".

    Where not all of the model's outputs are ranked, "ranked_classes" is their number and ``part`` what they are of.
    """

    predictions: Tensor
    labels: Tensor
    part: str = ""

    def confusion(self, num_classes: int) -> Tensor:
        """Count images by label (rows) and prediction (columns)."""
        cells = self.labels * num_classes + self.predictions
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


class Classification(Task):
    """Which of several classes an image shows."""

    name = "classify"
    columns = ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5")
    best, highest = "test_top1", True
    curves = (Curve("loss", "loss"), Curve("top1", "top-1 accuracy, %", 100))
    pictures = ("predictions.png", "confusion_matrix.png")

    def outputs(self, data: Data) -> tuple[str, ...]:
        """Name the classes."""
        return data.classes

    def names_of(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return ImageNet's identifiers and descriptions of a model's outputs, or numbers for other models."""
        subset = infer_imagenet_subset(model)
        if subset is None:
            numbers = tuple(f"class {index}" for index in range(int(getattr(model, "num_classes", 0) or 0)))
            return numbers, numbers
        info = ImageNetInfo(subset)
        labels = tuple(info.label_names())
        return labels, unique([info.index_to_description(index) for index in range(len(labels))], labels)

    def module(
        self, model: nn.Module, settings: Settings, *, outputs: tuple[str, ...], steps_per_epoch: int
    ) -> Classifier:
        """Make the Lightning module."""
        return Classifier(model, settings, num_classes=len(outputs), steps_per_epoch=steps_per_epoch)

    def measure(
        self, opened: Opened, batches: Batches, *, data: Data, device: torch.device, precision: Precision
    ) -> Classified:
        """Classify all images and compare with their classes, told by their names (``match_labels``).

        On ImageNet-A and -R a model of ImageNet's classes ranks those that are there, as is the custom.
        """
        label_map = match_labels(data.classes, opened, data.name)
        part = imagenet_part(label_map, opened)
        ranked = label_map if part else None
        measured = classify(
            opened.model, batches, device=device, precision=precision, label_map=label_map, ranked=ranked
        )
        return replace(measured, part=part)

    def format(self, column: str, value: float) -> str:
        """Write losses as they are, accuracies in percent."""
        return f"{value:.3f}" if column.endswith("loss") else f"{value:.2%}"

    def epoch_line(self, row: dict[str, float]) -> str:
        """Summarise an epoch."""
        return f"loss {row['train_loss']:.3f}  train {row['train_top1']:.2%}  test {row['test_top1']:.2%}"

    def result_line(self, measured: Measured) -> str:
        """Summarise what a run has reached."""
        return f"test accuracy {measured.figures['top1']:.2%}"

    def eval_line(self, measured: Measured) -> str:
        """Summarise a measurement."""
        top1, top5, loss = (measured.figures[name] for name in ("top1", "top5", "loss"))
        part = cast(Classified, measured).part
        among = f" among the {measured.figures['ranked_classes']:.0f} classes of {part}" if part else ""
        return f"top-1 {top1:.2%}, top-5 {top5:.2%}, loss {loss:.4f}{among}"

    def by_class(self, measured: Measured, opened: Opened) -> tuple[dict[str, dict[str, float]], Table]:
        """Return the number of images and the accuracy of each class that has any."""
        measured, content, table = cast(Classified, measured), {}, Table("class", "images", "top-1")
        for label in measured.labels.unique().tolist():
            of_class = measured.labels == label
            count, top1 = int(of_class.sum()), (measured.predictions[of_class] == label).float().mean().item()
            content[opened.titles[label]] = {"images": count, "top1": top1}
            table.add_row(escape(opened.titles[label]), str(count), f"{top1:.2%}")
        return content, table

    def draw(self, folder: Path, measured: Measured, batches: Batches, *, opened: Opened, title: str) -> None:
        """Draw the confusion matrix, and test images with what they were taken for."""
        measured, classes = cast(Classified, measured), opened.titles
        reached = f"{title}: {measured.figures['top1']:.2%}"
        draw_confusion(folder / "confusion_matrix.png", measured.confusion(len(classes)), classes, reached)
        chosen = choose_examples(measured.predictions, measured.labels)
        wrong = int((measured.predictions != measured.labels).sum())
        draw_predictions(
            folder / "predictions.png",
            opened.preprocess.denormalise(take(batches, chosen)),
            measured.predictions[chosen],
            measured.labels[chosen],
            classes,
            f"{title}: {wrong} of {len(measured.labels)} test images wrong",
        )

    def answer(self, opened: Opened, inputs: Tensor, *, top_k: int) -> list[dict[str, Any]]:
        """Return the most probable classes, by falling probability."""
        logits = opened.model(inputs).float()
        probabilities, classes = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]))
        return [
            {
                "predictions": [
                    {"index": index, "label": opened.labels[index], "title": opened.titles[index], "probability": share}
                    for index, share in zip(*pair, strict=True)
                ]
            }
            for pair in zip(classes.tolist(), probabilities.tolist(), strict=True)
        ]

    def answer_table(self, answers: Sequence[tuple[str, dict[str, Any]]]) -> Table:
        """Lay classes and probabilities out, a line each."""
        table = Table("image", "class", "probability")
        for path, answer in answers:
            for rank, line in enumerate(answer["predictions"]):
                last = rank == len(answer["predictions"]) - 1
                image = escape(path) if rank == 0 else ""
                table.add_row(image, escape(line["title"]), f"{line['probability']:.1%}", end_section=last)
        return table


def classify(
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    precision: Precision = "32",
    label_map: Tensor | None = None,
    ranked: Tensor | None = None,
) -> Classified:
    """Classify all of ``batches`` with a model that is in eval mode on ``device``.

    ``label_map`` gives the model's output for each label of the data, where those differ. ``ranked`` names the outputs
    that are ranked; default all.
    """
    dtype = autocast_dtype(precision)
    predictions, labels, losses, hits = [], [], [], []
    began = time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
        for inputs, targets in with_bar(batches, len(batches), "measuring"):
            if not len(targets):
                continue
            targets = targets if label_map is None else label_map[targets]
            logits = model(inputs.to(device)).float().cpu()
            if ranked is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy(1, ranked, logits[:, ranked])
            top5 = logits.topk(min(5, logits.shape[1])).indices
            predictions.append(top5[:, 0])
            labels.append(targets)
            hits.append((top5 == targets[:, None]).any(dim=1))
            losses.append(cross_entropy(logits, targets, reduction="none"))
    seconds = time.perf_counter() - began
    prediction, label = torch.cat(predictions), torch.cat(labels)
    top1 = (prediction == label).float().mean().item()
    figures = {"top1": top1, "top5": _mean(torch.cat(hits)), "loss": _mean(torch.cat(losses))}
    if ranked is not None:
        figures["ranked_classes"] = float(len(ranked))
    return Classified(figures, len(label), seconds, prediction, label)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
