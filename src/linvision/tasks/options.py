"""The options of a training run, and the recipe that each data set comes with."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from linvision.devices import Device, Precision
from linvision.errors import UsageError

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recipe:
    """What a training run does; the attributes are those of TrainOptions, all of them set."""

    model: str
    img_size: int | None
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup_epochs: float = 5.0
    layer_decay: float = 1.0
    clip_grad: float = 1.0
    drop_path: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0


SMALL = "vil2_mini_patch4_32"

RECIPES = {
    "digits": Recipe(SMALL, img_size=32, epochs=15, batch_size=64, lr=2e-3, warmup_epochs=2, drop_path=0.1),
    "mnist": Recipe(SMALL, img_size=32, epochs=10, batch_size=128, lr=2e-3, warmup_epochs=1),
    "fashion-mnist": Recipe(SMALL, img_size=32, epochs=10, batch_size=128, lr=2e-3, warmup_epochs=1),
    "cifar10": Recipe(SMALL, img_size=32, epochs=100, batch_size=256, lr=2e-3, mixup=0.2, cutmix=0.5),
    "cifar100": Recipe(SMALL, img_size=32, epochs=100, batch_size=256, lr=2e-3, mixup=0.2, cutmix=0.5),
}
FOLDER_RECIPE = Recipe("vil2_tiny_patch16_224", img_size=None, epochs=100, batch_size=64, lr=5e-4)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train a classifier.

    Attributes:
        data: digits, fashion-mnist, mnist, cifar10, cifar100, or a folder with train/ and val/, each with a folder of
            images for every class
        model: name of the model, one of linvision's or timm's
        epochs: passes over the training images
        batch_size: images in a step
        lr: peak learning rate of AdamW, reached after the warm-up
        weight_decay: of matrices; vectors and the parameters that a model exempts have none
        warmup_epochs: epochs in which the learning rate rises to its peak; it then follows a cosine
        layer_decay: factor on the learning rate from each layer to the one below; 1 for none
        clip_grad: largest norm of the gradient; 0 for no limit
        drop_path: probability that a residual branch is skipped
        label_smoothing: share of each target that is spread over all classes
        mixup: strength (alpha) of mixing images pixel by pixel; 0 for none
        cutmix: strength (alpha) of pasting a part of one image into another; 0 for none
        ema: decay of the weights' moving average, which is then what is measured and kept; 0 for none
        img_size: side of the input in pixels
        pretrained: start from the model's published weights
        checkpoint: start from the weights in this file
        drop_head: do not take the file's classifier, when it has other classes
        out: run folder to create; default runs/MODEL-DATA-N
        resume: continue the run in this folder exactly where its last whole epoch ended
        overwrite: replace the run in the folder given by out
        seed: of the weights, the order and the random changes of the images
        device: auto takes a GPU if there is one
        precision: of the matrix products; 16 needs a GPU
        checkpointing: of activations, which saves memory and changes no result: selective recomputes in the backward
            pass what is cheap (norms, activations, gates, depthwise convolutions), full everything
        workers: processes that decode images of a folder; default the cores that are there, at most 8
        data_root: folder of downloaded data; default $LINVISION_DATA or ~/.cache/linvision
    """

    data: str = "digits"
    model: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup_epochs: float | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    drop_path: float | None = None
    label_smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema: float | None = None
    img_size: int | None = None
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

    def recipe(self) -> Recipe:
        """Return the data set's recipe with the options that are given in place of its own.

        Raises:
            UsageError: a value is out of range, or options exclude each other.
        """
        recipe = RECIPES.get(self.data, FOLDER_RECIPE)
        given = {field.name: getattr(self, field.name) for field in fields(recipe)}
        recipe = replace(recipe, **{name: value for name, value in given.items() if value is not None})
        for names, holds, needed in _RANGES:
            for name in names:
                value = getattr(recipe if hasattr(recipe, name) else self, name)
                if value is not None and not holds(value):
                    raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: it must be {needed}")
        if self.pretrained and self.checkpoint:
            raise UsageError("--pretrained and --checkpoint exclude each other: give one")
        if self.drop_head and not self.checkpoint:
            raise UsageError("--drop-head needs --checkpoint FILE, whose classifier it drops")
        if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
            raise UsageError(f"--batch-size {recipe.batch_size} must be even: mixup and cutmix pair the images")
        return recipe

    def given(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


_RANGES = (
    (("epochs", "batch_size", "img_size"), lambda value: value >= 1, "at least 1"),
    (("lr",), lambda value: 0 < value < float("inf"), "above 0"),
    (("weight_decay", "warmup_epochs", "clip_grad", "mixup", "cutmix", "workers"), lambda v: v >= 0, "at least 0"),
    (("drop_path", "label_smoothing", "ema"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (("layer_decay",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("seed",), lambda value: 0 <= value < 2**31, "at least 0 and below 2^31"),
)
