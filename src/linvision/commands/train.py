"""The command ``linvision train``."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from linvision.errors import RunError, UsageError
from linvision.interruption import Interruption, interruptible
from linvision.recipes import load_recipe, recipe_for
from linvision.tasks import get_task
from linvision.training.settings import MACHINE, Border, Loss, RunOptions, Settings, check_ranges

EXAMPLE = """linvision train --data digits
  linvision train --model vil2-tiny --pretrained --data photos/ --epochs 20 --lr 1e-4
  linvision train --resume runs/vil2_mini_patch4_32-digits-1"""
CONFIG = True


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """How to train.

    Attributes:
        data: digits, fashion-mnist, mnist, cifar10, cifar100, or a folder with train/ and val/, each with a folder of
            images for every class
        recipe: settings to start from, by the name of a page that ``linvision recipes`` lists; default that of the data
        task: what to learn
        model: name of the model, one of linvision's or timm's
        epochs: passes over the training images
        batch_size: images in a step
        opt: optimiser, one of timm's
        lr: peak learning rate, reached after the warm-up
        weight_decay: not applied to biases, norms and what the model exempts
        warmup_epochs: epochs in which the learning rate rises to its peak; it then follows a cosine
        layer_decay: factor on the learning rate from each layer to the one below; 1 for none
        clip_grad: largest norm of the gradient; 0 for no limit
        drop_path: probability that a residual branch is skipped
        loss: cross-entropy, or bce for one binary decision a class
        label_smoothing: share of each target that is spread over all classes
        mixup: strength (alpha) of mixing images pixel by pixel; 0 for none
        cutmix: strength (alpha) of pasting a part of one image into another; 0 for none
        ema: decay of the weights' moving average, which is then what is measured and kept; 0 for none
        flip: probability of mirroring an image left to right
        erase: probability of overwriting a rectangle of an image with noise
        rotate: largest rotation of small images in memory, in degrees
        shift: largest shift of these, as a share of the side
        scale: largest relative change of their size
        shear: largest shear of these, in degrees
        border: what comes into view at their edges, zeros or reflection
        crop_scale: smallest share of a photograph's area that a random crop keeps
        auto_augment: timm's policy for photographs; 3a is DeiT-III's 3-Augment, "" for none
        color_jitter: strength of their changes of brightness, contrast and saturation
        img_size: side of the input in pixels
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
        workers: processes that decode images of a folder; default the cores that are there, at most 8
        data_root: folder of downloaded data; default $LINVISION_DATA or ~/.cache/linvision
    """

    recipe: str | None = None
    task: str | None = None
    model: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    opt: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup_epochs: float | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    drop_path: float | None = None
    loss: Loss | None = None
    label_smoothing: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    ema: float | None = None
    flip: float | None = None
    erase: float | None = None
    rotate: float | None = None
    shift: float | None = None
    scale: float | None = None
    shear: float | None = None
    border: Border | None = None
    crop_scale: float | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    img_size: int | None = None

    def given(self) -> list[str]:
        """Return the names of the options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def resolved(self) -> "Options":
        """Take the data of a recipe that is asked for, where no other data is given.

        Raises:
            UsageError: a value is out of range, or options exclude each other.
        """
        check_ranges(vars(self))
        if self.pretrained and self.checkpoint:
            raise UsageError("--pretrained and --checkpoint exclude each other: give one")
        if self.drop_head and not self.checkpoint:
            raise UsageError("--drop-head needs --checkpoint FILE, whose classifier it drops")
        if self.recipe is None or self.data != RunOptions.data:
            return self
        return replace(self, data=load_recipe(self.recipe).data or self.data)

    def settings(self) -> Settings:
        """Return the settings of the recipe with the options that are given in place of its own."""
        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return replace(self._recipe(), **{name: value for name, value in given.items() if value is not None})

    def changed(self) -> list[str]:
        """Name the settings that the options change in the recipe."""
        recipe, settings = self._recipe(), self.settings()
        return [
            field.name for field in fields(Settings) if getattr(recipe, field.name) != getattr(settings, field.name)
        ]

    def _recipe(self) -> Settings:
        return (recipe_for(self.data) if self.recipe is None else load_recipe(self.recipe)).settings

    def run_options(self) -> RunOptions:
        """Return what is no setting."""
        return RunOptions(**{field.name: getattr(self, field.name) for field in fields(RunOptions)})


def run(options: Options) -> int:
    """Run ``linvision train``."""
    with interruptible() as interruption:
        if options.resume is not None:
            _resume(options, interruption)
        else:
            _start(options, interruption)
    return 0


def _start(options: Options, interruption: Interruption) -> None:
    options = options.resolved()
    settings = options.settings()
    task = get_task(settings.task)
    from linvision.training.engine import run_training
    from linvision.training.plan import prepare
    from linvision.training.run_folder import check_out, create_run_folder

    check_out(options)
    plan = prepare(task, options.run_options(), settings, given=options.changed())
    folder = create_run_folder(plan.options, plan.settings.model)
    folder.save_config({"recipe": options.recipe, **plan.config()})
    run_training(plan, folder, interruption)


def _resume(options: Options, interruption: Interruption) -> None:
    from linvision.training.engine import run_training
    from linvision.training.plan import prepare
    from linvision.training.run_folder import RunFolder

    folder = RunFolder(Path(options.resume or ""))
    options = resumed_options(options, folder.load_config(), str(folder.path / "config.yaml"))
    settings = options.settings()
    folder.tidy()
    plan = prepare(get_task(settings.task), options.run_options(), settings, fresh=not folder.state.is_file())
    run_training(plan, folder, interruption)


def resumed_options(options: Options, config: dict[str, Any], where: str) -> Options:
    """Return a run's own options, but for what concerns the machine.

    Raises:
        UsageError: options are given that a resumed run cannot change.
        RunError: the run's file is damaged.
    """
    unwanted = [name for name in options.given() if name not in ("resume", *MACHINE)]
    if unwanted:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unwanted)
        raise UsageError(f"--resume continues a run as it was configured: leave out {names}, or start a new run")
    try:
        stored = Options(**config)
    except TypeError as error:
        raise RunError(f"{where} is damaged: {error}") from error
    return replace(stored, **{name: getattr(options, name) for name in options.given() if name in MACHINE})
