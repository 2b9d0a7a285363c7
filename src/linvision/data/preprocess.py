"""The pre-processing that a model wants, from an image to its input."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
# Pixels of an image after it is resized and before it is cropped, beyond which its ends are cut off first.
_RESIZED_PIXELS = 1 << 24


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
        crop_mode: how the image is resized, as timm has it: "center" to the shorter side, "squash" to both sides, so
            that its shape changes, "border" to the longer side, with borders of the mean colour.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_ratio: float = 1.0
    grey: bool = False
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        three = len(self.mean) == len(self.std) == 3 and min(self.std) > 0
        if min(self.size) < 1 or not three or self.crop_ratio <= 0:
            raise ValueError(
                f"size {self.size} must be above 0, mean {self.mean} and std {self.std} of three channels, the latter "
                f"above 0, and crop_ratio {self.crop_ratio} above 0"
            )
        for value, known in ((self.interpolation, INTERPOLATIONS), (self.crop_mode, CROP_MODES)):
            if value not in known:
                raise ValueError(f"{value!r} is unknown: {', '.join(known)} are known")

    @classmethod
    def of_model(cls, model: nn.Module, size: int | None = None, *, crop_ratio: float | None = None) -> "Preprocess":
        """Return what ``model``'s published configuration asks for, at another size or crop ratio if those are given.

        timm resolves the configuration's own input size and ignores an ``img_size`` that the model was built with,
        hence the argument.
        """
        config = resolve_model_data_config(model)
        return cls(
            size=tuple(config["input_size"][1:]) if size is None else (size, size),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_ratio=config["crop_pct"] if crop_ratio is None else crop_ratio,
            crop_mode=config["crop_mode"],
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into a tensor (3, H, W)."""
        if self.grey:
            image = image.convert("L").convert("RGB")
        return self._transform(self._without_ends(image))

    def _without_ends(self, image: Image.Image) -> Image.Image:
        """Cut the ends off a very long image, as the centre crop would after they have been enlarged.

        A rule of 20000x1 pixels would be 4,480,000x224 in between.
        """
        shorter, longer = min(self.size), max(self.size)
        most = max(_RESIZED_PIXELS * (self.crop_ratio / shorter) ** 2, 2 * longer / shorter)  # long over short side
        if self.crop_mode == "border":
            most = shorter
        short, long = sorted(image.size)
        length = int(short * most)
        if self.crop_mode == "squash" or long <= length:
            return image
        length -= (long - length) % 2  # so that the centre stays
        start = (long - length) // 2
        wide = image.width > image.height
        return image.crop((start, 0, start + length, short) if wide else (0, start, short, start + length))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Tensor]:
        transform = create_transform(
            (3, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_ratio,
            crop_mode=self.crop_mode,
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
