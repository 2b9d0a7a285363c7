"""Image folders."""

import shutil

import pytest
import torch

from linvision.data import Preprocess, open_data, open_test_data
from linvision.errors import RunError, UsageError
from linvision.recipes import load_recipe
from tests.data.samples import truncate, write_folder, write_image

HOW = Preprocess((16, 16), (0.5,) * 3, (0.5,) * 3)


def test_classes_and_files(tmp_path):
    write_folder(tmp_path / "colours", train=4, val=2)
    (tmp_path / "colours/train/.cache").mkdir()
    (tmp_path / "colours/train/red/notes.txt").touch()
    data = open_data(str(tmp_path / "colours"))
    assert (data.name, data.classes) == ("colours", ("green", "red"))
    assert [label for _, label in data.train] == [0] * 4 + [1] * 4
    assert len(data.test) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_repeat_with_seed_and_epoch(tmp_path, workers):
    data = open_data(str(write_folder(tmp_path)))

    def epoch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = data.train_batches(HOW, load_recipe("imagefolder").settings, batch_size=4, seed=1, workers=workers)
        batches.epoch = number
        torch.manual_seed(number)
        inputs, labels = zip(*batches, strict=True)
        return torch.cat(inputs), torch.cat(labels)

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert first[0].shape == (12, 3, 16, 16)
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    if workers:  # In this process Python's own generator draws as well; a run seeds it for each epoch.
        assert torch.equal(first[0], again[0])


def test_test_batches_are_the_plain_images(tmp_path):
    data = open_data(str(write_folder(tmp_path)))
    (inputs, labels), *rest = data.test_batches(HOW, batch_size=64)
    assert not rest
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (inputs[:3, 1] > inputs[:3, 0]).all()
    assert (inputs[3:, 0] > inputs[3:, 1]).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_named_once(tmp_path, workers):
    data = open_data(str(write_folder(tmp_path)))
    truncate(tmp_path / "train/red/1.png")
    (tmp_path / "train/green/2.png").write_text("no image")
    batches = data.train_batches(HOW, load_recipe("imagefolder").settings, batch_size=6, seed=0, workers=workers)
    for _ in range(2):
        sizes = [(len(inputs), len(labels)) for inputs, labels in batches]
        assert sum(size for size, _ in sizes) == 10
        assert all(inputs == labels for inputs, labels in sizes)
    assert sorted(batches.unreadable) == [str(tmp_path / "train/green/2.png"), str(tmp_path / "train/red/1.png")]
    assert "not an image" in batches.unreadable[str(tmp_path / "train/green/2.png")]


def test_a_batch_without_readable_images_is_empty(tmp_path):
    data = open_data(str(write_folder(tmp_path, val=1)))
    truncate(tmp_path / "val/green/0.png")
    sizes = [len(labels) for _, labels in data.test_batches(HOW, batch_size=1)]
    assert sizes == [0, 1]


def test_no_readable_image_at_all(tmp_path):
    data = open_data(str(write_folder(tmp_path, val=1)))
    for name in ("green", "red"):
        (tmp_path / f"val/{name}/0.png").write_text("no image")
    with pytest.raises(RunError, match=r"none of the 2 images could be read; cannot read .*val"):
        list(data.test_batches(HOW, batch_size=1))


def test_empty_folder(tmp_path):
    with pytest.raises(UsageError, match="has no train/ and no val/ folder"):
        open_data(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="has no val/ folder"):
        open_data(str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match="train is empty: it needs a sub-folder"):
        open_data(str(tmp_path))


def test_class_without_images(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/blue").mkdir()
    with pytest.raises(UsageError, match="no images for 1 of its 3 classes: blue"):
        open_data(str(tmp_path))


def test_different_class_folders(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog", "emu"))
    shutil.rmtree(tmp_path / "val/emu")
    (tmp_path / "val/dog").rename(tmp_path / "val/dogs")
    with pytest.raises(UsageError, match=r"only in train/: dog, emu \(like dogs\); only in val/: dogs"):
        open_data(str(tmp_path))


def test_folders_to_measure_on_need_no_training_images(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "flat" / name / "a.png")
    flat = open_test_data(str(tmp_path / "flat"))
    assert (flat.classes, len(flat.test)) == (("cat", "dog"), 2)
    with pytest.raises(UsageError, match="no train/ folder"):
        flat.train_batches(HOW, load_recipe("imagefolder").settings, batch_size=1, seed=0)
    split = open_test_data(str(write_folder(tmp_path / "split")))
    assert split.classes == ("green", "red")
    assert len(split.test) == 6
