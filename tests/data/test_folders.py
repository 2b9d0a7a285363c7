"""Batches of image files."""

import shutil

import pytest
import torch

from linvision.data import FolderData, Preprocess, open_data
from linvision.errors import RunError
from linvision.recipes import load_recipe
from tests.data.samples import truncate, write_folder, write_image

IMAGES = load_recipe("imagefolder").settings
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
        batches = data.train_batches(HOW, IMAGES, batch_size=4, seed=1, workers=workers)
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
    batches = data.train_batches(HOW, IMAGES, batch_size=6, seed=0, workers=workers)
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


def test_no_readable_image_at_all_is_said_before_the_first_batch(tmp_path):
    data = open_data(str(write_folder(tmp_path, val=1)))
    for path in tmp_path.rglob("*.png"):
        path.write_text("no image")
    with pytest.raises(RunError, match=r"none of the 2 images could be read; cannot read .*val.*not an image"):
        data.test_batches(HOW, batch_size=1)
    with pytest.raises(RunError, match=r"none of the 12 images could be read; cannot read .*train.*not an image"):
        data.train_batches(HOW, IMAGES, batch_size=4, seed=0)


def test_images_that_vanish_in_the_meantime(tmp_path):
    data = open_data(str(write_folder(tmp_path, val=1)))
    batches = data.test_batches(HOW, batch_size=1)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(RunError, match="none of the 2 images could be read"):
        list(batches)


@pytest.mark.parametrize(("images", "sizes"), [(12, [5, 5, 2]), (11, [5, 5]), (6, [5]), (1, [1]), (4, [4])])
def test_training_takes_the_last_batch_unless_it_is_of_one_image(tmp_path, images, sizes):
    items = tuple((write_image(tmp_path / f"{index}.png"), 0) for index in range(images))
    batches = FolderData("x", ("a",), items, items).train_batches(HOW, IMAGES, batch_size=5, seed=0)
    assert [len(labels) for _, labels in batches] == sizes
    assert (len(batches), batches.num_images) == (len(sizes), images)


def test_the_limit_of_pixels_holds_in_workers(tmp_path):
    write_image(write_folder(tmp_path, val=1) / "val/red/large.png", size=(60, 40))
    batches = open_data(str(tmp_path), max_pixels=2000).test_batches(HOW, batch_size=4, workers=1)
    assert sum(len(labels) for _, labels in batches) == 2
    (path, reason), *rest = batches.unreadable.items()
    assert not rest
    assert path == str(tmp_path / "val/red/large.png")
    assert "60x40 pixels are more than the limit of 2,000" in reason


def test_names_with_line_ends_stay_whole(tmp_path):
    write_folder(tmp_path, val=1)
    odd = tmp_path / "val/red/two\nlines.png"
    odd.write_text("no image")
    batches = open_data(str(tmp_path)).test_batches(HOW, batch_size=4)
    assert sum(len(labels) for _, labels in batches) == 2
    assert list(batches.unreadable) == [str(odd)]
