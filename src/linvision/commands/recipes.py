"""The command ``linvision recipes``."""

from dataclasses import asdict, dataclass
from fnmatch import fnmatch

from rich.markup import escape
from rich.table import Table

from linvision.console import output, write_json
from linvision.errors import UnknownNameError, did_you_mean
from linvision.recipes import load_recipe, recipe_names

EXAMPLE = """linvision recipes
  linvision recipes digits
  linvision train --recipe digits"""
POSITIONAL = ("pattern",)


@dataclass(frozen=True)
class Options:
    """Which recipes to list.

    Attributes:
        pattern: shell pattern of names, such as "cifar*"; a single one is shown with its settings
        json: write the list as JSON
    """

    pattern: str = "*"
    json: bool = False


def run(options: Options) -> int:
    """Run ``linvision recipes``."""
    names = [name for name in recipe_names() if fnmatch(name, options.pattern)]
    if not names:
        raise UnknownNameError(f"no recipe is called {options.pattern}{did_you_mean(options.pattern, recipe_names())}")
    recipes = [load_recipe(name) for name in names]
    if options.json:
        write_json([asdict(recipe) for recipe in recipes])
        return 0
    table = Table("recipe", "what", "cost", "result", show_lines=True)
    for recipe in recipes:
        table.add_row(*map(escape, (recipe.name, recipe.title, recipe.cost, recipe.promise)))
    console = output()
    console.print(table)
    if len(recipes) == 1:
        console.print(f"source: {recipes[0].source}", markup=False)
        for name, value in asdict(recipes[0].settings).items():
            console.print(f"  {name}: {value}", markup=False)
    return 0
