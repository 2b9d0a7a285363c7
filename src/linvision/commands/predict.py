"""The command ``linvision predict``: answers for images, files, folders and globs."""

import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linvision.console import notes, output, with_bar, write_json
from linvision.devices import Device, available_cpus, choose_device
from linvision.errors import UsageError, printable
from linvision.files import as_json
from linvision.tasks import get_task
from linvision.training.settings import check_ranges

if TYPE_CHECKING:
    import torch

    from linvision.training.opened import Opened
    from linvision.training.task import Task

EXAMPLE = """linvision predict --model vil2-tiny cat.jpg "holiday/**/*.png"
  linvision predict --model runs/photos-1 holiday/ --top-k 1 --csv > holiday.csv"""
FEW = 64  # images that are decoded before a process for it would have started


@dataclass(frozen=True)
class Options:
    """What to classify, with what.

    Attributes:
        images: image files, folders (searched through) and quoted patterns such as "photos/**/*.jpg"
        model: a run folder, or the name of a model with published weights
        checkpoint: weights to use instead of the run's or the published ones
        top_k: classes to show for each image
        img_size: side of the input in pixels; default the model's own
        tta: average the outputs for each image and for the mirrored one
        batch_size: images in a step
        json: write the result as JSON
        jsonl: write a JSON object a line, each as soon as it is known
        csv: write a line of comma-separated values for each class shown, as soon as it is known
        workers: processes that decode images; default none for few images, else the CPUs that may be used, at most 8
        device: auto takes a GPU if there is one
        max_pixels: larger images are skipped, since decoding takes up to 8 bytes a pixel
    """

    images: list[str]
    model: str = "vil2-tiny"
    checkpoint: str | None = None
    top_k: int = 5
    img_size: int | None = None
    tta: bool = False
    batch_size: int = 16
    json: bool = False
    jsonl: bool = False
    csv: bool = False
    workers: int | None = None
    device: Device = "auto"
    max_pixels: int = 128_000_000


@dataclass(frozen=True)
class Prediction:
    """The answer for one image, or the reason why there is none."""

    image: str
    answer: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def entry(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {"image": self.image, **(self.answer or {"error": self.error})}


def run(options: Options) -> int:
    """Run ``linvision predict``; returns 1 where an image could not be read."""
    check_ranges(vars(options))
    paths, unmatched = expand(options.images)
    if not paths:
        raise UsageError(f"no image found at {', '.join(unmatched)}")
    from linvision.tasks.opened import open_model

    device = choose_device(options.device)
    opened = open_model(
        options.model, checkpoint=options.checkpoint, img_size=options.img_size, tta=options.tta, device=device
    )
    workers = options.workers if options.workers is not None else _workers(len(paths))
    found = answer(opened, paths, options, workers=workers, device=device)
    predictions = chain(
        with_bar(found, len(paths), "predicting"),
        (Prediction(argument, error=f"no image found at {argument}") for argument in unmatched),
    )
    failures = _write(predictions, options, get_task(opened.task))
    for failure in failures:
        notes().print(failure, markup=False)
    return 1 if failures else 0


def _workers(num_images: int) -> int:
    return 0 if num_images < FEW else min(8, available_cpus())


def _write(predictions: Iterable[Prediction], options: Options, task: "Task") -> list[str]:
    """Write the answers in the form that is asked for, and return what went wrong."""
    if options.json or not (options.jsonl or options.csv or not sys.stdout.isatty()):
        known = list(predictions)
        if options.json:
            write_json([one.entry() for one in known])
        else:
            output().print(task.answer_table([(one.image, one.answer) for one in known if not one.error]))
        return [one.error for one in known if one.error]
    failures, writer = [], None
    for one in predictions:
        if one.error:
            failures.append(one.error)
        if options.jsonl:
            sys.stdout.write(as_json(one.entry()) + "\n")
            continue
        for row in task.answer_rows(one.answer) if one.answer else []:
            row = {"image": printable(one.image), **row}
            if writer is None:
                writer = csv.DictWriter(sys.stdout, list(row), dialect="unix" if options.csv else "excel-tab",
                                        quoting=csv.QUOTE_MINIMAL, lineterminator="\n")  # fmt: skip
                if options.csv:
                    writer.writeheader()
            writer.writerow(row)
        sys.stdout.flush()
    return failures


def expand(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """Return the image files that the arguments stand for, each once, and the arguments that stand for none."""
    from linvision.data import find_images

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


def answer(
    opened: "Opened", paths: list[Path], options: Options, *, workers: int = 0, device: "torch.device"
) -> Iterator[Prediction]:
    """Yield the answer for each image, in order, decoded by ``workers`` processes (0: in this one)."""
    import torch
    from torch.utils.data import DataLoader

    from linvision.data import ImageFiles, worker_failures

    task = get_task(opened.task)
    images = ImageFiles(tuple((path, 0) for path in paths), opened.preprocess, options.max_pixels)
    with worker_failures():
        for batch in DataLoader(images, batch_size=options.batch_size, num_workers=workers, collate_fn=list):
            readable = [image for image, *_ in batch if image is not None]
            answers = iter(())
            if readable:
                with torch.inference_mode():
                    answers = iter(task.answer(opened, torch.stack(readable).to(device), top_k=options.top_k))
            for image, _, path, error in batch:
                if image is None:
                    yield Prediction(path, error=error)
                    continue
                found = next(answers)
                error = "" if found is not None else f"{path}: the model's outputs are no numbers (NaN)"
                yield Prediction(path, found or {}, error)
