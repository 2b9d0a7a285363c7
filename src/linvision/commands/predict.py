"""The command ``linvision predict``: answers for images, files, folders and globs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linvision.console import notes, output, with_bar, write_json
from linvision.devices import Device, choose_device
from linvision.errors import UnreadableImageError, UsageError
from linvision.tasks import get_task

if TYPE_CHECKING:
    import torch

    from linvision.training.opened import Opened

EXAMPLE = 'linvision predict --model vil2-tiny cat.jpg "holiday/**/*.png"'


@dataclass(frozen=True)
class Options:
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
        max_pixels: larger images are skipped, since decoding takes up to 8 bytes a pixel
    """

    images: list[str]
    model: str = "vil2-tiny"
    checkpoint: str | None = None
    top_k: int = 5
    img_size: int | None = None
    batch_size: int = 16
    json: bool = False
    device: Device = "auto"
    max_pixels: int = 128_000_000


@dataclass(frozen=True)
class Prediction:
    """The answer for one image, or the reason why there is none."""

    image: str
    answer: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run(options: Options) -> int:
    """Run ``linvision predict``; returns 1 where an image could not be read."""
    for name in ("top_k", "batch_size", "max_pixels"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    paths, unmatched = expand(options.images)
    if not paths:
        raise UsageError(f"no image found at {', '.join(unmatched)}")
    from linvision.tasks.opened import open_model

    device = choose_device(options.device)
    opened = open_model(options.model, checkpoint=options.checkpoint, img_size=options.img_size, device=device)
    answers = answer(opened, paths, options, device=device)
    predictions = [*with_bar(answers, len(paths), "predicting")]
    predictions += [Prediction(argument, error=f"no image found at {argument}") for argument in unmatched]
    answered = [(one.image, one.answer) for one in predictions if not one.error]
    failures = [one.error for one in predictions if one.error]
    if options.json:
        write_json([{"image": one.image, **(one.answer or {"error": one.error})} for one in predictions])
    elif answered:
        output().print(get_task(opened.task).answer_table(answered))
    for failure in failures:
        notes().print(failure, markup=False)
    return 1 if failures else 0


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


def answer(opened: "Opened", paths: list[Path], options: Options, *, device: "torch.device") -> Iterator[Prediction]:
    """Yield the answer for each image, in order."""
    import torch

    from linvision.data import open_image

    task = get_task(opened.task)
    for start in range(0, len(paths), options.batch_size):
        inputs, failures = {}, {}
        for path in paths[start : start + options.batch_size]:
            try:
                inputs[path] = opened.preprocess(open_image(path, max_pixels=options.max_pixels))
            except UnreadableImageError as error:
                failures[path] = str(error)
        answers = {}
        if inputs:
            with torch.inference_mode():
                found = task.answer(opened, torch.stack(list(inputs.values())).to(device), top_k=options.top_k)
            answers = dict(zip(inputs, found, strict=True))
        for path in paths[start : start + options.batch_size]:
            yield Prediction(str(path), answers.get(path, {}), failures.get(path, ""))
