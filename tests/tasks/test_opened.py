"""Runs used from Python and by other commands."""

import json
import shutil

import pytest
import torch
from PIL import Image

import linvision
from linvision.cli import main
from linvision.errors import CheckpointError, UsageError
from linvision.training.run_folder import RunFolder
from tests.data.samples import truncate, write_folder, write_image
from tests.tasks.runs import TINY, same_weights, weights


def test_a_run_answers_for_pictures_and_paths(finished, colours, tmp_path):
    run = linvision.load_run(finished)
    assert run.labels == ("green", "red")
    path = colours / "val/red/0.png"
    with Image.open(path) as image:
        answer = run.predict(image.convert("RGBA"), top_k=1)
    broken = truncate(write_image(tmp_path / "broken.png"))
    several = run.predict([path, broken or tmp_path / "broken.png"], top_k=1)
    assert several[0] == answer
    assert answer["predictions"][0]["label"] in run.labels
    assert "cannot read" in several[1]["error"]
    with pytest.raises(UsageError, match="is no folder"):
        linvision.load_run("runs/nowhere")


def test_a_run_is_a_model_by_its_path(finished):
    model = linvision.create_model(str(finished)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(model(images), linvision.load_run(finished).model(images))
    other = linvision.create_model(str(finished), num_classes=5, img_size=32)
    assert other.head.out_features == 5
    ours, theirs = model.state_dict(), other.state_dict()
    kept = [key for key in ours if ours[key].shape == theirs[key].shape]
    assert set(ours) - set(kept) == {"pos_embed.embed", "head.weight", "head.bias"}
    assert all(torch.equal(ours[key], theirs[key]) for key in kept)
    features = linvision.create_model(str(finished), features_only=True)
    assert len(features(images)) > 0


def test_a_damaged_run_is_named(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    card = json.loads((run / "model.json").read_text())
    (run / "model.json").write_text(json.dumps(card | {"classes": 3}))
    with pytest.raises(CheckpointError, match=r"model\.json is damaged: classes"):
        linvision.create_model(str(run))
    (run / "model.json").write_text(json.dumps(card))
    for name in ("best", "last"):
        (run / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights yet"):
        linvision.create_model(str(run))


def test_training_starts_from_a_run(finished, tmp_path, capfd):
    folder = write_folder(tmp_path / "data")
    for split in ("train", "val"):
        shutil.copytree(folder / split / "red", folder / split / "scarlet")
    options = ["--data", str(folder), "--model", str(finished), *TINY[4:], "--epochs", "1"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    assert f"from {finished}" in capfd.readouterr().err
    card = RunFolder(tmp_path / "run").load_card()
    assert (card.model, card.start, card.preprocess.size) == ("vil2_mini_patch4_32", str(finished), (16, 16))
    assert len(card.classes) == 3


def test_a_run_is_converted(finished, tmp_path):
    target = tmp_path / "run" / "best.safetensors"
    assert main(["convert", str(finished), str(target)]) == 0
    assert same_weights(tmp_path / "run", finished, "best")
    assert weights(finished, "best")
