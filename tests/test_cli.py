"""The command line: help, names, errors and exit codes."""

import json
import os
import pickle
import urllib.error
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import linvision
from linvision import create_model
from linvision.cli import main
from linvision.commands import COMMANDS, models
from linvision.commands.parser import build_parser
from linvision.files import write_weights
from tests.data.samples import truncate, write_folder
from tests.goldens import FOLDER as GOLDENS
from tests.tasks.runs import TINY

MINI = "vil2_mini_patch4_32"


@pytest.fixture
def weights(tmp_path) -> Path:
    """Return the weights of a small model with the digits' ten classes."""
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    write_weights(path, create_model(MINI, num_classes=10).state_dict())
    return path


def one_line(capfd) -> str:
    """Return the only line that was written, to stderr."""
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("linvision: error: ")
    return captured.err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_and_explains_every_option(name, capfd):
    assert main([name, "--help"]) == 0
    text = capfd.readouterr().out
    assert f"example:\n  linvision {name}" in text
    command = import_module(f"linvision.commands.{name}")
    parser = build_parser(name, command)
    explained = {action.dest for action in parser._actions if action.help}
    assert {field.name for field in fields(command.Options)} <= explained
    assert "null" not in text


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_accepted(name):
    command = import_module(f"linvision.commands.{name}")
    parser = build_parser(name, command)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    lines = [line for line in command.EXAMPLE.splitlines() if f"linvision {name}" in line]
    used = {word for line in lines for word in line.split() if word.startswith("--")}
    assert used <= flags


