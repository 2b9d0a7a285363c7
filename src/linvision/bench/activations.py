"""What a training step keeps between its forward and its backward pass, by the operator that made it.

Counted are storages that operators allocate in the forward pass and that are alive at its end: what autograd has saved,
and what activation checkpointing keeps beside it. Weights, buffers and images are there before and do not count; what
an operator allocates and frees within itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from linvision.bench.contenders import storage_of, tensors_of
from linvision.models.backbone import Backbone


@dataclass(frozen=True)
class Kept:
    """A storage that outlives the forward pass.

    Attributes:
        block: name of the block it was made in; "" outside of blocks.
        op: operator that made it.
        shape: of the tensor that the operator returned.
        dtype: of that tensor.
        bytes: of the storage.
    """

    block: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


class AllocationTracker(TorchDispatchMode):
    """Follows the storages that operators return, from the first tensor in them to the last.

    Attributes:
        alive: the storages that are there now, by a number of their own.
        bytes: of those.
        peak: the most bytes so far.
        block: the name that storages are given from here on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Kept] = {}
        self.bytes = self.peak = 0
        self.block = ""
        self._made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and follow what it allocates."""
        result = func(*args, **(kwargs or {}))
        known = {storage_of(tensor) for tensor in tensors_of((args, kwargs))}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage_of(tensor) not in known and storage.nbytes():
                known.add(storage_of(tensor))
                self._follow(
                    storage, Kept(self.block, _name(func), tuple(tensor.shape), tensor.dtype, storage.nbytes())
                )
        return result

    def _follow(self, storage: torch.UntypedStorage, made: Kept) -> None:
        self._made += 1
        self.alive[self._made] = made
        self.bytes += made.bytes
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, self._made).atexit = False

    def _forget(self, number: int) -> None:
        self.bytes -= self.alive.pop(number).bytes


@dataclass(frozen=True)
class Activations:
    """The memory of a forward and a backward pass.

    Attributes:
        kept: storages alive between the two.
        peak: bytes of tensors at most alive at once, the gradients of the weights among them.
    """

    kept: tuple[Kept, ...]
    peak: int

    @property
    def total(self) -> int:
        """Bytes that are kept."""
        return sum(one.bytes for one in self.kept)

    def by_block(self) -> Counter[str]:
        """Return the bytes of each block; what is outside of blocks stands under ""."""
        totals: Counter[str] = Counter()
        for one in self.kept:
            totals[one.block] += one.bytes
        return totals

    def by_kind(self) -> list[tuple[Kept, int]]:
        """Return one storage of each operator, shape and type with their number, the most bytes first; no blocks."""
        kinds = Counter(Kept("", one.op, one.shape, one.dtype, one.bytes) for one in self.kept)
        return sorted(kinds.items(), key=lambda item: -item[0].bytes * item[1])


def count_activations(
    model: nn.Module, image: Tensor, *, autocast: torch.dtype | None = None, backward: bool = True
) -> Activations:
    """Count what one training step of a model keeps.

    Args:
        model: in training mode; its gradients are dropped.
        image: images (B, C, H, W) on the model's device.
        autocast: type that autocast chooses, or None for none.
        backward: go through the backward pass too, for the peak.
    """
    model.zero_grad()
    with AllocationTracker() as tracker, _named_blocks(model, tracker):
        with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
            logits = model(image)
        loss = logits.float().square().sum()
        del logits
        kept = tuple(tracker.alive.values())
        if backward:
            loss.backward()
    model.zero_grad()
    return Activations(kept, tracker.peak)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's blocks by name, those of a stage one by one."""
    parents = {name: getattr(model, name) for name in ("blocks", "layers", "stages") if hasattr(model, name)}
    blocks = {f"{name}.{key}": child for name, parent in parents.items() for key, child in parent.named_children()}
    stages = {name: child for name, child in blocks.items() if isinstance(child, nn.Sequential)}
    within = {f"{name}.{key}": child for name, stage in stages.items() for key, child in stage.named_children()}
    return within or blocks


@contextmanager
def _named_blocks(model: nn.Module, tracker: AllocationTracker) -> Iterator[None]:
    if isinstance(model, Backbone):
        with _named_runs(model, tracker):
            yield
        return
    handles = []
    for name, block in blocks_of(model).items():
        handles.append(block.register_forward_pre_hook(lambda *_, name=name: setattr(tracker, "block", name)))
        handles.append(block.register_forward_hook(lambda *_: setattr(tracker, "block", "")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _named_runs(model: Backbone, tracker: AllocationTracker) -> Iterator[None]:
    """Name storages by block without a hook, for which a layer's definition would run instead of its form."""
    names = {layer: name for name, block in blocks_of(model).items() for layer in block.modules()}
    run = model._run

    def named(layer: nn.Module, *args: object) -> object:
        tracker.block = names.get(layer, "")
        try:
            return run(layer, *args)
        finally:
            tracker.block = ""

    model._run = named
    try:
        yield
    finally:
        del model._run


def _name(func: object) -> str:
    namespace, name = str(func).split(".")[:2]
    return f"{namespace}::{name}"
