"""A task of its own goes through the same commands, with its own columns and picture; training knows nothing of it."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn.functional import mse_loss

from linvision import tasks
from linvision.cli import main
from linvision.errors import UnknownNameError
from linvision.training.curves import save_figure
from linvision.training.module import TrainingModule
from linvision.training.task import Curve, Measured, Task
from tests.tasks.runs import TINY, same_weights


class ColourModule(TrainingModule):
    """Learns the mean of each channel of its inputs."""

    def error(self, model, batch) -> Tensor:
        inputs, labels = batch
        error = mse_loss(model(inputs), inputs.mean((2, 3)))
        self.log(
            "train_loss" if self.training else "val_error",
            error if self.training else error.sqrt(),
            batch_size=len(labels),
            on_epoch=True,
        )
        return error

    def training_step(self, batch, batch_idx) -> Tensor:
        return self.error(self.model, batch)

    def validation_step(self, batch, batch_idx) -> None:
        self.error(self.final_model, batch)


class MeanColour(Task):
    """The mean colour of an image."""

    name = "mean-colour"
    columns = ("train_loss", "val_error")
    best, highest = "val_error", False
    curves = (Curve("error", "error"),)
    pictures = ("colours.png",)

    def outputs(self, data) -> tuple[str, ...]:
        return ("red", "green", "blue")

    def module(self, model, settings, *, outputs, batches) -> ColourModule:
        return ColourModule(model, settings, steps_per_epoch=len(batches))

    def measure(self, opened, batches, *, data, device, precision) -> Measured:
        with torch.inference_mode():
            errors = [(opened.model(x.to(device)).cpu() - x.mean((2, 3))).square().mean(1) for x, _ in batches]
        error = torch.cat(errors).mean().sqrt().item()
        return Measured({"error": error}, sum(map(len, errors)), 1.0)

    def format(self, column: str, value: float) -> str:
        return f"{value:.4f}"

    def result_line(self, measured: Measured) -> str:
        return f"error {measured.figures['error']:.4f}"

    eval_line = result_line

    def draw(self, folder: Path, measured, batches, *, opened, title: str) -> None:
        figure = Figure(figsize=(4, 3))
        inputs, _ = next(iter(batches))
        figure.subplots().bar(opened.labels, opened.model(inputs).detach().mean(0).tolist())
        save_figure(figure, folder / "colours.png")

    def answer(self, opened, inputs: Tensor, *, top_k: int) -> list[dict[str, Any]]:
        return [{"colour": colour} for colour in opened.model(inputs).tolist()]

    def answer_rows(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        return [dict(zip(("red", "green", "blue"), answer["colour"], strict=True))]

    def answer_table(self, answers: Sequence[tuple[str, dict[str, Any]]]) -> Table:
        table = Table("image", "colour")
        for path, answer in answers:
            table.add_row(path, " ".join(f"{part:.2f}" for part in answer["colour"]))
        return table


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "mean-colour", f"{__name__}:MeanColour")


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def test_a_task_trains_resumes_evaluates_and_predicts(colours, tmp_path, monkeypatch, capfd):
    options = ["train", "--task", "mean-colour", "--data", str(colours), *TINY, "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options, str(whole)]) == 0
    captured = capfd.readouterr()
    assert captured.out.startswith("validation error ")
    assert "epoch 2/2  train_loss " in captured.err

    step = ColourModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.current_epoch == 1:
            raise SystemExit(130)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ColourModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        main([*options, str(parts)])
    monkeypatch.setattr(ColourModule, "training_step", step)
    assert len(rows(parts)) == 1
    assert main(["train", "--resume", str(parts)]) == 0
    assert rows(parts) == rows(whole)
    assert same_weights(parts, whole)

    assert list(rows(whole)[0]) == ["epoch", "lr", "train_loss", "val_error"]
    assert yaml.safe_load((whole / "config.yaml").read_text())["task"] == "mean-colour"
    for name in ("colours.png", "curves.png"):
        with Image.open(whole / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["task"] == "mean-colour"
    assert summary["error"] == pytest.approx(min(float(row["val_error"]) for row in rows(whole)), rel=1e-3)

    capfd.readouterr()
    assert main(["eval", "--model", str(whole), "--json"]) == 0
    measured = json.loads(capfd.readouterr().out)
    assert measured["error"] == pytest.approx(summary["error"], rel=1e-3)
    image = next((colours / "val").rglob("*.png"))
    assert main(["predict", "--model", str(whole), str(image), "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)[0]["colour"]) == 3
    assert main(["predict", "--model", str(whole), str(image)]) == 0
    assert capfd.readouterr().out.count("\t") == 3
    assert main([*options, str(whole), "--overwrite", "--epochs", "1"]) == 0
    assert len(rows(whole)) == 1


def test_unknown_tasks_are_answered_with_the_nearest(capfd):
    assert main(["train", "--task", "clasify"]) == 2
    assert "no task is called clasify; did you mean classify?" in capfd.readouterr().err
    with pytest.raises(UnknownNameError, match="mean-colour"):
        tasks.get_task("colour")
