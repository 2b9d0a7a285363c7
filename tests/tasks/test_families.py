"""Every family, and timm's DeiT, through training, evaluation and prediction."""

import json

import pytest

from linvision.cli import main
from tests.data.samples import write_image

MODELS = {
    "vil_tiny_patch16_224": 32,
    "vim_mini_patch4_32": 16,
    "l2vit_tiny": 32,
    "deit3_tiny_patch16_224": 32,
    "deit_tiny_patch16_224": 32,
}


@pytest.mark.parametrize(("name", "size"), MODELS.items())
def test_a_run_is_trained_measured_and_used(name, size, colours, tmp_path, capfd):
    run, photo = tmp_path / "run", write_image(tmp_path / "photo.png", color=(200, 0, 60))
    options = ["--model", name, "--img-size", str(size), "--epochs", "1", "--batch-size", "6"]
    machine = ["--workers", "0", "--device", "cpu", "--precision", "bf16", "--recipe", "imagefolder"]
    assert main(["train", "--data", str(colours), "--out", str(run), *options, *machine]) == 0
    capfd.readouterr()
    assert main(["eval", "--model", str(run), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["top1"] == pytest.approx(json.loads((run / "summary.json").read_text())["top1"], abs=1e-5)
    assert main(["predict", "--model", str(run), str(photo), "--json"]) == 0
    (entry,) = json.loads(capfd.readouterr().out)
    assert {answer["label"] for answer in entry["predictions"]} == {"green", "red"}
