"""Resized copies of training images."""

import os

import numpy as np
import pytest

from linvision.data import cache, open_data
from linvision.data.cache import ResizedImages
from linvision.data.images import open_image
from linvision.errors import UnreadableImageError, UsageError
from tests.data.samples import truncate, write_folder, write_image
from tests.data.test_folders import HOW, IMAGES


def copies(folder):
    return sorted(folder.rglob("*.jpg"))


def test_an_image_is_resized_once_until_it_changes(tmp_path, monkeypatch):
    photo, images = write_image(tmp_path / "a.png", size=(80, 60)), ResizedImages(tmp_path / "cache", 30)
    first = images.open(photo, max_pixels=10_000)
    assert first.size == (40, 30)
    (copy,) = copies(tmp_path / "cache")
    opened = []
    monkeypatch.setattr(cache, "open_image", lambda path, **how: opened.append(path) or open_image(path, **how))
    again = images.open(photo, max_pixels=10_000)
    assert opened == [copy]
    assert np.abs(np.asarray(first).astype(int) - np.asarray(again)).mean() < 4
    write_image(photo, size=(90, 60), seed=1)
    assert images.open(photo, max_pixels=10_000).size == (45, 30)
    os.utime(photo, ns=(0, 0))
    images.open(photo, max_pixels=10_000)
    ResizedImages(tmp_path / "cache", 20).open(photo, max_pixels=10_000)
    assert len(copies(tmp_path / "cache")) == 4


def test_small_images_are_not_copied_and_unreadable_ones_raise(tmp_path):
    images = ResizedImages(tmp_path / "cache", 30)
    assert images.open(write_image(tmp_path / "a.png", size=(80, 30)), max_pixels=10_000).size == (80, 30)
    for path in (truncate(write_image(tmp_path / "b.png", size=(80, 60))), tmp_path / "gone.png"):
        with pytest.raises(UnreadableImageError, match=path.name):
            images.open(path, max_pixels=10_000)
    with pytest.raises(UnreadableImageError, match="80x60"):
        images.open(write_image(tmp_path / "c.png", size=(80, 60)), max_pixels=1000)
    assert copies(tmp_path / "cache") == []


def test_a_damaged_copy_is_made_anew(tmp_path):
    photo, images = write_image(tmp_path / "a.png", size=(80, 60)), ResizedImages(tmp_path / "cache", 30)
    images.open(photo, max_pixels=10_000)
    (copy,) = copies(tmp_path / "cache")
    truncate(copy)
    assert images.open(photo, max_pixels=10_000).size == (40, 30)
    assert open_image(copy).size == (40, 30)


def test_a_full_disk_costs_no_image(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "replacing", full)
    photo = write_image(tmp_path / "a.png", size=(80, 60))
    assert ResizedImages(tmp_path / "cache", 30).open(photo, max_pixels=10_000).size == (40, 30)


def test_training_images_are_kept_as_large_as_the_smallest_crop_needs(tmp_path):
    write_folder(tmp_path / "data")
    write_image(tmp_path / "data/train/red/large.png", size=(200, 100))
    write_image(tmp_path / "data/val/red/large.png", size=(200, 100))
    data = open_data(str(tmp_path / "data"), cache=tmp_path / "cache")
    assert IMAGES.crop_scale == 0.25
    assert [len(labels) for _, labels in data.train_batches(HOW, IMAGES, batch_size=64, seed=0)] == [13]
    list(data.test_batches(HOW, batch_size=64))
    assert [open_image(copy).size for copy in copies(tmp_path / "cache")] == [(64, 32)]  # a quarter of it is 16x16


def test_what_cannot_be_a_cache(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--cache .*file cannot be a folder of images"):
        open_data(str(write_folder(tmp_path / "data")), cache=tmp_path / "file")
    with pytest.raises(UsageError, match="--cache x is for folders of images"):
        open_data("digits", cache="x")
