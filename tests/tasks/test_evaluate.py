"""Measuring: the figures, the labels, the command ``linvision eval``."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from linvision import create_model
from linvision.cli import main
from linvision.data import Preprocess, open_test_data
from linvision.files import write_weights
from linvision.tasks.classify import classify
from tests.data.samples import truncate, write_folder, write_image

CPU = torch.device("cpu")


def test_figures_are_those_of_the_definitions(colours):
    how = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 9)).eval()
    data = open_test_data(str(colours))
    measured = classify(model, data.test_batches(how, batch_size=4), device=CPU)
    batches = list(data.test_batches(how, batch_size=64))
    with torch.inference_mode():
        logits, labels = model(batches[0][0]), batches[0][1]
    assert torch.equal(measured.predictions, logits.argmax(dim=1))
    assert measured.figures["top1"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert measured.figures["top5"] == pytest.approx((ranks < 5).float().mean().item())
    assert measured.figures["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)
    confusion = measured.confusion(9)
    assert confusion.sum(dim=1).tolist() == [3, 3, 0, 0, 0, 0, 0, 0, 0]
    assert confusion.diagonal().sum() == (measured.predictions == labels).sum()


def test_a_run_on_its_own_data(finished, capfd):
    assert main(["eval", "--model", str(finished), "--json", "--by-class"]) == 0
    result = json.loads(capfd.readouterr().out)
    summary = json.loads((finished / "summary.json").read_text())
    assert result["top1"] == pytest.approx(summary["top1"], abs=1e-5)
    assert result["images"] == 6
    assert set(result["by_class"]) == {"green", "red"}
    assert sum(entry["top1"] * entry["images"] for entry in result["by_class"].values()) == pytest.approx(
        result["top1"] * 6
    )
    assert {"precision", "recall", "f1"} <= set(result["by_class"]["red"])
    assert {"top5", "loss", "f1", "images_per_second", "model", "data"} <= set(result)


def test_a_run_on_another_folder_as_text(finished, tmp_path, capfd):
    for index in range(3):
        write_image(tmp_path / "some" / "red" / f"{index}.png", color=(200, 0, 60))
    truncate(tmp_path / "some/red/1.png")
    arguments = ["eval", "--model", str(finished), "--data", str(tmp_path / "some"), "--img-size", "32", "--by-class"]
    assert main(arguments) == 0
    captured = capfd.readouterr()
    assert "top-1" in captured.out
    assert "2 images" in captured.out
    assert "red" in captured.out.splitlines()[-2]
    assert "skipped: cannot read" in captured.err


def test_a_named_model_knows_wordnet_folders(tmp_path, capfd):
    torch.manual_seed(0)
    model = create_model("test_vit")
    write_weights(tmp_path / "weights.safetensors", model.state_dict())
    write_folder(tmp_path / "data", classes=("n01440764", "n02123045"))
    arguments = ["eval", "--model", "test_vit", "--checkpoint", str(tmp_path / "weights.safetensors")]
    assert main([*arguments, "--data", str(tmp_path / "data"), "--json", "--by-class"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [title.split(",")[0] for title in result["by_class"]] == ["tench", "tabby"]
    assert main([*arguments, "--data", "digits"]) == 2
    assert "digits has 10 classes but test_vit tells 1000 others apart" in capfd.readouterr().err


def test_vil_is_measured_without_a_crop():
    assert Preprocess.of_model(create_model("vil2_tiny_patch16_224")).crop_ratio == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs --model"),
        (["--model", "vil2_mini_patch4_32", "--checkpoint", "gone.pth", "--data", "digits"], "gone.pth"),
        (["--model", "vil2-tinny", "--data", "digits"], "did you mean vil2-tiny"),
        (["--model", "{run}", "--data", "gone"], "no data set and no folder is called gone"),
        (["--model", "{run}", "--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--model", "{run}", "--data", "digits"], "does not know 0, 1, 2, 3, 4, ..."),
        (["--model", "{run}", "--img-size", "17"], "17"),
        (["--model", "{empty}"], "holds no run: it has no model.json"),
        (["--model", "{run}", "--precision", "16", "--device", "cpu"], "--precision 16 needs a GPU"),
    ],
)
def test_mistakes(arguments, message, finished, tmp_path, capfd):
    arguments = [argument.format(run=finished, empty=tmp_path) for argument in arguments]
    assert main(["eval", *arguments]) in {1, 2}
    captured = capfd.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_damaged_model_card_and_missing_weights(finished, tmp_path, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("best", "last"):
        (run / f"{name}.safetensors").unlink()
    assert main(["eval", "--model", str(run)]) == 2
    assert "has no weights yet" in capfd.readouterr().err
    (run / "model.json").write_text('{"model": 3}')
    assert main(["eval", "--model", str(run)]) == 1
    assert "model.json: model takes text, not 3" in capfd.readouterr().err
