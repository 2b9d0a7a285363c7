"""Patches of an image as tokens of a grid: what plain backbones share."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

torch.fx.wrap("patch_grid")  # torch.fx cannot look into it


class PatchEmbed(nn.Module):
    """Convolution of patches into tokens."""

    def __init__(self, in_chans: int, dim: int, patch_size: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Count the rows and columns of patches of images (B, in_chans, H, W)."""
        return patch_grid((image.shape[2], image.shape[3]), self.patch_size, self.stride)

    def forward(self, image: Tensor) -> Tensor:
        """Embed images (B, in_chans, H, W) as a grid of tokens (B, rows, columns, dim), channels last in meaning."""
        return self.proj(image).permute(0, 2, 3, 1)


def check_image(image: Tensor, in_chans: int, model: str) -> Tensor:
    """Return what is a batch of images (B, in_chans, H, W).

    Raises:
        ValueError: it is none.
    """
    if image.ndim != 4 or image.shape[1] != in_chans:
        raise ValueError(
            f"{model} takes images of shape (B, {in_chans}, H, W) but got {tuple(image.shape)}; "
            f"build the model with in_chans={image.shape[1] if image.ndim == 4 else 'N'} for other channel counts"
        )
    return image


def pair(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width), given both or the side of a square."""
    return (sides, sides) if isinstance(sides, int) else (int(sides[0]), int(sides[1]))


def patch_grid(image_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Count the rows and columns of patches, (H - patch) // stride + 1 and likewise for W.

    Raises:
        ValueError: where the patch does not divide a side of the image.
    """
    for side, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if size % patch or size < patch:
            near = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"image {side} {size} is not a multiple of the patch size {patch}: resize or pad it, to {near} say"
            )
    rows, columns = (
        (size - patch) // step + 1 for size, patch, step in zip(image_size, patch_size, stride, strict=True)
    )
    return rows, columns


def resize_grid(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a position table (1, rows, columns, D) to another grid: bicubic, align_corners=False, no antialias."""
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    return interpolate(table.permute(0, 3, 1, 2), grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
