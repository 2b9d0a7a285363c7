"""The command ``linvision predict``."""

import csv
import json
import os

import pytest
import torch

from linvision import create_model
from linvision.cli import main
from linvision.commands.predict import expand
from linvision.files import write_weights
from tests.data.samples import truncate, write_image


@pytest.fixture
def photos(tmp_path):
    for name in ("a.png", "b.jpg", "deep/c [1].png"):
        write_image(tmp_path / "photos" / name)
    return tmp_path / "photos"


def predictions(capfd) -> list[dict]:
    return json.loads(capfd.readouterr().out)


def test_files_folders_and_patterns_are_found_once_and_in_order(photos):
    paths, unmatched = expand([str(photos / "b.jpg"), str(photos), str(photos / "**/*.png"), str(photos / "*.gif")])
    assert [path.name for path in paths] == ["b.jpg", "a.png", "c [1].png"]
    assert unmatched == [str(photos / "*.gif")]


def test_relative_patterns(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert [str(path) for path in expand(["*.jpg", "deep/*"])[0]] == ["b.jpg", "deep/c [1].png"]


def test_json_holds_every_image_with_falling_probabilities(finished, photos, capfd):
    assert main(["predict", "--model", str(finished), str(photos), "--json", "--batch-size", "2"]) == 0
    result = predictions(capfd)
    assert [entry["image"] for entry in result] == [str(photos / name) for name in ("a.png", "b.jpg", "deep/c [1].png")]
    for entry in result:
        probabilities = [answer["probability"] for answer in entry["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {answer["label"] for answer in entry["predictions"]} == {"green", "red"}


def test_batching_does_not_change_answers(finished, photos, capfd):
    for size in ("1", "3"):
        write_image(photos / "d.png", size=(31, 90))
        assert main(["predict", "--model", str(finished), str(photos), "--json", "--batch-size", size]) == 0
    first, second = capfd.readouterr().out.split("]\n[")
    first, second = json.loads(first + "]"), json.loads("[" + second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one["predictions"], other["predictions"], strict=True):
            assert a["label"] == b["label"]
            assert a["probability"] == pytest.approx(b["probability"], abs=1e-5)


def test_table_names_images_and_classes(finished, photos, capfd):
    assert main(["predict", "--model", str(finished), str(photos), "--top-k", "1"]) == 0
    lines = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(photos / name) for name in ("a.png", "b.jpg", "deep/c [1].png")]
    assert all(0.5 <= float(line[-1]) <= 1 for line in lines)


def test_lines_of_values_and_of_json(finished, photos, capfd):
    truncate(photos / "a.png")
    arguments = ["predict", "--model", str(finished), str(photos), "--top-k", "2", "--workers", "1"]
    assert main([*arguments, "--csv"]) == 1
    rows = list(csv.DictReader(capfd.readouterr().out.splitlines()))
    assert [(row["image"], row["rank"]) for row in rows] == [
        (str(photos / name), rank) for name in ("b.jpg", "deep/c [1].png") for rank in "12"
    ]
    assert all(len(row["probability"]) <= 6 for row in rows)
    assert main([*arguments, "--jsonl"]) == 1
    entries = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert ["error" in entry for entry in entries] == [True, False, False]


def test_a_table_on_a_terminal(finished, photos, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["predict", "--model", str(finished), str(photos), "--top-k", "1"]) == 0
    assert capfd.readouterr().out.count("%") == 3


def test_unreadable_images_are_reported_and_the_others_answered(finished, photos, capfd):
    truncate(photos / "a.png")
    arguments = ["predict", "--model", str(finished), str(photos), str(photos / "gone.png")]
    assert main(arguments) == 1
    captured = capfd.readouterr()
    assert "b.jpg" in captured.out
    assert len(captured.err.splitlines()) == 2
    assert "a.png" in captured.err
    assert f"no image found at {photos / 'gone.png'}" in captured.err
    assert main([*arguments, "--json"]) == 1
    result = predictions(capfd)
    assert ["error" in entry for entry in result] == [True, False, False, True]


def test_nothing_found(finished, tmp_path, capfd):
    assert main(["predict", "--model", str(finished), str(tmp_path), str(tmp_path / "*.png")]) == 2
    assert capfd.readouterr().err.startswith("linvision: error: no image found at")


def test_only_unreadable_images(finished, tmp_path, capfd):
    (tmp_path / "a.png").write_text("text")
    assert main(["predict", "--model", str(finished), str(tmp_path / "a.png")]) == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a.png" in captured.err


def test_imagenet_classes_are_named(photos, tmp_path, capfd):
    torch.manual_seed(0)
    write_weights(tmp_path / "w.safetensors", create_model("test_vit").state_dict())
    arguments = ["--model", "test_vit", "--checkpoint", str(tmp_path / "w.safetensors"), "--img-size", "96"]
    assert main(["predict", *arguments, str(photos / "a.png"), "--json", "--top-k", "3"]) == 0
    answers = predictions(capfd)[0]["predictions"]
    assert len(answers) == 3
    assert all(answer["label"].startswith("n0") and answer["title"] for answer in answers)


def test_any_size_for_a_linear_model(finished, photos, capfd):
    assert main(["predict", "--model", str(finished), str(photos / "a.png"), "--img-size", "40", "--json"]) == 0
    assert len(predictions(capfd)) == 1
    assert main(["predict", "--model", str(finished), str(photos / "a.png"), "--img-size", "41"]) == 2
    assert "41 is not a multiple of the patch size 4" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--top-k", "--batch-size"])
def test_numbers_below_one(option, photos, capfd):
    assert main(["predict", str(photos), option, "0"]) == 2
    assert f"{option} 0 is out of range: it must be at least 1" in capfd.readouterr().err


def test_lines_show_names_that_are_no_utf8_as_escapes(finished, tmp_path, capfd):
    write_image(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9\t.png"))
    for how in ([], ["--csv"], ["--jsonl"]):
        assert main(["predict", "--model", str(finished), str(tmp_path), *how]) == 0
        assert (r"caf\udce9\t.png" if how == ["--jsonl"] else r"caf\xe9\x09.png") in capfd.readouterr().out
