"""Small image files and folders for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(
    path: Path, *, color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (20, 16), seed: int = 0
) -> Path:
    """Write an image of one colour with a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def write_folder(root: Path, *, classes: tuple[str, ...] = ("green", "red"), train: int = 6, val: int = 3) -> Path:
    """Write train/ and val/ with a folder of images for each class, told apart by their colour."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            color = (200 * (label % 2), 200 * (1 - label % 2), 60 * label % 256)
            for index in range(count):
                write_image(root / split / name / f"{index}.png", color=color, seed=100 * label + index)
    return root


def truncate(path: Path, share: float = 0.5) -> Path:
    """Cut off the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
