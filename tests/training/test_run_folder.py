"""Run folders that meet other processes, killed runs, changed data and files that hold anything."""

import json
import multiprocessing
import shutil
from dataclasses import fields

import pytest
import torch
import yaml

import linvision
from linvision.cli import main
from linvision.errors import UsageError
from linvision.training import engine, run_folder
from linvision.training.run_folder import ModelCard, RunFolder
from tests.data.samples import write_folder
from tests.tasks.runs import TINY, metrics, weights


def last_line(capfd) -> str:
    """Return the last line on stderr, of a command that must not have ended in a traceback."""
    captured = capfd.readouterr().err
    assert "Traceback" not in captured
    return captured.splitlines()[-1]


@pytest.fixture
def run(finished, tmp_path) -> RunFolder:
    """Return a copy of a run of two epochs that has a third to go."""
    shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((finished / "config.yaml").read_text())
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | {"epochs": 3}))
    return RunFolder(tmp_path / "run")


def hold(path, started, done):
    with RunFolder(path).locked():
        started.set()
        done.wait(50)


def test_a_folder_has_one_writer(run, colours, monkeypatch, capfd):
    monkeypatch.setattr(run_folder, "SECONDS_OF_ORPHANS", 0.1)
    context = multiprocessing.get_context("fork")
    started, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.path, started, done))
    other.start()
    started.wait(50)
    for options in (
        ["--resume", str(run.path)],
        ["--data", str(colours), *TINY, "--out", str(run.path), "--overwrite"],
    ):
        assert main(["train", *options]) == 2
        assert "is in use by another process" in last_line(capfd)
    other.kill()
    other.join()
    with run.locked():
        assert len(metrics(run.path)) == 2


@pytest.mark.parametrize("left", [[], [".config.yaml.123.tmp"], ["model.json", ".lock"]])
def test_a_run_that_died_before_it_was_configured_gives_its_folder_free(left, colours, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        (out / name).write_text("")
    assert main(["train", "--data", str(colours), *TINY, "--epochs", "1", "--out", str(out)]) == 0
    assert len(metrics(out)) == 1


def renamed(folder):
    for split in ("train", "val"):
        (folder / split / "green").rename(folder / split / "zebra")


def added(folder):
    for split in ("train", "val"):
        shutil.copytree(folder / split / "green", folder / split / "grey")


def more(folder):
    for number in range(6):
        shutil.copy(folder / "train/green/0.png", folder / f"train/green/another-{number}.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "outputs were green and are zebra"),
        (added, "outputs were green, red and are grey"),
        (more, "images were 12 and are 18"),
    ],
)
def test_changed_data_is_refused_before_anything_is_written(change, message, run, tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    config = run.load_config()
    run.save_config(config | {"data": str(folder)})
    change(folder)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    assert main(["train", "--resume", str(run.path)]) == 2
    assert message in last_line(capfd)
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "is gone"),
        (b"", "is damaged"),
        (b"not a checkpoint", "is damaged"),
        ({"a": 1}, "is no training state"),
        ([1], "is no training state"),
        ({"state_dict": {}}, "is no state of this run"),
        ({"state_dict": 3}, "is no state of this run"),
        ({"optimizer_states": [{}]}, "is no state of this run"),
        ({"loops": {}}, "is no state of this run"),
        (torch.nn.Linear(2, 2), "is damaged"),
    ],
)
def test_states_that_are_none_are_named(state, message, run, capfd):
    if state is None:
        run.state.unlink()
    elif isinstance(state, bytes):
        run.state.write_bytes(state)
    else:
        sound = torch.load(run.state, weights_only=True)
        changed = sound | state if isinstance(state, dict) and state.keys() <= sound.keys() else state
        torch.save(changed, run.state)
    assert main(["train", "--resume", str(run.path)]) == 1
    line = last_line(capfd)
    assert "state.ckpt" in line
    assert message in line
    assert "weights_only" not in line


