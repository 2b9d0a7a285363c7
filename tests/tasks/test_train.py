"""Training runs: their folder, resuming, and what goes wrong on the way."""

import json
import multiprocessing
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linvision import files
from linvision.cli import main
from linvision.commands.train import Options, resumed_options
from linvision.data import DATASETS
from linvision.data.arrays import digits
from linvision.tasks.classifier import Classifier
from linvision.tasks.pictures import choose_examples
from linvision.training import checkpoints, progress
from linvision.training.run_folder import FILES, RunFolder
from tests.data.samples import truncate, write_folder
from tests.tasks.runs import TINY, metrics, same_weights, weights

# Everything that draws random numbers; the moving average and the schedule carry state.
RANDOM = ("--mixup", "0.5", "--cutmix", "0.5", "--drop-path", "0.3", "--ema", "0.5", "--epochs", "3", "--seed", "5")


def test_run_folder_is_complete(finished):
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        *FILES,
        "predictions.png",
        "confusion_matrix.png",
        "tensorboard",
    }
    assert [path for path in (finished / "tensorboard").iterdir() if "events" in path.name]
    for name in ("curves", "predictions", "confusion_matrix"):
        with Image.open(finished / f"{name}.png") as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10


def test_metrics_have_a_line_an_epoch(finished):
    rows = metrics(finished)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) == {"epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5"}
    assert 0 < float(rows[0]["train_loss"]) < 5


def test_summary(finished):
    summary = json.loads((finished / "summary.json").read_text())
    rows = metrics(finished)
    best = max(rows, key=lambda row: float(row["val_top1"]))  # the first of equals
    assert summary["weights"] == f"best.safetensors, epoch {best['epoch']}"
    assert summary["top1"] == pytest.approx(float(best["val_top1"]), abs=1e-5)
    assert summary["loss"] == pytest.approx(float(best["val_loss"]), rel=1e-4)
    assert (summary["measured_on"], summary["start"]) == ("validation", "scratch")
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights(finished).values())
    assert (summary["epochs"], summary["train_images"], summary["validation_images"]) == (2, 12, 6)
    assert {"top5", "seconds", "images_per_second", "seed", "device", "threads", "versions"} <= set(summary)
    assert summary["versions"]["torch"] == torch.__version__


