"""Image files: finding them, opening them, and the pre-processing that a model wants.

An image is what a viewer would show: turned as its EXIF tag says, transparent parts on white, 16-bit greys scaled to
8 bits. Pillow alone keeps the sensor's orientation, shows what transparency hides and clips 16-bit values.
"""

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn

from linvision.errors import UnreadableImageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_DECODING_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def find_images(folder: Path) -> Iterator[Path]:
    """Yield the image files below ``folder``, known by their suffix, in order; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file():
            yield path


def open_image(path: str | Path) -> Image.Image:
    """Return the image at ``path`` as 8-bit RGB, upright and without transparency.

    Raises:
        UnreadableImageError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODING_FAILURES as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if "cannot identify image file" in reason:
            reason = "not an image, or its header is damaged"
        raise UnreadableImageError(f"cannot read {path}: {reason or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16- and 32-bit greys to 8 bits, by the depth that their largest value shows."""
    values = np.asarray(image).astype(np.float64)
    largest = values.max(initial=0)
    depth = 65535 if image.mode.startswith("I;16") else next((d for d in (255, 65535) if largest <= d), largest)
    if image.mode == "F" and largest <= 1:
        depth = 1
    return Image.fromarray((values.clip(0, depth) * (255 / depth)).round().astype(np.uint8))


@dataclass(frozen=True)
class Preprocess:
    """From an image to a model's input: resize, centre crop, scale to [0, 1], normalise.

    Attributes:
        size: height and width of the input, in pixels.
        mean: of each of the three channels, in units of [0, 1].
        std: of each of the three channels, in units of [0, 1].
        interpolation: "bicubic", "bilinear" or "nearest".
        crop_ratio: side of the centre crop over the side that the image is first resized to.
        grey: whether the model was trained on grey images, so that colours are dropped first.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_ratio: float = 1.0
    grey: bool = False

    @classmethod
    def of_model(cls, model: nn.Module, size: int | None = None) -> "Preprocess":
        """Return what ``model``'s published configuration asks for, at ``size`` pixels a side if that is given.

        timm resolves the configuration's own input size and ignores an ``img_size`` that the model was built with,
        hence the argument.
        """
        config = resolve_model_data_config(model)
        return cls(
            size=tuple(config["input_size"][1:]) if size is None else (size, size),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_ratio=config["crop_pct"],
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into a tensor (3, H, W)."""
        if self.grey:
            image = image.convert("L").convert("RGB")
        return self._transform(image)

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        transform = create_transform(
            (3, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_ratio,
        )
        return cast(Callable[[Image.Image], Tensor], transform)

    def resize(self, images: Tensor) -> Tensor:
        """Turn 8-bit images (B, C, H, W) into floats in [0, 1] of this size; the whole image is kept."""
        if tuple(images.shape[-2:]) != self.size:
            images = tv.resize(images, list(self.size), str_to_interp_mode(self.interpolation), antialias=True)
        return images.float() / 255

    def normalise(self, images: Tensor) -> Tensor:
        """Turn images (B, 1 or 3, H, W) in [0, 1] into inputs (B, 3, H, W) of zero mean and unit deviation."""
        mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def denormalise(self, inputs: Tensor) -> Tensor:
        """Undo ``normalise``, for looking at inputs."""
        mean, std = (torch.tensor(values, dtype=inputs.dtype).view(3, 1, 1) for values in (self.mean, self.std))
        return (inputs * std + mean).clamp(0, 1)
