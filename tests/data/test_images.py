"""Opening image files and preparing them for a model."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from linvision.data import Preprocess, find_images, open_image
from linvision.errors import UnreadableImageError
from tests.data.samples import truncate, write_image


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return image.getpixel((x, y))


def test_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "b.png")
    assert pixel(open_image(tmp_path / "a.png")) == (255, 255, 255)
    assert pixel(open_image(tmp_path / "b.png")) == pytest.approx((127, 127, 127), abs=1)


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    opened = open_image(tmp_path / "a.png")
    assert pixel(opened) == (255, 255, 255)
    assert pixel(opened, 1) == (200, 100, 50)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_levels(tmp_path, suffix):
    values = np.array([[0, 32768], [65535, 256]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    opened = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    assert opened[..., 0].tolist() == [[0, 128], [255, 1]]
    assert opened.shape == (2, 2, 3)


def test_float_grey_in_unit_range(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5], [1.0, 0.25]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(open_image(tmp_path / "a.tiff"))[..., 0].tolist() == [[0, 128], [255, 64]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode in {"CMYK", "YCbCr"} else "png"
    Image.new("RGB", (6, 5), "white").convert(mode).save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert (opened.mode, opened.size) == ("RGB", (6, 5))
    assert min(pixel(opened)) > 250


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4), "black")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (4, 6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "gif"])
def test_truncated_file(tmp_path, suffix):
    path = truncate(write_image(tmp_path / f"a.{suffix}", size=(64, 64)))
    with pytest.raises(UnreadableImageError, match=f"a.{suffix}"):
        open_image(path)


def test_text_missing_and_empty_files(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("text.png", "not an image"), ("empty.png", "not an image"), ("gone.png", "No such file")):
        with pytest.raises(UnreadableImageError, match=reason) as error:
            open_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_find_images_is_sorted_recursive_and_skips_hidden_files(tmp_path):
    for name in ("b/x.JPG", "a.png", ".hidden/c.png", "b/.y.png", "notes.txt"):
        write_image(tmp_path / "tmp.png")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tmp.png").rename(tmp_path / name)
    assert [path.name for path in find_images(tmp_path)] == ["a.png", "x.JPG"]


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