def test_configuration_starts_the_same_run_again(finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["lr"] == 5e-4
    assert main(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert same_weights(finished, tmp_path / "again")
    assert metrics(finished) == metrics(tmp_path / "again")


def test_checkpointing_changes_no_result(finished, colours, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY, "--checkpointing", "selective"]) == 0
    assert same_weights(finished, out)
    for given, expected in (({}, "selective"), ({"checkpointing": "full"}, "full")):  # on a smaller machine, say
        resumed = resumed_options(Options(resume=str(out), **given), RunFolder(out).load_config(), str(out))
        assert resumed.checkpointing == expected


def test_checkpointing_that_a_model_does_not_have(colours, capfd):
    options = ["--data", str(colours), "--model", "resnet18", "--img-size", "32", "--checkpointing", "selective"]
    options += ["--recipe", "imagefolder"]
    assert main(["train", *options]) == 2
    assert "--checkpointing selective: ResNet does not have it" in capfd.readouterr().err


def test_seeds_differ(finished, colours, tmp_path):
    assert main(["train", "--data", str(colours), "--out", str(tmp_path / "a"), *TINY, "--seed", "1"]) == 0
    assert not same_weights(finished, tmp_path / "a")


class InterruptedFinaliser:
    """Gets a signal while it is finalised, where Python would drop what a handler raised."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("data", "workers"), [("colours", "0"), ("colours", "2"), ("digits", "0")])
def test_resumed_run_equals_an_uninterrupted_one(data, workers, colours, tmp_path, monkeypatch):
    whole = digits(Path())
    few = replace(whole, train=tuple(part[:20] for part in whole.train), test=tuple(part[:9] for part in whole.test))
    monkeypatch.setitem(DATASETS, "digits", lambda root: few)
    name = str(colours) if data == "colours" else data
    options = ["--data", name, *TINY, *RANDOM, "--workers", workers]
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0
    step = Classifier.training_step

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 0:
            InterruptedFinaliser()
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(["train", *options, "--out", str(tmp_path / "parts")])
    assert len(metrics(tmp_path / "parts")) == 1
    assert not (tmp_path / "parts/summary.json").exists()
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for which in ("last", "best"):
        assert same_weights(tmp_path / "parts", tmp_path / "whole", which)
    assert (tmp_path / "parts/summary.json").exists()


def test_run_that_stopped_in_its_first_epoch_resumes(finished, colours, tmp_path, monkeypatch, capfd):
    def interrupted(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Classifier, "training_step", interrupted)
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="130"):
        main(["train", "--data", str(colours), "--out", str(out), *TINY])
    assert f"continue with: linvision train --resume {out}" in capfd.readouterr().err
    monkeypatch.undo()
    assert main(["train", "--resume", str(out)]) == 0
    assert same_weights(out, finished)


def test_resuming_a_finished_run_only_writes_its_results(finished, tmp_path, colours):
    out = tmp_path / "run"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY]) == 0
    before = json.loads((out / "summary.json").read_text())
    (out / "summary.json").unlink()
    (out / "curves.png").unlink()
    (out / ".state.ckpt.123.tmp").write_text("left by a killed process")
    assert main(["train", "--resume", str(out)]) == 0
    assert not (out / ".state.ckpt.123.tmp").exists()
    after = json.loads((out / "summary.json").read_text())
    assert after["top1"] == before["top1"]
    assert after["seconds"] == before["seconds"]
    assert (out / "curves.png").exists()
    assert same_weights(out, finished)


def test_a_full_disk_loses_nothing(finished, colours, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    save, write = checkpoints.AtomicCheckpointIO.save_checkpoint, Path.write_bytes

    def full(path, content):
        write(path, content[:10])
        raise OSError(28, "No space left on device")

    def second(self, checkpoint, path, storage_options=None):
        if checkpoint["epoch"] == 1:
            monkeypatch.setattr(Path, "write_bytes", full)
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(checkpoints.AtomicCheckpointIO, "save_checkpoint", second)
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY]) == 1
    assert f"No space left on device: '{out / 'state.ckpt'}'" in capfd.readouterr().err
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]
    monkeypatch.undo()
    assert main(["train", "--resume", str(out)]) == 0
    assert metrics(out) == metrics(finished)
    assert same_weights(out, finished)


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_state_is_named(colours, tmp_path, capfd):
    out = tmp_path / "run"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY, "--epochs", "1"]) == 0
    truncate(out / "state.ckpt")
    capfd.readouterr()
    assert main(["train", "--resume", str(out)]) == 1
    assert "state.ckpt is damaged" in capfd.readouterr().err.splitlines()[-1]
    (out / "config.yaml").write_text("lr: [1")
    assert main(["train", "--resume", str(out)]) == 1
    assert "config.yaml is damaged" in capfd.readouterr().err.splitlines()[-1]


def test_divergence_stops_the_run_and_keeps_the_last_good_epoch(colours, tmp_path, monkeypatch, capfd):
    step = Classifier.training_step
    monkeypatch.setattr(
        Classifier, "training_step", lambda self, *batch: step(self, *batch) * (torch.nan if self.current_epoch else 1)
    )
    out = tmp_path / "run"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY]) == 1
    assert "the training loss became nan in epoch 2: lower --lr" in capfd.readouterr().err
    assert len(metrics(out)) == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_unreadable_images_are_listed_once(tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    truncate(folder / "train/red/1.png")
    truncate(folder / "val/green/0.png")
    out = tmp_path / "run"
    assert main(["train", "--data", str(folder), "--out", str(out), *TINY, "--batch-size", "12"]) == 0
    captured = capfd.readouterr().err
    assert "2 images could not be read and were skipped" in captured
    assert captured.count("train/red/1.png") == captured.count("val/green/0.png") == 1
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["unreadable"]) == 2
    assert summary["validation_images"] == 5


def test_a_line_an_epoch_without_a_terminal(colours, tmp_path, capfd):
    assert main(["train", "--data", str(colours), "--out", str(tmp_path / "run"), *TINY]) == 0
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    for part in ("epoch 2/2", "loss", "train", "val", "images/s", "left"):
        assert part in lines[1]
    assert "\x1b" not in captured.err
    assert captured.out.startswith("validation accuracy")
    assert len(captured.out.splitlines()) == 1


def test_a_live_bar_on_a_terminal(colours, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", (0.0, 0.0))
    assert main(["train", "--data", str(colours), "--out", str(tmp_path / "run"), *TINY]) == 0
    captured = capfd.readouterr().err
    for part in ("epoch 1/2", "accuracy", "images/s", "left", "\x1b["):
        assert part in captured


def test_next_free_folder_by_default(colours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/vil2_mini_patch4_32-colours-1").mkdir(parents=True)
    assert main(["train", "--data", str(colours), *TINY, "--epochs", "1"]) == 0
    assert (tmp_path / "runs/vil2_mini_patch4_32-colours-2/summary.json").exists()


def test_models_of_timm_train_at_any_size(colours, tmp_path):
    for model, size in (("test_vit", "32"), ("test_resnet", "48")):
        out = tmp_path / model
        options = ["--data", str(colours), *TINY, "--model", model, "--img-size", size, "--epochs", "1"]
        options += ["--recipe", "imagefolder"]
        assert main(["train", *options, "--out", str(out)]) == 0
        assert json.loads((out / "model.json").read_text())["preprocess"]["size"] == [int(size)] * 2


def test_examples_show_mistakes_and_right_answers():
    wrong = torch.arange(100) < 50
    chosen = choose_examples(wrong, 30)
    assert len(chosen) == len(chosen.unique()) == 30
    assert wrong[chosen].sum() == 10
    assert chosen.tolist() == sorted(chosen.tolist())
    assert len(choose_examples(wrong[:5], 30)) == 5


def test_a_test_folder_is_measured_once_and_quoted(tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    shutil.copytree(folder / "val", folder / "test")
    (folder / "test/red/0.png").unlink()
    out = tmp_path / "run"
    assert main(["train", "--data", str(folder), "--out", str(out), *TINY]) == 0
    assert capfd.readouterr().out.startswith("test accuracy")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["measured_on"], summary["measured_images"], summary["validation_images"]) == ("test", 5, 6)
    assert "top1" in summary["validation"]


def test_weights_that_give_no_numbers_are_said_to(finished, tmp_path, colours, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    state = weights(run, "best")
    state["head.weight"][0] = 3e38  # finite, as weights must be
    files.write_weights(run / "best.safetensors", state)
    assert main(["eval", "--model", str(run), "--json", "--by-class"]) == 1
    captured = capfd.readouterr()
    measured = json.loads(captured.out, parse_constant=pytest.fail)
    assert (measured["not_numbers"], measured["top1"], measured["loss"]) == (6, 0.0, None)
    assert "6 of 6 images have outputs that are no numbers" in captured.err
    image = str(colours / "val/red/0.png")
    assert main(["predict", "--model", str(run), image, "--json"]) == 1
    (entry,) = json.loads(capfd.readouterr().out)
    assert entry == {"image": image, "error": f"{image}: the model's outputs are no numbers (NaN)"}


def test_a_killed_worker_is_one_line(colours, tmp_path, monkeypatch, capfd):
    step = Classifier.training_step

    def kill(self, batch, batch_idx):
        for worker in multiprocessing.active_children():
            worker.kill()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", kill)
    options = ["--data", str(colours), *TINY, "--batch-size", "2", "--workers", "1"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 1
    advice, line = capfd.readouterr().err.splitlines()[-2:]
    assert "a process that decodes images was killed" in line
    assert advice.endswith(f"continue with: linvision train --resume {tmp_path / 'run'}")


def test_a_share_is_held_back_and_measured_again(tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    shutil.copytree(folder / "train", tmp_path / "photos")
    out = tmp_path / "run"
    options = ["--data", str(tmp_path / "photos"), "--val-split", "0.3", "--cache", str(tmp_path / "cache")]
    assert main(["train", *options, "--out", str(out), *TINY]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["train_images"] + summary["validation_images"] == 12
    capfd.readouterr()
    assert main(["eval", "--model", str(out), "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert measured["images"] == summary["validation_images"]
    assert measured["top1"] == pytest.approx(summary["top1"], abs=1e-5)


def test_a_frozen_backbone_stays_as_it_is(finished, colours, tmp_path, capfd):
    options = ["train", "--data", str(colours), *TINY, "--freeze", "backbone"]
    assert main([*options, "--out", str(tmp_path / "no")]) == 2
    assert "--freeze backbone needs weights" in capfd.readouterr().err
    start = ["--checkpoint", str(finished / "last.safetensors")]
    assert main([*options, *start, "--out", str(tmp_path / "run")]) == 0
    before, after = weights(finished), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("patterns", ["blocks.9.*", "*"])
def test_patterns_that_freeze_nothing_or_all_are_refused(patterns, colours, tmp_path, capfd):
    assert main(["train", "--data", str(colours), *TINY, "--freeze", patterns, "--out", str(tmp_path / "run")]) == 2
    assert f"--freeze {patterns}" in capfd.readouterr().err


@pytest.mark.parametrize("balance", ["loss", "sampling"])
def test_rare_classes_count_as_much(balance, tmp_path):
    folder = write_folder(tmp_path / "data")
    for path in sorted((folder / "train/red").iterdir())[1:]:
        path.unlink()
    out = tmp_path / "run"
    assert main(["train", "--data", str(folder), "--out", str(out), *TINY, "--balance", balance]) == 0
    assert len(metrics(out)) == 2


def test_tensorboard_has_rates_speed_pictures_and_settings(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert {"train_loss_step", "lr-AdamW/pg1", "images_per_second", "val_top1"} <= set(events.Tags()["scalars"])
    assert {"curves", "predictions", "confusion_matrix"} <= set(events.Tags()["images"])
