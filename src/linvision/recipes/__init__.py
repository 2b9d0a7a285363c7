"""Recipes: one page (a YAML file in this folder) a run, with source, cost and promise, then the settings."""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from linvision.errors import UnknownNameError, UsageError, did_you_mean
from linvision.records import read_record
from linvision.training.settings import Settings

FINE_TUNING, FROM_SCRATCH = "finetune", "imagefolder"  # of folders, with and without published weights


@dataclass(frozen=True)
class Recipe:
    """A page.

    Attributes:
        name: of the file.
        title: what is trained on what.
        source: where the settings come from.
        cost: time and machine.
        promise: expected result, and who measured it.
        settings: what the run computes.
        data: the data set that it is the default recipe of; "" for none.
    """

    name: str
    title: str
    source: str
    cost: str
    promise: str
    settings: Settings
    data: str = ""


def recipe_names() -> list[str]:
    """List the recipes by name."""
    pages = (file.name for file in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in pages if name.endswith(".yaml"))


@cache
def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        UnknownNameError: there is none of that name; the nearest ones are named.
        UsageError: its page has an unknown key, or lacks one.
    """
    if name not in recipe_names():
        raise UnknownNameError(f"no recipe is called {name}{did_you_mean(name, recipe_names())}")
    text = (resources.files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    return read_recipe(name, yaml.safe_load(text))


def read_recipe(name: str, content: dict[str, Any]) -> Recipe:
    """Make a recipe of a page's content; errors as for ``load_recipe``."""
    return read_record(Recipe, {**content, "name": name}, f"recipe {name}", UsageError)


def recipe_for(data: str) -> Recipe:
    """Return the default recipe of a data set, by its name, or that of fine-tuning on a folder."""
    recipes = (load_recipe(name) for name in recipe_names())
    return next((recipe for recipe in recipes if recipe.data == data), load_recipe(FINE_TUNING))
