"""Linear-time vision backbones: ViL, Vim and L2ViT, with DeiT-III as the quadratic yardstick.

``linvision.create_model(name)`` makes a model by its registered or published name; after ``import linvision`` every
model is also known to ``timm.create_model``.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linvision import ops
    from linvision.models import (
        DeiT3,
        L2ViT,
        VisionLSTM,
        VisionLSTM2,
        VisionMamba,
        create_model,
        describe,
        list_models,
        load_checkpoint,
        push_to_hub,
        save_pretrained,
    )
    from linvision.ops import use_backend
    from linvision.tasks.opened import load_run

__version__ = "0.1.0"
__all__ = [
    "DeiT3",
    "L2ViT",
    "VisionLSTM",
    "VisionLSTM2",
    "VisionMamba",
    "__version__",
    "create_model",
    "describe",
    "list_models",
    "load_checkpoint",
    "load_run",
    "ops",
    "push_to_hub",
    "save_pretrained",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'linvision' has no attribute {name!r}")
    if name == "ops":
        return import_module("linvision.ops")
    rooms = {"use_backend": "linvision.ops", "load_run": "linvision.tasks.opened"}
    return getattr(import_module(rooms.get(name, "linvision.models")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Say whether this process is the command line, which imports torch when work begins and not for --help."""
    if Path(sys.argv[0]).stem == "linvision":
        return True
    words = sys.orig_argv
    return any(words[i : i + 2] in (["-m", "linvision"], ["-m", "linvision.cli"]) for i in range(len(words)))


if not _is_command_line():
    import_module("linvision.models")  # registers the models with timm
