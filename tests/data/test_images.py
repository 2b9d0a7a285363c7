"""Finding and opening image files."""

import os
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image

from linvision.data import find_images, images, open_image
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


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", "PostScript: convert it"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"a HEIF image \(HEIC\): convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypmif1", "a HEIF image"),
        (b"\0\0\0\x1cftypavif", "an AVIF image"),
        (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 image"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<!doctype html><title>404</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"", "it is empty"),
    ],
)
def test_other_formats_are_named_and_not_decoded(tmp_path, start, what):
    (tmp_path / "cat.jpg").write_bytes(start)
    with pytest.raises(UnreadableImageError, match=rf"cannot read .*cat.jpg: not an image.*{what}"):
        open_image(tmp_path / "cat.jpg")


def test_formats_that_pillow_alone_would_open(tmp_path):
    for name in ("a.pcx", "a.tga", "a.eps", "a.jp2", "a.ico"):
        write_image(tmp_path / name, size=(16, 16)).rename(tmp_path / "a.jpg")
        with pytest.raises(UnreadableImageError, match="not an image"):
            open_image(tmp_path / "a.jpg")


def test_a_known_format_under_the_suffix_of_another(tmp_path):
    write_image(tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert open_image(tmp_path / "a.jpg").size == (20, 16)


def test_pixels_are_limited_without_a_warning(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", size=(200, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match=r"a\.png: 200x100 pixels are more than the limit of 19,000: .*"):
            open_image(path, max_pixels=19_000)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
        assert open_image(path).size == (200, 100)  # Pillow would warn
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
        with pytest.raises(UnreadableImageError, match=r"more than the limit of 9,000: .*--max-pixels"):
            open_image(path, max_pixels=9_000)
        assert open_image(path, max_pixels=20_000).size == (200, 100)  # Pillow would refuse


def test_strips_are_the_whole(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 20, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    Image.fromarray((rng.random((30, 20)) * 300).astype(np.float32)).save(tmp_path / "b.tif")
    whole = [np.asarray(open_image(tmp_path / name)) for name in ("a.png", "b.tif")]
    monkeypatch.setattr(images, "_STRIP_PIXELS", 140)
    for name, values in zip(("a.png", "b.tif"), whole, strict=True):
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), values)


def test_conversions_hold_a_strip_and_not_the_image(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_STRIP_PIXELS", 10_000)
    for image in (Image.new("I;16", (1000, 1000)), Image.new("F", (1000, 1000))):
        image.save(tmp_path / "grey.tif")
        tracemalloc.start()
        open_image(tmp_path / "grey.tif")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # NumPy's: 8 bytes a pixel would be 8 million
        tracemalloc.stop()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_leave_the_others_alone(tmp_path, value):
    pixels = np.linspace(0, 255, 600, dtype=np.float32).reshape(20, 30)
    expected = pixels.round()
    expected[0, 0] = 255 if value == np.inf else 0
    pixels[0, 0] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif"))[..., 0], expected)


def test_images_without_any_number_are_black(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif")).max() == 0


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_damaged_exif_leaves_the_pixels_readable(tmp_path, suffix):
    image, exif = Image.new("RGB", (6, 4), "white"), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    sound = exif.tobytes()
    for cut in (7, 9, 15, 20, 30, len(sound) - 1):
        image.save(tmp_path / f"a.{suffix}", exif=sound[:cut] + b"\xff" * 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert open_image(tmp_path / f"a.{suffix}").size in {(6, 4), (4, 6)}


def test_all_orientations(tmp_path):
    values = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    upright = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1],
        5: values.T, 6: values[::-1].T, 7: values[::-1, ::-1].T, 8: values.T[::-1],
    }  # fmt: skip
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 0], expected), orientation


def test_pipes_devices_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert list(find_images(tmp_path)) == []
    for path in (tmp_path / "fifo.jpg", tmp_path / "folder.jpg", "/dev/zero"):
        with pytest.raises(UnreadableImageError, match="not a regular file"):
            open_image(path)


def test_links_to_folders_are_followed_once(tmp_path):
    write_image(tmp_path / "store/deep/a.png")
    write_image(tmp_path / "photos/real/b.png")
    (tmp_path / "photos/again").symlink_to(tmp_path / "photos/real")
    (tmp_path / "photos/cycle").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "store")
    (tmp_path / "photos/gone.png").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(tmp_path / "photos")) for path in find_images(tmp_path / "photos")]
    assert found == ["linked/deep/a.png", "real/b.png"]


def test_odd_names_are_opened_and_shown_as_escapes(tmp_path):
    for name in (os.fsdecode(b"caf\xe9.png"), "red\x1b[31m.png", "two\nlines.png"):
        write_image(tmp_path / "a.png").rename(tmp_path / name)
        assert open_image(tmp_path / name).size == (20, 16)
        truncate(tmp_path / name)
    reasons = []
    for path in find_images(tmp_path):
        with pytest.raises(UnreadableImageError) as error:
            open_image(path)
        reasons.append(str(error.value))
    assert all(reason.isprintable() for reason in reasons)
    assert [reason for reason in reasons if r"caf\xe9.png" in reason]
