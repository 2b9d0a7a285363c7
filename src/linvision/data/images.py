"""Image files: finding and opening them.

An image is what a viewer would show: turned as its EXIF tag says, transparent parts on white, 16-bit greys scaled to
8 bits. Pillow alone keeps the sensor's orientation, shows what transparency hides and clips 16-bit values.

Files come from anywhere, so that little is believed: only the formats below are decoded, whatever Pillow could do more
(PostScript starts another program), only of regular files, and only up to a number of pixels.
"""

import logging
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from linvision.errors import UnreadableImageError, printable

# Pillow's format of each suffix. A file may have another one's suffix.
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".bmp": "BMP",
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
}
IMAGE_SUFFIXES = frozenset(FORMATS)
# Pixels of the largest image that is opened unless another limit is given: about 1 GB while it is decoded.
MAX_PIXELS = 128_000_000

# Every class of error that Pillow's decoders have been seen to raise for damaged files, by base class.
_DECODING_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)
_CONVERT = "convert it to JPEG or PNG"
# What files often are that have an image's name: where their mark stands, the mark, the word for it.
_OTHERS = (
    (4, b"ftypavif", f"an AVIF image: {_CONVERT}"),
    (4, b"ftypavis", f"an AVIF image: {_CONVERT}"),
    *((4, b"ftyp" + brand, f"a HEIF image (HEIC): {_CONVERT}") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "a video: save frames of it as JPEG or PNG"),
    (4, b"JXL ", f"a JPEG XL image: {_CONVERT}"),
    (0, b"\xff\x0a", f"a JPEG XL image: {_CONVERT}"),
    (4, b"jP  ", f"a JPEG 2000 image: {_CONVERT}"),
    (0, b"%!PS", f"PostScript: {_CONVERT}"),
    (0, b"\xc5\xd0\xd3\xc6", f"PostScript: {_CONVERT}"),
    (0, b"%PDF", f"a PDF document: {_CONVERT}"),
    (0, b"8BPS", f"a Photoshop file: {_CONVERT}"),
    (0, b"<svg", f"an SVG drawing: {_CONVERT}"),
    (0, b"<?xml", f"an SVG drawing or other XML: {_CONVERT}"),
    (0, b"<!DOCTYPE", "a web page: download the image itself"),
    (0, b"<html", "a web page: download the image itself"),
    (0, b"version https://git-lfs", "a pointer of Git LFS: fetch the file with git lfs pull"),
)
# EXIF's orientations, as what turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_PIXELS = 1 << 22

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors go to stderr otherwise, and name no file


def find_images(folder: Path) -> Iterator[Path]:
    """Yield the image files below ``folder``, known by their suffix, in order; hidden ones are passed over.

    Links are followed; a folder that several paths lead to is searched once.
    """
    found, seen, links = [], set(), [folder]
    while links:
        for place, folders, files in os.walk(links.pop(0)):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += [path for name in sorted(folders) if (path := Path(place, name)).is_symlink()]
            paths = (Path(place, name) for name in files if not name.startswith("."))
            found += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    yield from sorted(found)


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image at ``path`` as 8-bit RGB, upright and without transparency.

    Memory holds the image twice at most, at 4 bytes a pixel, beside the file's content.

    Raises:
        UnreadableImageError: the file is missing, truncated, no image of the ``FORMATS``, or has more pixels than
            ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # they name no file
            return _decode(Path(path), max_pixels)
    except UnidentifiedImageError as error:
        reason = _what_it_is(Path(path))
        raise UnreadableImageError(f"cannot read {printable(path)}: {reason}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"cannot read {printable(path)}: {_too_large(max_pixels)}") from error
    except _DECODING_FAILURES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(printable(reason or type(error).__name__, keep="\n").split())
        raise UnreadableImageError(f"cannot read {printable(path)}: {reason}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image in memory as 8-bit RGB, upright and without transparency, as ``open_image`` does."""
    turn, rgb = _UPRIGHT.get(_orientation(image)), _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _decode(path: Path, max_pixels: int) -> Image.Image:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO or a device may wait for ever
        raise OSError("not a regular file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS * 2:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow refuses twice its own limit
    with Image.open(path, formats=list(dict.fromkeys(FORMATS.values()))) as image:
        if image.width * image.height > max_pixels:
            raise OSError(_too_large(max_pixels, f"{image.width}x{image.height} pixels are"))
        image.load()
        return upright_rgb(image)


def _too_large(max_pixels: int, found: str = "its pixels are") -> str:
    limit = f"{found} more than the limit of {max_pixels:,}"
    return f"{limit}: make the image smaller, or raise max_pixels (--max-pixels)"


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "not an image: it is empty"
    for offset, mark, what in _OTHERS:
        if start[offset:].lower().startswith(mark.lower()):
            return f"not an image of a known format but {what}"
    return "not an image, or its header is damaged"


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, or 0 where there is none or the EXIF data are damaged."""
    try:
        value = image.getexif().get(0x0112)
    except _DECODING_FAILURES:
        return 0
    return value if isinstance(value, int) else 0


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert strip by strip, since conversions copy the pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    depth = _depth(image)
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        rgb.paste(_strip_to_rgb(image.crop(box), depth), box)
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _strip_to_rgb(image: Image.Image, depth: float) -> Image.Image:
    if depth:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=depth, neginf=0.0)
        image = Image.fromarray((values.clip(0, depth) * (255 / depth)).round().astype(np.uint8))
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _depth(image: Image.Image) -> float:
    """Return the value that is white in 16-bit, 32-bit and float greys; 0 for other modes.

    That of 32 bits and floats is told from the largest finite value, since files do not say it.
    """
    if image.mode.startswith("I;16"):
        return 65535.0
    if image.mode not in {"I", "F"}:
        return 0.0
    largest = 0.0
    for box in _strips(image):
        values = np.asarray(image.crop(box))
        largest = max(largest, float(values.max(initial=0, where=np.isfinite(values))))
    if image.mode == "F" and largest <= 1:
        return 1.0
    return next((depth for depth in (255.0, 65535.0) if largest <= depth), largest)
