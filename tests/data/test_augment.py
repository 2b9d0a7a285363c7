"""Random changes of batches."""

import math

import pytest
import torch

from linvision.data import Augment, augment


def changed(images: torch.Tensor, seed: int = 0, **how) -> torch.Tensor:
    return augment(images, Augment(**how), generator=torch.Generator().manual_seed(seed))


def dot(x: int, y: int, batch: int = 64, side: int = 16) -> torch.Tensor:
    images = torch.zeros(batch, 1, side, side)
    images[:, :, y, x] = 1
    return images


def test_nothing_is_changed_without_limits():
    images = torch.rand(3, 2, 8, 8)
    assert changed(images) is images


def test_shifts_are_whole_pixels_within_the_limit():
    moved = changed(dot(8, 8), shift=0.125)
    places = moved.flatten(1).argmax(dim=1)
    rows, columns = places // 16, places % 16
    assert torch.allclose(moved.flatten(1).max(dim=1).values, torch.tensor(1.0), atol=1e-4)
    assert set((rows - 8).tolist()) == {-2, -1, 0, 1, 2}
    assert set((columns - 8).tolist()) == {-2, -1, 0, 1, 2}


def test_flip_mirrors_about_half_of_the_images():
    columns = changed(dot(3, 5), flip=0.5).flatten(1).argmax(dim=1) % 16
    assert set(columns.tolist()) == {3, 12}
    assert 16 < (columns == 12).sum() < 48


def test_rotation_stays_within_the_limit():
    moved = changed(dot(14, 8, side=17), rotate=30)
    weight = moved / moved.sum(dim=(2, 3), keepdim=True)
    axis = torch.arange(17.0) - 8
    x, y = (weight.sum(dim=2)[:, 0] * axis).sum(dim=1), (weight.sum(dim=3)[:, 0] * axis).sum(dim=1)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().max() < 33
    assert angles.min() < -15 < 15 < angles.max()
    assert torch.allclose(torch.hypot(x, y), torch.tensor(6.0), atol=0.5)


@pytest.mark.parametrize("how", [{"scale": 0.2}, {"shear": 10}, {"erase": 1.0}])
def test_images_differ_but_keep_shape_and_range(how):
    images = torch.rand(8, 3, 16, 16)
    result = changed(images, **how)
    assert result.shape == images.shape
    assert 0 <= result.min() <= result.max() <= 1
    assert (result != images).flatten(1).any(dim=1).all()


def test_border_is_black_or_reflected():
    images = torch.ones(32, 1, 8, 8)
    assert changed(images, shift=0.25).min() == 0
    assert math.isclose(changed(images, shift=0.25, border="reflection").min().item(), 1, abs_tol=1e-5)


def test_the_generator_decides():
    images = torch.rand(4, 1, 8, 8)
    how = {"rotate": 10, "shift": 0.1, "scale": 0.1, "shear": 5, "flip": 0.5, "erase": 0.5}
    assert torch.equal(changed(images, 1, **how), changed(images, 1, **how))
    assert not torch.equal(changed(images, 1, **how), changed(images, 2, **how))
