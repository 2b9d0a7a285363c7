"""Resized copies of training images, kept as files: large photographs are decoded once and not in each epoch."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from linvision.data.images import open_image
from linvision.errors import UnreadableImageError
from linvision.files import replacing


@dataclass(frozen=True)
class ResizedImages:
    """Opens images with a shorter side of at most ``side`` pixels, from ``folder`` where they have been opened before.

    A copy is a JPEG of quality 95 without chroma subsampling. Its name follows from the image's path, size and time of
    change and from ``side``, so that a changed image is resized anew. Images that are small enough are not copied.
    """

    folder: Path
    side: int

    def open(self, path: Path, *, max_pixels: int) -> Image.Image:
        """Return an image, resized.

        Raises:
            UnreadableImageError: neither the image nor its copy can be read.
        """
        copy = self._copy_of(path)
        if copy is not None and copy.is_file():
            with contextlib.suppress(UnreadableImageError):
                return open_image(copy, max_pixels=max_pixels)
        image = open_image(path, max_pixels=max_pixels)
        shorter = min(image.size)
        if shorter <= self.side:
            return image
        width, height = (max(1, round(length * self.side / shorter)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if copy is not None:
            with contextlib.suppress(OSError):  # a full disk costs time, and no result
                copy.parent.mkdir(parents=True, exist_ok=True)
                with replacing(copy) as temporary:
                    image.save(temporary, "JPEG", quality=95, subsampling=0)
        return image

    def _copy_of(self, path: Path) -> Path | None:
        try:
            status = path.stat()
        except (OSError, ValueError):
            return None
        state = f"\0{status.st_size}\0{status.st_mtime_ns}\0{self.side}".encode()
        name = hashlib.sha256(os.fsencode(path.resolve()) + state).hexdigest()
        return self.folder / name[:2] / f"{name}.jpg"
