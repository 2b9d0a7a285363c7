"""Classification: what it records, how it is measured, and what it draws."""

import math
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
from linvision.data import Batches, class_weights
from linvision.devices import Precision, autocast_dtype
from linvision.tasks.classifier import Classifier
from linvision.tasks.labels import imagenet_part, match_labels, unique
from linvision.tasks.pictures import Examples, choose_examples, draw_confusion, draw_predictions
from linvision.training.opened import Opened
from linvision.training.settings import Settings
from linvision.training.task import Curve, Data, Measured, Task, take


@dataclass(frozen=True, kw_only=True)
class Classified(Measured):
    """The outcome of a pass over images, in their order: figures "top1", "top5", "f1" (macro) and "loss".

    Where not all of the model's outputs are ranked, "ranked_classes" is their number and ``part`` what they are of.
    """

    predictions: Tensor
    labels: Tensor
    probabilities: Tensor
    part: str = ""

    def confusion(self, num_classes: int) -> Tensor:
        """Count images by label (rows) and prediction (columns), those without a prediction left out."""
        cells = (self.labels * num_classes + self.predictions)[self.predictions >= 0]
        return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


class Classification(Task):
    """Which of several classes an image shows."""

    name = "classify"
    columns = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5")
    best, highest = "val_top1", True
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

    def module(self, model: nn.Module, settings: Settings, *, outputs: tuple[str, ...], batches: Batches) -> Classifier:
        """Make the Lightning module."""
        weights = class_weights(batches.labels, len(outputs)) if settings.balance == "loss" else None
        return Classifier(
            model, settings, num_classes=len(outputs), steps_per_epoch=len(batches), class_weights=weights
        )

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
        return f"loss {row['train_loss']:.3f}  train {row['train_top1']:.2%}  val {row['val_top1']:.2%}"

    def result_line(self, measured: Measured) -> str:
        """Summarise what a run has reached."""
        return f"accuracy {measured.figures['top1']:.2%}"

    def eval_line(self, measured: Measured) -> str:
        """Summarise a measurement."""
        top1, top5, f1, loss = (measured.figures[name] for name in ("top1", "top5", "f1", "loss"))
        part = cast(Classified, measured).part
        among = f" among the {measured.figures['ranked_classes']:.0f} classes of {part}" if part else ""
        return f"top-1 {top1:.2%}, top-5 {top5:.2%}, macro F1 {f1:.2%}, loss {loss:.4f}{among}"

    def by_class(self, measured: Measured, opened: Opened) -> tuple[dict[str, dict[str, float]], Table]:
        """Return the number of images, precision, recall (the class's top-1) and F1 of each class that has any."""
        measured, content = cast(Classified, measured), {}
        table = Table("class", "images", "precision", "recall", "F1")
        shares = class_shares(measured.confusion(len(opened.titles)))
        for label in measured.labels.unique().tolist():
            precision, recall, f1 = (share[label].item() for share in shares)
            count = int((measured.labels == label).sum())
            content[opened.titles[label]] = {
                "images": count, "top1": recall, "precision": precision, "recall": recall, "f1": f1,
            }  # fmt: skip
            table.add_row(escape(opened.titles[label]), str(count), *(f"{x:.2%}" for x in (precision, recall, f1)))
        return content, table

    def draw(self, folder: Path, measured: Measured, batches: Batches, *, opened: Opened, title: str) -> None:
        """Draw the confusion matrix, and test images with what they were taken for."""
        measured, classes = cast(Classified, measured), opened.titles
        reached = f"{title}: {measured.figures['top1']:.2%}"
        draw_confusion(folder / "confusion_matrix.png", measured.confusion(len(classes)), classes, reached)
        wrong = measured.predictions != measured.labels
        chosen = choose_examples(wrong)
        images = opened.preprocess.denormalise(take(batches, chosen))
        groups = []
        for name, those in (("mistakes", wrong), ("right answers", ~wrong)):
            here = those[chosen]
            answers = (measured.predictions, measured.labels, measured.probabilities)
            heading = f"{int(here.sum())} of the {int(those.sum())} {name}"
            groups.append(Examples(heading, images[here], *(values[chosen][here] for values in answers)))
        draw_predictions(folder / "predictions.png", groups, classes, title)

    def answer(self, opened: Opened, inputs: Tensor, *, top_k: int) -> list[dict[str, Any] | None]:
        """Return the most probable classes, by falling probability."""
        logits = opened.model(inputs).float()
        probabilities, classes = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]))
        answers: list[dict[str, Any] | None] = []
        for shares, indices in zip(probabilities.tolist(), classes.tolist(), strict=True):
            named = [
                {"index": i, "label": opened.labels[i], "title": opened.titles[i], "probability": round(share, 4)}
                for i, share in zip(indices, shares, strict=True)
            ]
            answers.append(None if any(map(math.isnan, shares)) else {"predictions": named})
        return answers

    def answer_rows(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """Lay an answer out, a class each."""
        return [{"rank": rank, **line} for rank, line in enumerate(answer["predictions"], 1)]

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
    parts: list[tuple[Tensor, ...]] = []
    began = time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, dtype) if dtype else nullcontext():
        for inputs, targets in with_bar(batches, len(batches), "measuring"):
            if not len(targets):
                continue
            targets = targets if label_map is None else label_map[targets]
            logits = model(inputs.to(device)).float().cpu()
            if ranked is not None:
                logits = torch.full_like(logits, -torch.inf).index_copy(1, ranked, logits[:, ranked])
            parts.append(_graded(logits, targets))
    seconds = time.perf_counter() - began
    prediction, label, probability, hit, loss = (torch.cat(column) for column in zip(*parts, strict=True))
    sound = prediction >= 0
    figures = {"top1": _mean(prediction == label), "top5": _mean(hit), "loss": _mean(loss[sound])}
    measured = Classified(
        figures=figures,
        num_images=len(label),
        seconds=seconds,
        not_numbers=int((~sound).sum()),
        predictions=prediction,
        labels=label,
        probabilities=probability,
    )
    f1 = class_shares(measured.confusion(logits.shape[1]))[2]
    figures["f1"] = _mean(f1[label.unique()])
    if ranked is not None:
        figures["ranked_classes"] = float(len(ranked))
    return measured


def _graded(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return predictions, labels, probabilities, whether the label is among the first five, losses.

    Outputs that are no numbers are no prediction: -1, and never right.
    """
    probability = logits.softmax(dim=1).max(dim=1).values
    sound = ~probability.isnan()
    top5 = logits.topk(min(5, logits.shape[1])).indices.where(sound[:, None], -1)
    hit = (top5 == labels[:, None]).any(dim=1)
    return top5[:, 0], labels, probability, hit, cross_entropy(logits, labels, reduction="none")


def class_shares(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return precision, recall and F1 of each class from counts by label (rows) and prediction; 0 where undefined."""
    hits, counts = confusion.diagonal().double(), confusion.double()
    predicted, labelled = counts.sum(0), counts.sum(1)
    precision, recall, f1 = (hits / n.clamp(min=1e-9) for n in (predicted, labelled, (predicted + labelled) / 2))
    return precision, recall, f1


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
