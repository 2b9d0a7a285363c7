"""The command ``linvision eval``."""

from dataclasses import dataclass, replace

from linvision.console import notes, output, write_json
from linvision.devices import Device, Precision, choose_device
from linvision.errors import UsageError
from linvision.tasks import get_task
from linvision.training.settings import check_ranges

EXAMPLE = """linvision eval --model runs/vil2_mini_patch4_32-digits-1 --by-class
  linvision eval --model vil2-tiny --data imagenet/"""


@dataclass(frozen=True)
class Options:
    """What to measure, on what.

    Attributes:
        model: a run folder, or the name of a model with published weights
        data: digits, fashion-mnist, mnist, cifar10, cifar100, or a folder with val/ or with a folder of images for
            every class; default what the run was trained on
        checkpoint: weights to use instead of the run's or the published ones
        batch_size: images in a step
        img_size: side of the input in pixels; default the model's own
        crop_ratio: side of the centre crop over the side that images are first resized to; default the model's own
        tta: average the outputs for each image and for the mirrored one
        by_class: show the accuracy of each class
        json: write the result as JSON
        device: auto takes a GPU if there is one
        precision: numeric precision: 32, bf16 or 16 (16 needs a GPU)
        workers: processes that decode images of a folder
        data_root: folder of downloaded data; default $LINVISION_DATA or ~/.cache/linvision
        max_pixels: larger images are skipped, since decoding takes up to 8 bytes a pixel in each process
    """

    model: str | None = None
    data: str | None = None
    checkpoint: str | None = None
    batch_size: int = 64
    img_size: int | None = None
    crop_ratio: float | None = None
    tta: bool = False
    by_class: bool = False
    json: bool = False
    device: Device = "auto"
    precision: Precision = "32"
    workers: int = 2
    data_root: str | None = None
    max_pixels: int = 128_000_000


def run(options: Options) -> int:
    """Run ``linvision eval``."""
    if options.model is None:
        raise UsageError("eval needs --model: a run folder, or the name of a model with published weights")
    check_ranges(vars(options))
    from linvision.data import worker_failures
    from linvision.tasks.opened import named_by, open_model

    device = choose_device(options.device, options.precision)
    named = named_by(options.model)
    name, task = options.data or named.data, get_task(named.task)
    if not name:
        raise UsageError("eval needs --data: a folder of images, or a data set's name")
    # Before the model, which may have to be downloaded.
    held_back = named.val_split if options.data is None else None
    data = task.open_test_data(name, root=options.data_root, val_split=held_back, max_pixels=options.max_pixels)
    opened = open_model(
        options.model, checkpoint=options.checkpoint, img_size=options.img_size, tta=options.tta, device=device
    )
    preprocess = opened.preprocess
    if options.crop_ratio is not None:
        preprocess = replace(preprocess, crop_ratio=options.crop_ratio)
    batches = data.test_batches(preprocess, batch_size=options.batch_size, workers=options.workers)
    with worker_failures():
        measured = task.measure(opened, batches, data=data, device=device, precision=options.precision)
    by_class, table = task.by_class(measured, opened) if options.by_class else ({}, None)
    if options.json:
        result = {
            "model": opened.name,
            "data": name,
            "images": measured.num_images,
            **measured.figures,
            "images_per_second": measured.images_per_second,
            "not_numbers": measured.not_numbers,
            "skipped": sorted(batches.unreadable),
        }
        write_json(result | ({"by_class": by_class} if options.by_class else {}))
    else:
        speed = f"{measured.num_images} images, {measured.images_per_second:,.0f} images/s"
        output().print(f"{opened.name} on {name}: {task.eval_line(measured)}; {speed}", markup=False)
        if table is not None:
            output().print(table)
    for reason in batches.unreadable.values():
        notes().print(f"skipped: {reason}", markup=False)
    if measured.not_numbers:
        notes().print(measured.warning(), markup=False)
    return 1 if measured.not_numbers else 0
