"""What every contender has in common: how it is run, and what a run takes by count."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from linvision.devices import Checkpointing
from linvision.errors import UsageError

Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """The circumstances of one comparison.

    Attributes:
        size: side of the images in pixels, or number of tokens.
        batch_size: images or sequences in a call.
        dtype: name of the floating-point type of weights and inputs, or of autocast.
        mode: "inference" or "training".
        device: "cpu", "cuda", or "meta" for counting.
        autocast: whether weights stay float32 under autocast.
        compile: whether models are compiled.
        backend: of the ops, "auto" for the fastest that can run.
        checkpointing: of activations in training: "none", "selective" or "full".
        seed: of weights and inputs.
    """

    size: int
    batch_size: int
    dtype: str = "float32"
    mode: str = "inference"
    device: str = "cpu"
    autocast: bool = False
    compile: bool = False
    backend: str = "auto"
    checkpointing: Checkpointing = "none"
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating-point type itself."""
        return getattr(torch, self.dtype)


class Contender(Protocol):
    """Something to measure, described so briefly that another process can build it.

    Attributes:
        label: its name in tables.
        token_by_token: whether it runs one token after the other, in so many small operators that counting them takes
            longer than running them.
    """

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def token_by_token(self) -> bool: ...  # noqa: D102

    def prepare(self, setting: Setting) -> Step:
        """Build model and input, and return the function that runs them once."""
        ...

    def countable(self) -> "Contender":
        """Return the contender whose operations are counted as this one's."""
        ...


@dataclass(frozen=True)
class Lineup:
    """What is compared with what.

    Attributes:
        contenders: in the order of the tables.
        references: for the label of each contender, those of its peers by their kind ("fused", "parallel", ...).
    """

    contenders: tuple[Contender, ...]
    references: dict[str, dict[str, str]]


def count_flops(contender: Contender, setting: Setting) -> int:
    """Count the floating-point operations of one call without running it, a multiply-add as two, scans included.

    A training step counts as three forward passes, by convention.

    Raises:
        UsageError: the contender does not take inputs of this size.
    """
    forward = _forward_flops(contender.countable(), setting.size)
    return forward * setting.batch_size * (3 if setting.mode == "training" else 1)


@cache
def _forward_flops(contender: Contender, size: int) -> int:
    try:
        step = contender.prepare(Setting(size=size, batch_size=1, device="meta"))
        with FlopCounterMode(display=False) as counter:
            step()
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{contender.label} does not take size {size}: {error}") from error
    return counter.get_total_flops()


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write, as if every one went to memory for all of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and count its inputs and outputs, unless it only makes a view or room."""
        result = func(*args, **(kwargs or {}))
        read = tensors_of((args, kwargs))
        written = tensors_of(result)
        storages = {storage_of(tensor) for tensor in read}
        is_view = not func._schema.is_mutable and all(storage_of(tensor) in storages for tensor in written)
        if not is_view and "empty" not in func.name():
            self.bytes += sum(map(_occupied, read)) + sum(map(_occupied, written))
        return result


def tensors_of(tree: object) -> list[torch.Tensor]:
    """Return the tensors of a tree, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}.values())


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tells a tensor's storage from others."""
    return tensor.untyped_storage()._cdata


def _occupied(tensor: torch.Tensor) -> int:
    """Return the bytes behind a tensor; rows that are repeated by a stride of 0 count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
