"""Recipes: every page can be read, trained by and listed; what is unknown is refused."""

import json

import pytest
import torch

from linvision import create_model
from linvision.cli import main
from linvision.commands.train import Options
from linvision.data import DATASETS
from linvision.errors import UnknownNameError, UsageError
from linvision.models import resolve_name, size_overrides
from linvision.recipes import load_recipe, read_recipe, recipe_for, recipe_names
from linvision.tasks import TASKS
from linvision.training.module import check_optimizer


@pytest.mark.parametrize("name", recipe_names())
def test_every_page_names_what_exists(name):
    recipe = load_recipe(name)
    assert recipe.source
    assert recipe.cost
    assert recipe.promise
    assert recipe.data == "" or recipe.data in DATASETS
    assert recipe.settings.task in TASKS
    check_optimizer(recipe.settings.opt)
    with torch.device("meta"):
        create_model(
            resolve_name(recipe.settings.model), **size_overrides(recipe.settings.model, recipe.settings.img_size)
        )


def test_every_data_set_has_a_recipe():
    assert {recipe_for(name).data for name in DATASETS} == set(DATASETS)
    assert recipe_for("photos/").name == "finetune"


def test_the_digits_are_trained_as_ever():
    settings = load_recipe("digits").settings
    assert (settings.lr, settings.epochs, settings.batch_size, settings.weight_decay) == (2e-3, 15, 64, 0.05)
    assert (settings.rotate, settings.shift, settings.scale, settings.shear) == (15, 0.1, 0.15, 10)


PAGE = {
    "title": "t",
    "source": "s",
    "cost": "c",
    "promise": "p",
    "settings": {"model": "test_vil2", "epochs": 1, "batch_size": 2, "lr": 0.1},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {**PAGE["settings"], "epocs": 3}},
            "recipe x, settings: there is no key 'epocs'; did you mean epochs",
        ),
        ({"settings": {**PAGE["settings"], "epochs": "3"}}, "recipe x, settings: epochs takes a whole number, not '3'"),
        ({"settings": {**PAGE["settings"], "epochs": True}}, "epochs takes a whole number, not True"),
        ({"settings": {**PAGE["settings"], "loss": "mse"}}, "loss takes cross-entropy or bce, not 'mse'"),
        ({"settings": {"model": "test_vil2", "epochs": 1}}, "recipe x, settings: it lacks batch_size, lr"),
        ({"settings": {**PAGE["settings"], "lr": -1.0}}, "--lr -1.0 is out of range"),
        ({"promises": "p"}, "recipe x: there is no key 'promises'; did you mean promise"),
    ],
)
def test_unknown_and_wrong_keys_are_refused(changes, message):
    assert read_recipe("x", PAGE).settings.lr == 0.1
    with pytest.raises(UsageError, match=message):
        read_recipe("x", PAGE | changes)


def test_unknown_recipes_are_answered_with_the_nearest(capfd):
    with pytest.raises(UnknownNameError, match="did you mean digits"):
        load_recipe("digit")
    assert main(["train", "--recipe", "cifar"]) == 2
    assert "no recipe is called cifar; did you mean cifar" in capfd.readouterr().err
    assert main(["recipes", "cifra10"]) == 2
    assert "did you mean cifar10" in capfd.readouterr().err


def test_recipes_are_listed(capfd):
    assert main(["recipes"]) == 0
    table = capfd.readouterr().out
    assert all(name in table for name in recipe_names())
    assert main(["recipes", "digits"]) == 0
    assert "batch_size: 64" in capfd.readouterr().out
    assert main(["recipes", "cifar*", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capfd.readouterr().out)] == ["cifar10", "cifar100"]


@pytest.mark.parametrize(
    ("given", "recipe", "pretrained"),
    [
        ({}, "finetune", True),
        ({"model": "l2vit_tiny"}, "imagefolder", False),
        ({"checkpoint": "own.safetensors"}, "finetune", False),
        ({"recipe": "imagefolder"}, "imagefolder", False),
    ],
)
def test_a_folder_is_fine_tuned_on_where_there_are_weights(given, recipe, pretrained):
    options = Options(data="photos/", **given).resolved()
    assert (options.recipe, options.pretrained) == (recipe, pretrained)


def test_a_data_set_has_one_default_recipe():
    data = [load_recipe(name).data for name in recipe_names()]
    assert len(set(filter(None, data))) == len(list(filter(None, data)))


def test_a_recipe_without_data_asks_for_some(capfd):
    assert main(["train", "--recipe", "finetune"]) == 2
    assert "add --data FOLDER" in capfd.readouterr().err
