"""Data sets by name or path, their pre-processing, and batches of them."""

from linvision.data.arrays import ArrayData
from linvision.data.augment import Augment, Changes, augment
from linvision.data.batches import Batches, class_weights, worker_failures
from linvision.data.catalog import DATASETS, open_data, open_test_data
from linvision.data.folders import FolderData, ImageFiles
from linvision.data.images import MAX_PIXELS, find_images, open_image, upright_rgb
from linvision.data.preprocess import Preprocess
from linvision.errors import UnreadableImageError

__all__ = [
    "DATASETS",
    "MAX_PIXELS",
    "ArrayData",
    "Augment",
    "Batches",
    "Changes",
    "FolderData",
    "ImageFiles",
    "Preprocess",
    "UnreadableImageError",
    "augment",
    "class_weights",
    "find_images",
    "open_data",
    "open_image",
    "open_test_data",
    "upright_rgb",
    "worker_failures",
]
