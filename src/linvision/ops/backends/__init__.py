"""Implementations of the ops: one folder a backend, which lists what it implements.

A backend is a package with

- ``DEVICE``: the type of device that it is made for, None for any;
- ``IMPLEMENTATIONS``: by the name of the registered operator, a module with ``unsupported(...)``, which gives a reason
  or None, whatever the shapes, which are checked after it, ``forward`` and, unless the operator is for inference alone,
  ``backward``.
"""

from importlib import import_module
from typing import Any

# The fastest first; plain PyTorch, which computes anything, last.
NAMES = (
    "triton",
    "cpp",
    "plain",
)
BACKENDS: dict[str, Any] = {name: import_module(f"{__name__}.{name}") for name in NAMES}
