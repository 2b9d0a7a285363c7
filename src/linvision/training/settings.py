"""The settings of a training run, as recipes and the command line give them; no torch needed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from linvision.devices import Checkpointing, Device, Precision
from linvision.errors import UsageError

Border = Literal["zeros", "reflection"]
Loss = Literal["cross-entropy", "bce"]
Balance = Literal["none", "loss", "sampling"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training run computes; where it computes is no part of it. The help shows the lines on its attributes.

    Attributes:
        task: what to learn
        model: name of the model, one of linvision's or timm's
        model_kwargs: further arguments of the model's constructor, as JSON
        img_size: side of the input in pixels; default the model's own
        epochs: passes over the training images
        batch_size: images in a step
        opt: optimiser, one of timm's
        lr: peak learning rate, reached after the warm-up
        weight_decay: not applied to biases, norms or parameters that the model exempts
        warmup_epochs: epochs in which the learning rate rises to its peak; it then follows a cosine
        layer_decay: factor on the learning rate from each layer to the one below; 1 for none
        clip_grad: largest norm of the gradient; 0 for no limit
        freeze: parameters that stay as they are: backbone for all but the classifier, or patterns of names such as
            blocks.0.*, separated by commas
        balance: of classes: none, by their weight in the loss, or by sampling rare ones more often
        drop_path: probability that a residual branch is skipped
        loss: cross-entropy, or bce for one binary decision a class
        label_smoothing: share of each target that is spread over all classes
        mixup: strength (alpha) of mixing images pixel by pixel; 0 for none
        cutmix: strength (alpha) of pasting a part of one image into another; 0 for none
        ema: decay of the weights' moving average, which is then what is measured and kept; 0 for none
        flip: probability of mirroring an image left to right
        erase: probability of overwriting a rectangle of an image with noise
        rotate: largest rotation of small images in memory, in degrees
        shift: largest shift of small images in memory, as a share of the side
        scale: largest relative change of the size of small images in memory
        shear: largest shear of small images in memory, in degrees
        border: what comes into view at their edges, zeros or reflection
        crop_scale: smallest share of a photograph's area that a random crop keeps
        auto_augment: timm's policy for photographs; 3a is DeiT-III's 3-Augment (arXiv 2204.07118), "" for none
        color_jitter: strength of the changes of a photograph's brightness, contrast and saturation
    """

    task: str = "classify"
    model: str
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    img_size: int | None = None
    epochs: int
    batch_size: int
    opt: str = "adamw"
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    layer_decay: float = 1.0
    clip_grad: float = 1.0
    freeze: str = ""
    balance: Balance = "none"
    drop_path: float = 0.0
    loss: Loss = "cross-entropy"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    flip: float = 0.0
    erase: float = 0.0
    rotate: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    border: Border = "zeros"
    crop_scale: float = 0.25
    auto_augment: str = "3a"
    color_jitter: float = 0.3

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise UsageError(f"--batch-size {self.batch_size} must be even: mixup and cutmix pair the images")


def check_ranges(values: Mapping[str, Any]) -> None:
    """Raise UsageError for the first value that is out of its range; names that are not settings are passed over."""
    for names, holds, needed in RANGES:
        for name in names:
            value = values.get(name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: it must be {needed}")


RANGES = (
    (("epochs", "batch_size", "img_size", "top_k", "max_pixels"), lambda value: value >= 1, "at least 1"),
    (("lr",), lambda value: 0 < value < float("inf"), "above 0"),
    (
        ("weight_decay", "warmup_epochs", "clip_grad", "mixup", "cutmix", "workers", "color_jitter"),
        lambda value: value >= 0,
        "at least 0",
    ),
    (("drop_path", "label_smoothing", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("flip", "erase", "shift"), lambda value: 0 <= value <= 1, "from 0 to 1"),
    (("val_split",), lambda value: 0 < value < 1, "above 0 and below 1"),
    (("scale",), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("rotate",), lambda value: 0 <= value <= 180, "from 0 to 180"),
    (("shear",), lambda value: 0 <= value < 90, "at least 0 and below 90"),
    (("layer_decay", "crop_scale", "crop_ratio"), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("seed",), lambda value: 0 <= value < 2**31, "at least 0 and below 2^31"),
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run gets its data and weights from, where it computes and what it writes to.

    Attributes:
        data: digits, fashion-mnist, mnist, cifar10, cifar100, a folder with train/ and val/, each with a folder of
            images for every class, or a CSV file with the columns path, label and split
        pretrained: start from the model's published weights
        checkpoint: start from the weights in this file
        drop_head: train a new classifier, for when the checkpoint has other classes
        out: run folder to create; default runs/MODEL-DATA-N
        resume: continue the run in this folder exactly where its last whole epoch ended
        overwrite: replace the run in the folder given by out
        seed: of the weights, the order and the random changes of the images
        device: auto takes a GPU if there is one
        precision: numeric precision: 32, bf16 or 16 (16 needs a GPU)
        checkpointing: of activations, which saves memory and changes no result: selective recomputes in the backward
            pass what is cheap (norms, activations, gates, depthwise convolutions), full everything
        workers: processes that decode images of a folder; default the CPUs that may be used, at most 8
        data_root: folder of downloaded data; default $LINVISION_DATA or ~/.cache/linvision
        val_split: share of a folder's images, of each class, that is held back for validation where there is no val/;
            which ones follows from their paths alone
        cache: folder for resized copies of the training images, which are decoded faster
        max_pixels: larger images are skipped, since decoding takes up to 8 bytes a pixel in each process
    """

    data: str = "digits"
    pretrained: bool = False
    checkpoint: str | None = None
    drop_head: bool = False
    out: str | None = None
    resume: str | None = None
    overwrite: bool = False
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "32"
    checkpointing: Checkpointing = "none"
    workers: int | None = None
    data_root: str | None = None
    val_split: float | None = None
    cache: str | None = None
    max_pixels: int = 128_000_000


# What may differ when a run is continued: where and how it runs, not what it computes.
MACHINE = ("device", "checkpointing", "workers", "data_root", "cache", "max_pixels")