def test_overview_and_version(capfd):
    assert main(["--help"]) == 0
    overview = capfd.readouterr().out
    assert all(f"  {name}" in overview for name in COMMANDS)
    assert main([]) == 2
    capfd.readouterr()
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"linvision {linvision.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command trian: did you mean train"),
        (["--verbose"], "unknown option --verbose"),
        (["train", "--epcohs", "3"], "unknown option --epcohs: did you mean --epochs"),
        (["train", "--batch", "3"], "unknown option --batch: did you mean --batch-size"),
        (["train", "--zzz=3"], "unknown option --zzz; see linvision train --help"),
        (["train", "--epochs", "many"], "--epochs takes a whole number, not many"),
        (["train", "--lr", "fast"], "--lr takes a number, not fast"),
        (["train", "--device", "gpu"], "--device takes auto or cpu or cuda, not gpu"),
        (["train", "--seed"], "--seed: expected one argument"),
        (["train", "extra"], "unrecognized arguments: extra"),
        (["train", "--config", "gone.yaml"], "gone.yaml"),
        (["predict"], "required: images"),
        (["train", "--model", "vil2_tinny_patch16_224"], "did you mean vil2_tiny_patch16_224"),
        (["train", "--data", "digit"], "did you mean digits?"),
        (["train", "--img-size", "33"], "33 is not a multiple of the patch size 4"),
        (["train", "--model", "vim_mini_patch4_32", "--img-size", "33"], "33 is not a multiple of the patch size 4"),
        (["train", "--model", "deit3-tiny", "--img-size", "33"], "33 is not a multiple of the patch size 16"),
        (["train", "--overwrite"], "--overwrite needs --out"),
        (["train", "--resume", "gone"], "gone holds no run"),
        (["models", "vil9_tiny"], "unknown model 'vil9_tiny'; did you mean"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(arguments, message, capfd):
    assert main(arguments) == 2
    assert message in one_line(capfd)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capfd):
    assert main(["train", "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in one_line(capfd)


def test_underscores_and_equals_signs_are_taken(capfd):
    assert main(["train", "--batch_size=0"]) == 2
    assert "--batch-size 0 is out of range" in one_line(capfd)


def test_unknown_keys_of_a_configuration_are_refused(tmp_path, capfd):
    (tmp_path / "a.yaml").write_text("bath_size: 3\n")
    assert main(["train", "--config", str(tmp_path / "a.yaml")]) == 2
    assert "bath_size" in one_line(capfd)
    (tmp_path / "b.yaml").write_text("batch_size: 3\nlr: 1e-3\nepochs: -1\n")
    assert main(["train", "--config", str(tmp_path / "b.yaml")]) == 2
    assert "--epochs -1 is out of range" in one_line(capfd)


def test_existing_folder_is_refused(tmp_path, capfd):
    arguments = ["train", "--data", str(write_folder(tmp_path / "data")), *TINY, "--epochs", "1", "--out"]
    out = tmp_path / "run"
    assert main([*arguments, str(out)]) == 0
    capfd.readouterr()
    assert main([*arguments, str(out)]) == 2
    assert f"{out} exists already: continue it with --resume {out}" in one_line(capfd)
    (out / "notes.txt").write_text("keep me")
    assert main([*arguments, str(out), "--overwrite"]) == 0
    assert (out / "notes.txt").exists()
    capfd.readouterr()
    assert main([*arguments, str(tmp_path / "data"), "--overwrite"]) == 2
    assert "holds train, which is no part of a run: it is left as it is" in one_line(capfd)
    assert (tmp_path / "data/train").exists()
    assert main(["train", "--resume", str(out), "--lr", "1"]) == 2
    assert "leave out --lr" in one_line(capfd)


def test_empty_and_differing_folders(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    assert main(["train", "--data", str(tmp_path / "empty")]) == 2
    assert "has no train/ and no val/ folder" in one_line(capfd)
    write_folder(tmp_path / "data")
    (tmp_path / "data/val/red").rename(tmp_path / "data/val/blue")
    assert main(["train", "--data", str(tmp_path / "data")]) == 2
    assert "only in train/: red; only in val/: blue" in one_line(capfd)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "convert"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_checkpoint(command, suffix, weights, tmp_path, capfd):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(safetensors.torch.load_file(weights), path)
    else:
        path.write_bytes(weights.read_bytes())
    truncate(path)
    (tmp_path / "a.png").write_bytes(b"")
    arguments = {
        "train": ["--model", MINI, "--checkpoint", str(path)],
        "eval": ["--model", MINI, "--checkpoint", str(path), "--data", "digits"],
        "predict": ["--model", MINI, "--checkpoint", str(path), str(tmp_path / "a.png")],
        "convert": [str(path), str(tmp_path / "out.safetensors")],
    }[command]
    assert main([command, *arguments]) == 1
    message = one_line(capfd)
    assert f"cut{suffix}" in message
    assert "truncated" in message


def test_checkpoint_of_another_model(weights, capfd):
    assert main(["train", "--model", "test_vit", "--img-size", "32", "--checkpoint", str(weights)]) == 1
    message = one_line(capfd)
    assert "weights.safetensors does not fit VisionTransformer" in message
    assert "head.weight (10, 384) in the file, (10, 64) in the model" in message
    assert "keys are missing" in message
    assert "--drop-head" not in message


def test_checkpoint_of_another_class_count_offers_to_drop_the_head(weights, tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    arguments = ["train", "--data", str(folder), *TINY, "--epochs", "1", "--out", str(tmp_path / "run")]
    arguments += ["--img-size", "32", "--checkpoint", str(weights)]
    assert main(arguments) == 1
    message = one_line(capfd)
    assert "head.weight (10, 384) in the file, (2, 384) in the model" in message
    assert "--drop-head keeps the model's own classifier" in message
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--drop-head", "--lr", "1e-9"]) == 0
    trained = safetensors.torch.load_file(tmp_path / "run/last.safetensors")
    given = safetensors.torch.load_file(weights)
    assert trained["head.weight"].shape == (2, 384)
    key = "patch_embed.proj.weight"
    assert torch.allclose(trained[key], given[key], atol=1e-6)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["LINVISION_TEST_PAYLOAD"]),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LINVISION_TEST_PAYLOAD", str(tmp_path / "ran"))
    path = tmp_path / "evil.pth"
    save({"state_dict": Payload()}, path)
    for arguments in (
        ["eval", "--model", MINI, "--checkpoint", str(path), "--data", "digits"],
        ["convert", str(path), str(tmp_path / "out.safetensors")],
    ):
        assert main(arguments) == 1
        assert "evil.pth" in one_line(capfd)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_published_weights_without_a_network(command, tmp_path, monkeypatch, capfd):
    def offline(url, *arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"")
    arguments = {
        "train": ["train", "--model", "vil2-tiny", "--pretrained"],
        "eval": ["eval", "--model", "vil2-tiny", "--data", "digits"],
        "predict": ["predict", str(tmp_path / "a.png")],
    }[command]
    assert main(arguments) == 1
    message = one_line(capfd)
    assert "https://ml.jku.at/research/vision_lstm/download/vil2_tiny16_e800_in1k.th" in message
    assert str(tmp_path / "checkpoints") in message


@pytest.mark.parametrize("command", ["train", "eval", "predict"])
def test_published_weights_of_vim_without_a_network_and_of_l2vit(command, tmp_path, monkeypatch, capfd):
    def offline(repo_id, **options):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "a.png").write_bytes(b"")
    more = {"train": ["--pretrained"], "eval": ["--data", "digits"], "predict": [str(tmp_path / "a.png")]}[command]
    assert main([command, "--model", "vim_tiny_patch16_224", *more]) == 1
    message = one_line(capfd)
    assert "https://huggingface.co/hustvl/Vim-tiny-midclstok" in message
    assert main([command, "--model", "L2ViT_Tiny", *more]) == 2
    assert "no published weights (no weights were ever published); load a file of your own" in one_line(capfd)


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("LINVISION_TRACEBACK", "1")
    with pytest.raises(ValueError, match="digit"):
        main(["train", "--data", "digit"])


def test_ctrl_c_is_quiet(monkeypatch, capfd):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "run", interrupted)
    assert main(["models"]) == 130
    assert capfd.readouterr() == ("", "")


def test_faults_of_our_own_are_not_hidden(monkeypatch):
    def broken(options):
        raise TypeError("a fault of ours")

    monkeypatch.setattr(models, "run", broken)
    with pytest.raises(TypeError, match="a fault of ours"):
        main(["models"])


def test_models_as_table_and_json(capfd):
    assert main(["models", "vil2_tiny*"]) == 0
    table = capfd.readouterr().out
    assert "vil2_tiny_patch16_224.e800_in1k" in table
    assert "6.39" in table
    assert "78.3" in table
    assert "https://ml.jku.at/research/vision_lstm/download/vil2_tiny16_e800_in1k.th" in table
    assert main(["models", "vil2_mini*", "--json"]) == 0
    (entry,) = json.loads(capfd.readouterr().out)
    assert entry["name"] == MINI
    assert entry["parameters"] == sum(p.numel() for p in create_model(MINI).parameters())
    assert entry["input_size"] == [3, 32, 32]
    assert entry["macs"] > 1e6


@pytest.mark.parametrize(
    ("pattern", "name"), [("vil2-tiny", "vil2_tiny_patch16_224.e800_in1k"), ("test_vit2", "test_vit2")]
)
def test_models_takes_aliases_and_names_of_timm(pattern, name, capfd):
    assert main(["models", pattern, "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capfd.readouterr().out)] == [name]


@pytest.mark.parametrize("case", ["vil1_classifier", "vil2_classifier"])
def test_convert_release_files_to_safetensors(case, tmp_path, capfd):
    target = tmp_path / "new" / "out.safetensors"
    assert main(["convert", str(GOLDENS / f"{case}_release.th"), str(target)]) == 0
    assert "tensors" in capfd.readouterr().out
    converted = safetensors.torch.load_file(target)
    golden = safetensors.torch.load_file(GOLDENS / f"{case}.safetensors")
    expected = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(converted[key].reshape(value.shape), value), key


def test_convert_there_and_back(weights, tmp_path):
    plain, released, back = tmp_path / "a.pt", tmp_path / "b.th", tmp_path / "c.safetensors"
    assert main(["convert", str(weights), str(plain)]) == 0
    assert main(["convert", str(plain), str(released), "--model", MINI]) == 0
    assert main(["convert", str(released), str(back)]) == 0
    content = torch.load(released, weights_only=True)
    assert "xlstm.blocks.3.xlstm.conv1d.weight" in content["state_dict"]
    first, last = safetensors.torch.load_file(weights), safetensors.torch.load_file(back)
    assert torch.load(plain, weights_only=True).keys() == first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_convert_refuses(weights, tmp_path, capfd):
    for arguments, message in (
        ([str(weights), str(weights)], "exists already"),
        ([str(weights), str(tmp_path / "a.onnx")], "the suffix tells what to write"),
        ([str(weights), str(tmp_path / "a.safetensors"), "--model", MINI], "--model is for released torch files"),
        ([str(weights), str(tmp_path / "a.th"), "--model", "test_vit"], "no release layout"),
        ([str(weights), str(tmp_path / "a.th"), "--ema"], "has no EMA weights"),
        ([str(tmp_path / "gone.th"), str(tmp_path / "a.safetensors")], "gone.th"),
    ):
        assert main(["convert", *arguments]) in {1, 2}
        assert message in one_line(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