def test_a_state_in_the_shape_of_a_device_is_no_file(run, capfd):
    run.state.unlink()
    run.state.symlink_to("/dev/zero")
    assert main(["train", "--resume", str(run.path)]) == 1
    assert "is no regular file" in last_line(capfd)


JUNK = [None, 3, -1, 1e400, "x", [], {}, [None], {"a": []}, True]


@pytest.mark.parametrize("name", [field.name for field in fields(ModelCard)])
def test_a_model_card_may_hold_anything(name, run, colours, capfd):
    path = run.path / "model.json"
    sound = json.loads(path.read_text())
    for value in JUNK:
        path.write_text(json.dumps(sound | {name: value}))
        assert main(["predict", "--model", str(run.path), str(colours / "val/red/0.png")]) in (0, 1, 2)
        assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '{"model": 1', "[" * 100_000, "{}", '{"model": "vil2-tiny"}', "\0", "9" * 5000]
)
def test_a_model_card_may_be_anything(text, run, colours, capfd):
    (run.path / "model.json").write_text(text)
    assert main(["predict", "--model", str(run.path), str(colours / "val/red/0.png")]) == 1
    assert "model.json" in last_line(capfd)


@pytest.mark.parametrize(
    "key", ["epochs", "lr", "model", "task", "data", "seed", "batch_size", "model_kwargs", "unknown"]
)
def test_a_configuration_may_hold_anything(key, run, monkeypatch, capfd):
    monkeypatch.setattr(engine, "run_training", lambda *arguments: None)
    sound = run.load_config()
    for value in JUNK:
        run.save_config(sound | {key: value})
        assert main(["train", "--resume", str(run.path)]) in (0, 1, 2)
        assert "Traceback" not in capfd.readouterr().err


BOMB = "a: &a [x, x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]" for i in range(20)
)


@pytest.mark.parametrize(
    "text", [BOMB, "lr: [1", "- 1", "[" * 5000, "!!python/object/apply:os.system [ls]", "lr: 2001-01-01"]
)
def test_configurations_on_the_command_line_may_be_anything(text, tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) in (1, 2)
    assert len(last_line(capfd)) < 400
    assert not (tmp_path / "run").exists()


def test_a_run_from_a_shared_model_needs_it_no_more(colours, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = linvision.create_model("vil2_mini_patch4_32", num_classes=2, dim=48)
    linvision.save_pretrained(model, "shared")
    options = [*TINY[2:], "--epochs", "1", "--model", "local-dir:shared", "--out", "run"]
    assert main(["train", "--data", str(colours), *options]) == 0
    assert f"from local-dir:{tmp_path / 'shared'}" in capfd.readouterr().err
    (tmp_path / "run/state.ckpt").unlink()  # as if it had been killed in its first epoch
    first = weights(tmp_path / "run")
    assert main(["train", "--resume", "run"]) == 0
    again = weights(tmp_path / "run")
    assert all(torch.equal(first[key], again[key]) for key in first)
    shutil.rmtree("shared")
    assert main(["predict", "--model", "run", str(colours / "val/red/0.png")]) == 0
    config = RunFolder(tmp_path / "run").load_config()
    RunFolder(tmp_path / "run").save_config(config | {"epochs": 2})
    assert main(["train", "--resume", "run"]) == 0
    assert RunFolder(tmp_path / "run").load_card().start == f"local-dir:{tmp_path / 'shared'}"


def test_a_job_of_several_tasks_trains_in_one_process(colours, tmp_path, monkeypatch):
    job = {"JOB_ID": "1", "NTASKS": "4", "JOB_NAME": "x", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(["train", "--data", str(colours), *TINY, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0


def test_several_processes_are_refused(colours, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--data", str(colours), *TINY, "--out", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE=2" in last_line(capfd)


def test_where_a_run_may_go(tmp_path):
    options = run_folder.RunOptions(out=str(tmp_path / "photos"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("")
    with pytest.raises(UsageError, match=r"holds a\.jpg, which is no part of a run"):
        run_folder.check_out(options)
