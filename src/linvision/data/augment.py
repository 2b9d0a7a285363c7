"""Random changes to whole batches of small images, as a few tensor operations instead of one Python call an image."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


class Changes(Protocol):
    """Random changes of training images, as a run's settings name them; data of each kind takes those that suit it."""

    @property
    def flip(self) -> float: ...  # noqa: D102
    @property
    def erase(self) -> float: ...  # noqa: D102
    @property
    def crop_scale(self) -> float: ...  # noqa: D102
    @property
    def auto_augment(self) -> str: ...  # noqa: D102
    @property
    def color_jitter(self) -> float: ...  # noqa: D102
    @property
    def balance(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Augment:
    """How far the images of a batch are changed, each by its own uniform draw.

    Attributes:
        rotate: largest rotation either way, in degrees.
        shift: largest shift along each axis, as a fraction of the side; in whole pixels.
        scale: largest relative change of size, 0.1 for sizes from 0.9 to 1.1; drawn for each axis of its own.
        shear: largest horizontal shear, in degrees.
        flip: probability of mirroring left to right.
        erase: probability that a rectangle of the image is overwritten with noise.
        border: what comes into view at the edges: "zeros" (black) or "reflection".
    """

    rotate: float = 0.0
    shift: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    flip: float = 0.0
    erase: float = 0.0
    border: Literal["zeros", "reflection"] = "zeros"


def augment(images: Tensor, how: Augment, *, generator: torch.Generator) -> Tensor:
    """Return changed copies of ``images`` (B, C, H, W), floats in [0, 1]; ``generator`` decides every draw."""
    if how.rotate or how.shift or how.scale or how.shear or how.flip:
        theta = _affine_maps(images, how, generator)
        grid = affine_grid(theta, list(images.shape), align_corners=False)
        images = grid_sample(images, grid, mode="bilinear", padding_mode=how.border, align_corners=False)
    if how.erase:
        images = _erase(images, how.erase, generator)
    return images


def _affine_maps(images: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """Draw the maps (B, 2, 3) from output to input coordinates, in units of half a side."""
    batch, _, height, width = images.shape

    def draw(limit: float, *shape: int) -> Tensor:
        return (torch.rand(batch, *shape, generator=generator) * 2 - 1) * limit

    angle, shear = draw(math.radians(how.rotate)), draw(math.tan(math.radians(how.shear)))
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    stretch = torch.diag_embed(1 / (1 + draw(how.scale, 2)))
    stretch[:, 0, 1] = shear
    if how.flip:
        stretch[:, :, 0] *= (torch.rand(batch, 1, generator=generator) < how.flip) * -2.0 + 1.0
    sides = torch.tensor([width, height], dtype=images.dtype)
    pixels = (draw(how.shift, 2) * sides).round()
    return torch.cat([rotation @ stretch, (pixels * 2 / sides)[..., None]], dim=-1)


def _erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Overwrite a rectangle, a quarter to a half of each side, with noise in the chosen images."""
    batch, _, height, width = images.shape

    def inside(length: int) -> Tensor:
        size = (torch.rand(batch, 1, generator=generator) * 0.25 + 0.25) * length
        start = torch.rand(batch, 1, generator=generator) * (length - size)
        position = torch.arange(length) + 0.5
        return (position >= start) & (position < start + size)

    chosen = torch.rand(batch, 1, 1, generator=generator) < probability
    mask = (inside(height)[:, :, None] & inside(width)[:, None, :] & chosen)[:, None]
    noise = torch.rand(images.shape, generator=generator)
    return torch.where(mask, noise, images)
