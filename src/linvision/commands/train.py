"""The command ``linvision train``."""

import os
from argparse import ArgumentParser
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from linvision.errors import DownloadError, UsageError
from linvision.interruption import Interruption, interruptible
from linvision.recipes import FINE_TUNING, FROM_SCRATCH, Recipe, load_recipe, recipe_for
from linvision.records import read_record
from linvision.tasks import get_task
from linvision.training.settings import MACHINE, RunOptions, Settings, check_ranges

EXAMPLE = """linvision train --data digits
  linvision train --model vil2-tiny --pretrained --data photos/ --epochs 20 --lr 1e-4
  linvision train --resume runs/vil2_mini_patch4_32-digits-1"""
CONFIG = True


GROUPS = {
    "data": "data data_root val_split",
    "model": "recipe task model model_kwargs img_size pretrained checkpoint drop_head",
    "run": "out resume overwrite seed",
    "optimisation": "epochs batch_size opt lr weight_decay warmup_epochs layer_decay clip_grad freeze ema",
    "regularisation": "loss label_smoothing balance drop_path mixup cutmix",
    "augmentation": "flip erase rotate shift scale shear border crop_scale auto_augment color_jitter",
    "machine": "device precision checkpointing workers cache max_pixels",
}

# A setting that is not given is the recipe's.
Given = make_dataclass(
    "Given",
    [(name, kind | None, None) for name, kind in get_type_hints(Settings).items()],
    bases=(RunOptions,),
    namespace={"__doc__": Settings.__doc__},
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Options(Given):
    """How to train: settings, and what belongs to the run.

    Attributes:
        recipe: settings to start from, by the name of a page that ``linvision recipes`` lists; default that of the data
    """

    recipe: str | None = None

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
        if self.recipe is None:
            return self._of_folder() if recipe_for(self.data).name == FINE_TUNING else self
        if self.data != RunOptions.data:
            return self
        data = load_recipe(self.recipe).data
        if not data:
            raise UsageError(f"the recipe {self.recipe} is for data of your own: add --data FOLDER")
        return replace(self, data=data)

    def _of_folder(self) -> "Options":
        """Choose between fine-tuning and training from scratch, for a folder."""
        from linvision.models import has_weights

        if self.pretrained or self.checkpoint:
            return replace(self, recipe=FINE_TUNING)
        if has_weights(self.model or load_recipe(FINE_TUNING).settings.model):
            return replace(self, recipe=FINE_TUNING, pretrained=True)
        return replace(self, recipe=FROM_SCRATCH)

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
        return _recipe_of(self.data, self.recipe).settings

    def run_options(self) -> RunOptions:
        """Return what is no setting."""
        return RunOptions(**{field.name: getattr(self, field.name) for field in fields(RunOptions)})


def _recipe_of(data: str, name: str | None) -> Recipe:
    return recipe_for(data) if name is None else load_recipe(name)


def shown_defaults(arguments: list[str]) -> dict[str, str]:
    """Return what the help shows as the settings' defaults: those of the recipe that the arguments choose."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", default=RunOptions.data)
    parser.add_argument("--recipe")
    chosen, _ = parser.parse_known_args(arguments)
    recipe = _recipe_of(chosen.data, chosen.recipe)
    values = {name: value for name, value in vars(recipe.settings).items() if value not in (None, "", {})}
    return {
        name: f"recipe {recipe.name}: {value:g}" if isinstance(value, float) else f"recipe {recipe.name}: {value}"
        for name, value in values.items()
    }


def run(options: Options) -> int:
    """Run ``linvision train``."""
    _one_process()
    with interruptible() as interruption:
        if options.resume is not None:
            _resume(options, interruption)
        else:
            _start(options, interruption)
    return 0


def _one_process() -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UsageError(
            f"WORLD_SIZE={processes}: linvision trains in one process so far; start it without torchrun, or in an "
            "environment without WORLD_SIZE"
        )


def _start(given: Options, interruption: Interruption) -> None:
    options = given.resolved()
    settings = options.settings()
    task = get_task(settings.task)
    from linvision.training.engine import run_training
    from linvision.training.plan import prepare
    from linvision.training.run_folder import check_out, new_run

    check_out(options)
    try:
        plan = prepare(task, options.run_options(), settings, given=options.changed())
    except DownloadError as error:
        if given.pretrained:
            raise
        raise DownloadError(f"{error}; to train without published weights, give --recipe {FROM_SCRATCH}") from error
    with new_run(plan.options, plan.settings.model) as folder:
        folder.save_config({"recipe": options.recipe, **plan.config()})
        run_training(plan, folder, interruption)


def _resume(options: Options, interruption: Interruption) -> None:
    from linvision.training.engine import run_training
    from linvision.training.plan import prepare
    from linvision.training.run_folder import RunFolder

    folder = RunFolder(Path(options.resume or ""))
    options = resumed_options(options, folder.load_config(), str(folder.path / "config.yaml"))
    settings = options.settings()
    with folder.locked():
        folder.tidy()
        card = folder.load_card() if folder.has_card() else None
        plan = prepare(
            get_task(settings.task), options.run_options(), settings, fresh=not folder.has_state(), card=card
        )
        if card is not None:
            card.check_same_data(plan.card())
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
    stored = read_record(Options, config, where)
    return replace(stored, **{name: getattr(options, name) for name in options.given() if name in MACHINE})
