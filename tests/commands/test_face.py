"""What a newcomer touches first: help without torch, lazy names, registration with timm, flags that stay."""

import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
import torch

import linvision
from linvision.cli import main
from linvision.commands import COMMANDS
from linvision.commands.parser import build_parser

# The options of every command since the first release; a command may get more, and loses none.
FLAGS = {
    "models": "json",
    "train": "data model epochs batch-size lr weight-decay warmup-epochs layer-decay clip-grad drop-path "
    "label-smoothing mixup cutmix ema img-size pretrained checkpoint drop-head out resume overwrite seed device "
    "precision checkpointing workers data-root config",
    "eval": "model data checkpoint batch-size img-size by-class json device precision workers data-root",
    "predict": "model checkpoint top-k img-size batch-size json device",
    "convert": "model ema",
    "bench": "models op sizes batch-sizes dtypes modes peers width rounds seconds device threads max-memory autocast "
    "compile checkpointing backend tf32 seed out overwrite json markdown",
}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", FLAGS)
def test_no_option_is_lost(name):
    parser = build_parser(name, import_module(f"linvision.commands.{name}"))
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {f"--{flag}" for flag in FLAGS[name].split()} <= flags


@pytest.mark.parametrize("name", ["train", "bench"])
def test_every_option_of_a_long_help_stands_in_one_group(name):
    command = import_module(f"linvision.commands.{name}")
    grouped = " ".join(command.GROUPS.values()).split()
    assert sorted(grouped) == sorted(field.name for field in fields(command.Options))


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [([], "(recipe digits: 15)"), (["--data", "photos"], "(recipe finetune: 20)")],
)
def test_the_help_shows_the_settings_of_the_recipe(arguments, shown, capfd):
    assert main(["train", *arguments, "--help"]) == 0
    assert f"passes over the training images {shown}" in " ".join(capfd.readouterr().out.split())


def test_help_needs_no_torch():
    """One process asks for all of them, as the command line does."""
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    code = (
        "import sys; sys.argv[0] = '/usr/bin/linvision'; from linvision.cli import main\n"
        f"assert [main(call) for call in {calls!r}] == [0] * {len(calls)}\n"
        "heavy = {'torch', 'timm', 'numpy', 'pytorch_lightning', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["linvision", "linvision.cli"])
def test_modules_run_as_commands(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"linvision {linvision.__version__}\n")


def test_percent_signs_in_help_are_single(capfd):
    assert main(["bench", "--help"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    assert "80 % of what is free" in text


def test_commands_without_the_extra_say_what_to_install():
    code = (
        "import sys; sys.modules['jsonargparse'] = None; sys.modules['rich'] = None\n"
        "sys.argv[0] = 'linvision'; from linvision.cli import main\n"
        "assert main(['--help']) == 0\n"
        "sys.exit(main(['models']))"
    )
    done = python(code)
    assert done.returncode == 1
    assert done.stderr == "linvision: error: commands need jsonargparse: pip install 'linvision[train]'\n"


def test_the_import_registers_models_with_timm():
    code = "import linvision, timm; print(timm.models.is_model('vil2_tiny_patch16_224'))"
    assert python(code).stdout == "True\n"


def test_every_public_name_is_there():
    assert {"create_model", "list_models", "describe", "load_checkpoint", "ops", "use_backend"} <= set(dir(linvision))
    for name in linvision.__all__:
        assert getattr(linvision, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = linvision.nothing


def test_a_backend_that_cannot_run_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr("linvision.ops.backends.cpp.library.missing", lambda: "not compiled")
    tokens = torch.randn(1, 2, 4, 8)

    def run(options):
        with linvision.use_backend(options.backend):
            linvision.ops.mlstm(tokens, tokens, tokens, tokens[..., 0], tokens[..., 0])

    monkeypatch.setattr("linvision.commands.bench.run", run)
    assert main(["bench", "--backend", "cpp"]) == 2
    captured = capfd.readouterr()
    assert captured.err == (
        "linvision: error: mlstm: backend 'cpp' cannot run: not compiled; use 'auto' for one that can\n"
    )
