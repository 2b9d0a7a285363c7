"""The command ``linvision predict``: the most probable classes of images, files, folders and globs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from linvision.console import notes, output, with_bar, write_json
from linvision.data import find_images, open_image
from linvision.devices import Device, choose_device
from linvision.errors import UnreadableImageError, UsageError
from linvision.tasks.loading import Opened, open_model


@dataclass(frozen=True)
class PredictOptions:
    """What to classify, with what.

    Attributes:
        images: image files, folders (searched through) and quoted patterns such as "photos/**/*.jpg"
        model: a run folder, or the name of a model with published weights
        checkpoint: weights to use instead of the run's or the published ones
        top_k: classes to show for each image
        img_size: side of the input in pixels; default the model's own
        batch_size: images in a step
        json: write the result as JSON
        device: auto takes a GPU if there is one
    """

    images: list[str]
    model: str = "vil2-tiny"
    checkpoint: str | None = None
    top_k: int = 5
    img_size: int | None = None
    batch_size: int = 16
    json: bool = False
    device: Device = "auto"


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: classes by falling probability, or the reason why there is none."""

    image: str
    classes: tuple[tuple[int, float], ...] = ()
    error: str = ""


def predict(options: PredictOptions) -> int:
    """Run ``linvision predict``; returns 1 where an image could not be read."""
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    paths, unmatched = expand(options.images)
    if not paths:
        raise UsageError(f"no image found at {', '.join(unmatched)}")
    device = choose_device(options.device)
    opened = open_model(options.model, checkpoint=options.checkpoint, img_size=options.img_size, device=device)
    answers = classify(opened, paths, top_k=options.top_k, batch_size=options.batch_size, device=device)
    predictions = [*with_bar(answers, len(paths), "classifying")]
    predictions += [Prediction(argument, error=f"no image found at {argument}") for argument in unmatched]
    failures = [prediction for prediction in predictions if prediction.error]
    if options.json:
        write_json([_as_json(prediction, opened) for prediction in predictions])
    elif len(failures) < len(predictions):
        _show([prediction for prediction in predictions if not prediction.error], opened)
    for failure in failures:
        notes().print(failure.error, markup=False)
    return 1 if failures else 0


def expand(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Return the image files that the arguments stand for, each once, and the arguments that stand for none."""
    paths: dict[Path, None] = {}
    unmatched = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            found = list(find_images(path))
        elif path.exists():
            found = [path]
        else:
            matches = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            found = [image for match in matches for image in (find_images(match) if match.is_dir() else [match])]
        if not found:
            unmatched.append(argument)
        paths |= dict.fromkeys(found)
    return list(paths), unmatched


def classify(
    opened: Opened, paths: list[Path], *, top_k: int, batch_size: int, device: torch.device
) -> Iterator[Prediction]:
    """Yield the prediction of each image, in order."""
    for start in range(0, len(paths), batch_size):
        inputs, failures = _read(opened, paths[start : start + batch_size])
        answers = _top(opened, inputs, top_k, device) if inputs else {}
        for path in paths[start : start + batch_size]:
            yield Prediction(str(path), answers.get(path, ()), failures.get(path, ""))


def _read(opened: Opened, paths: list[Path]) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    inputs, failures = {}, {}
    for path in paths:
        try:
            inputs[path] = opened.preprocess(open_image(path))
        except UnreadableImageError as error:
            failures[path] = str(error)
    return inputs, failures


@torch.inference_mode()
def _top(
    opened: Opened, inputs: dict[Path, Tensor], top_k: int, device: torch.device
) -> dict[Path, tuple[tuple[int, float], ...]]:
    logits = opened.model(torch.stack(list(inputs.values())).to(device)).float()
    probabilities, classes = logits.softmax(dim=1).topk(min(top_k, logits.shape[1]))
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return {path: tuple(zip(*pair, strict=True)) for path, pair in zip(inputs, pairs, strict=True)}


def _as_json(prediction: Prediction, opened: Opened) -> dict:
    if prediction.error:
        return {"image": prediction.image, "error": prediction.error}
    classes = [
        {"index": index, "label": opened.labels[index], "title": opened.titles[index], "probability": probability}
        for index, probability in prediction.classes
    ]
    return {"image": prediction.image, "predictions": classes}


def _show(predictions: list[Prediction], opened: Opened) -> None:
    table = Table("image", "class", "probability")
    for prediction in predictions:
        for rank, (index, probability) in enumerate(prediction.classes):
            last = rank == len(prediction.classes) - 1
            image = prediction.image if rank == 0 else ""
            table.add_row(_plain(image), _plain(opened.titles[index]), f"{probability:.1%}", end_section=last)
    output().print(table)


def _plain(text: str) -> str:
    """Keep square brackets in names from being read as markup."""
    return text.replace("[", r"\[")
