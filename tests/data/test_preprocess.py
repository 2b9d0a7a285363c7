"""Preparing images for a model."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from linvision.data import Preprocess


def test_preprocess_crops_and_normalises():
    how = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop_ratio=0.5)
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (8, 8, 24, 24))
    centre = how(image)
    assert centre.shape == (3, 8, 8)
    assert torch.allclose(centre[:, 1:-1, 1:-1], torch.tensor(2.0), atol=0.1)
    whole = Preprocess((8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(image)
    assert whole[0, 0, 0].item() == pytest.approx(-2.0, abs=0.1)


def test_preprocess_follows_the_model_and_the_size_that_is_asked_for():
    model = timm.create_model("test_vit")
    assert Preprocess.of_model(model).size == (160, 160)
    how = Preprocess.of_model(model, 64)
    assert how.size == (64, 64)
    assert how.crop_ratio == 0.95
    assert how(Image.new("RGB", (100, 80))).shape == (3, 64, 64)


def test_grey_models_see_no_colour():
    how = Preprocess((4, 4), (0.5,) * 3, (0.5,) * 3, grey=True)
    red = how(Image.new("RGB", (4, 4), "red"))
    assert torch.equal(red[0], red[1])
    assert torch.equal(red[0], red[2])


def test_arrays_and_files_are_prepared_alike(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    how = Preprocess((32, 32), (0.3,) * 3, (0.4,) * 3, grey=True)
    from_array = how.normalise(how.resize(torch.from_numpy(values)[None, None]))[0]
    from_file = how(Image.fromarray(values).convert("RGB"))
    assert torch.allclose(from_array, from_file, atol=2 / 255 / 0.4)
    assert torch.allclose(how.denormalise(from_array), how.resize(torch.from_numpy(values)[None, None]), atol=1e-6)


def ramp(width: int, height: int) -> Image.Image:
    rows = np.linspace(0, 255, height)[:, None, None] / 2
    return Image.fromarray((rows + np.linspace(0, 255, width)[None, :, None] / 2).repeat(3, 2).astype(np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_all_of_timms_configuration_is_followed(crop_mode, size):
    model = timm.create_model("test_vit")
    model.pretrained_cfg.update(crop_mode=crop_mode, crop_pct=0.9, input_size=(3, *size), interpolation="bilinear")
    how, theirs = Preprocess.of_model(model), create_transform(**resolve_model_data_config(model))
    for sides in ((300, 80), (50, 90), (400, 20), (20, 20)):
        assert torch.equal(how(ramp(*sides)), theirs(ramp(*sides)))


def test_crop_ratio_by_argument():
    model = timm.create_model("test_vit")
    assert Preprocess.of_model(model, 32, crop_ratio=0.5) == replace(Preprocess.of_model(model, 32), crop_ratio=0.5)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("sides", [(20000, 1), (1, 20000), (20001, 2)])
def test_thin_images_stay_small(crop_mode, sides, monkeypatch):
    how, largest, resize = Preprocess((224, 224), (0.5,) * 3, (0.25,) * 3, crop_mode=crop_mode), [], Image.Image.resize

    def record(image, size, *arguments, **options):
        largest.append(size[0] * size[1])
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", record)
    assert how(Image.new("RGB", sides, "red"))[0].max() == 2
    assert max(largest, default=0) <= 1 << 25


def test_what_is_cut_off_thin_images_would_be_cropped(monkeypatch):
    thin, how = ramp(3001, 2), Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3)
    whole = how(thin)
    monkeypatch.setattr("linvision.data.preprocess._RESIZED_PIXELS", 32 * 32 * 10)
    assert how._without_ends(thin).size == (19, 2)
    assert torch.allclose(how(thin), whole, atol=0.02)
