"""Which body of an op runs: Triton kernels on a GPU, C++ kernels on a CPU, or plain PyTorch anywhere.

All bodies of an op compute one function, so that the choice is one of speed alone. ``auto`` takes the fastest that can
run; where it has to pass one over that is made for the device, it says so once. ``use_backend`` forces one.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from linvision.errors import BackendError

BACKENDS = ("auto", "triton", "cpp", "plain")

_logger = logging.getLogger("linvision")
_chosen = "auto"  # a module global, not a ContextVar: torch.compile cannot trace those


class Body(Protocol):
    """An op's computation in one backend: a module with these names beside its own functions."""

    @property
    def DEVICE(self) -> str | None:  # noqa: N802 - a constant of the module
        """The type of device that it is made for; None for any."""
        ...

    def refuses(self, *tensors: Tensor | None) -> str | None:
        """Say why these inputs cannot be computed, or return None if they can."""
        ...


class Plain:
    """The body in plain PyTorch, which computes anything: the expression that defines the op."""

    DEVICE = None

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def refuses(self, *tensors: Tensor | None) -> str | None:
        """Refuse nothing."""
        return None


class Dispatcher:
    """Chooses between the bodies of one op, listed by backend, the fastest first.

    ``inference_only`` says that its kernels compute no gradients and stand for what compilers fuse by themselves.
    """

    def __init__(self, op: str, bodies: dict[str, Body], *, inference_only: bool = False) -> None:
        self.op = op
        self.bodies = bodies
        self.inference_only = inference_only
        self.told: set[str] = set()

    def choose(self, *tensors: Tensor | None) -> Any:
        """Return the body that is to compute these inputs: its own functions are for the op and its bodies to agree on.

        Raises:
            BackendError: a backend was forced that cannot.
        """
        if _chosen != "auto":
            return self._forced(_chosen, *tensors)
        device = next(x.device.type for x in tensors if x is not None)
        for name, body in self.bodies.items():
            if body.DEVICE not in (None, device):
                continue
            reason = body.refuses(*tensors)
            if reason is None:
                return body
            self._tell(f"{self.op}: {name} kernels cannot run ({reason}); a slower backend computes the same")
        raise BackendError(f"{self.op}: no backend can compute this on {device}")

    def runs_plain(self, *tensors: Tensor | None) -> bool:
        """Say whether these inputs are to be computed in plain PyTorch, in a way that torch.compile can trace.

        Then an op may put its expression where it is called, for compilers to fuse with what stands around it. A
        forced backend in which the op has no body leaves the op in plain PyTorch.
        """
        if self.inference_only and not _infers(*tensors):
            return True
        return _chosen not in ("auto", *self.bodies) or self.choose(*tensors) is self.bodies["plain"]

    def kernels(self, *tensors: Tensor | None) -> Any:
        """Return a body of kernels for what plain PyTorch leaves to autograd, whatever backend is forced meanwhile.

        First comes the forced one, then those made for the device.

        Raises:
            BackendError: none can run.
        """
        device = next(x.device.type for x in tensors if x is not None)
        names = [name for name in self.bodies if name != "plain"]
        names.sort(key=lambda name: (name != _chosen, self.bodies[name].DEVICE not in (None, device)))
        reasons = {}
        for name in names:
            reasons[name] = self.bodies[name].refuses(*tensors)
            if reasons[name] is None:
                return self.bodies[name]
        raise BackendError(f"{self.op}: the kernels of the forward pass cannot run any more: {reasons}")

    def _forced(self, name: str, *tensors: Tensor | None) -> Any:
        if name not in self.bodies:
            raise BackendError(f"{self.op} has no backend {name!r}, only {', '.join(self.bodies)}; use 'auto'")
        reason = self.bodies[name].refuses(*tensors)
        if reason is not None:
            raise BackendError(f"{self.op}: backend {name!r} cannot run: {reason}; use 'auto' for one that can")
        return self.bodies[name]

    def _tell(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self.told:
            self.told.add(message)
            _logger.warning(message)


def _infers(*tensors: Tensor | None) -> bool:
    """Say whether nobody follows what is computed: no gradient of either mode, no compiler, no autocast."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or autocasts(*tensors)
        or any(x is not None and unpack_dual(x).tangent is not None for x in tensors)
    )


def autocasts(*tensors: Tensor | None) -> bool:
    """Say whether autocast chooses types where these tensors are."""
    devices = {x.device.type for x in tensors if x is not None}
    return any(_knows_autocast(device) and torch.is_autocast_enabled(device) for device in devices)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let ops run in one backend, in this process, for as long as the context lasts.

    Args:
        name: "auto" (the fastest that can run), "triton", "cpp" or "plain".

    Raises:
        ValueError: for another name. An op that the backend cannot compute raises BackendError when it is called.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} does not exist: use {', '.join(BACKENDS)}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def current_backend() -> str:
    """Stand-in until the merge."""
    return _chosen
