"""Which implementation of an op runs: Triton kernels on a GPU, C++ kernels on a CPU, or plain PyTorch anywhere.

All compute one function, so that the choice is one of speed alone. ``auto`` takes the fastest that can run; where it
has to pass one over that is made for the device, it logs so once. ``use_backend`` forces one, or one of the op's forms
in traceable PyTorch, which then stands where the op is called: nothing of it is hidden from compilers and exporters.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.fx.experimental.symbolic_shapes import has_static_value

from linvision.errors import BackendError
from linvision.ops import backends
from linvision.ops.autocast import autocasts

FORMS = ("reference", "parallel", "sequential")
OPS: dict[str, "Dispatcher"] = {}  # by the name of the registered operator

_logger = logging.getLogger("linvision")
_chosen = "auto"  # a module global, not a ContextVar: torch.compile cannot trace those


class Expression:
    """A reference form as an implementation: what plain PyTorch runs unless it has something faster."""

    def __init__(self, form: Callable[..., Any]) -> None:
        self.form = form

    def unsupported(self, *tensors: Tensor) -> str | None:
        """Support everything."""
        return None

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Compute dense results that share no memory, as operators promise them."""
        results = self.form(*arguments, **options)
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in results)


class Dispatcher:
    """Chooses between the implementations of one op, and its forms.

    Args:
        op: name of the registered operator, under which backends list their implementations.
        forms: by their names in ``use_backend``; each op has a reference form. All take the same arguments.
    """

    def __init__(self, op: str, **forms: Callable[..., Any]) -> None:
        self.op = op
        self.forms = forms
        self.expression = Expression(forms["reference"])
        self.logged: set[str] = set()
        OPS[op] = self

    def form(self) -> Callable[..., Any] | None:
        """Return the form that ``use_backend`` asks for, or is needed here; None where an implementation is to run.

        What derives or traces operators in a way that they know nothing of is shown the reference form.

        Raises:
            BackendError: a backend was forced.
        """
        form = self.forms.get(_chosen)
        if form is None and (reason := _needs_reference()):
            if _chosen in backends.BACKENDS and self.of(_chosen) is not self.expression:
                raise BackendError(f"{self.op}: backend {_chosen!r} cannot run {reason}; use 'auto' or 'reference'")
            return self.expression.form
        return form

    def inlined(self, x: Tensor, *others: Tensor, inference_only: bool = False) -> Callable[..., Any] | None:
        """Return the form that is to stand where the op is called; None where an implementation is to run.

        What plain PyTorch computes by the reference form is left to compilers, to fuse with what stands around it. A
        forced backend that has nothing of the op leaves it in plain PyTorch.

        Args:
            x: the tensor that says where to compute.
            others: further tensors that implementations want to see.
            inference_only: whether kernels compute no gradients, and stand for what compilers fuse by themselves.
        """
        form = self.form()
        if form is not None:
            return form
        if inference_only and not _infers(x):
            return self.expression.form
        if _chosen in backends.BACKENDS and self.of(_chosen) is None:
            return self.expression.form
        return self.expression.form if self.choose(x, *others) is self.expression else None

    def of(self, name: str) -> Any:
        """Return a backend's implementation, or None; plain PyTorch always has one."""
        given = backends.BACKENDS[name].IMPLEMENTATIONS.get(self.op)
        return self.expression if given is None and name == "plain" else given

    def choose(self, x: Tensor, *others: Tensor) -> Any:
        """Return the implementation that is to compute these inputs.

        Its functions are for the op and its implementations to agree on.

        Raises:
            BackendError: a backend was forced that cannot, or forward-mode derivatives are asked for.
        """
        if forward_ad._current_level >= 0:
            raise BackendError(f"linvision::{self.op} has no forward-mode derivative: call it through linvision.ops")
        if _chosen in backends.BACKENDS:
            return self._forced(_chosen, x, *others)
        op, device = self.op, x.device.type
        for name, backend in backends.BACKENDS.items():
            implementation = backend.IMPLEMENTATIONS.get(op)
            if implementation is None or (backend.DEVICE is not None and device != backend.DEVICE):
                continue
            reason = implementation.unsupported(x, *others)
            if reason is None:
                return implementation
            self._log(f"{op}: {name} kernels cannot run ({reason}); a slower backend computes the same")
        return self.expression

    def kernels(self, x: Tensor, *others: Tensor) -> Any:
        """Return an implementation with a gradient, for what the reference form leaves to autograd.

        It is needed where another backend is forced backward than was forward. First comes the forced one, then those
        made for the device.

        Raises:
            BackendError: none can run.
        """
        device = x.device.type
        found = {name: self.of(name) for name in backends.BACKENDS}
        names = [name for name, one in found.items() if one is not None and one is not self.expression]
        names.sort(key=lambda name: (name != _chosen, backends.BACKENDS[name].DEVICE not in (None, device)))
        reasons = {}
        for name in names:
            reasons[name] = found[name].unsupported(x, *others)
            if reasons[name] is None:
                return found[name]
        raise BackendError(f"{self.op}: the kernels of the forward pass cannot run any more: {reasons}")

    def _forced(self, name: str, x: Tensor, *others: Tensor) -> Any:
        implementation = self.of(name)
        if implementation is None:
            having = [each for each in backends.BACKENDS if self.of(each) is not None]
            raise BackendError(f"{self.op} has no backend {name!r}, only {', '.join(having)}; use 'auto'")
        reason = implementation.unsupported(x, *others)
        if reason is not None:
            raise BackendError(f"{self.op}: backend {name!r} cannot run: {reason}; use 'auto' for one that can")
        return implementation

    def _log(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self.logged:
            self.logged.add(message)
            _logger.warning(message)


def _infers(x: Tensor) -> bool:
    """Say whether nobody follows what is computed: no gradient, no autocast, no compiler that may know it better."""
    return not (torch.is_grad_enabled() or autocasts(x) or (torch.compiler.is_compiling() and not has_unknown_sides(x)))


def has_unknown_sides(x: Tensor) -> bool:
    """Say whether a compiler computes with symbols for the sizes between batch and channels.

    Symbolic views of many axes take it minutes, where an operator is one step.
    """
    return torch.compiler.is_compiling() and not all(map(has_static_value, x.shape[1:-1]))


@torch.compiler.assume_constant_result  # compiled graphs are guarded by what they are derived and traced by
def _needs_reference() -> str:
    """Say under what operators with kernels cannot run, or nothing."""
    if torch._C._are_functorch_transforms_active():
        return "under the transforms of torch.func"
    if forward_ad._current_level >= 0:
        return "with forward-mode derivatives"
    if torch.jit.is_tracing():
        return "in torch.jit.trace"
    if is_fx_symbolic_tracing():
        return "in torch.fx"
    return "in an export to ONNX" if torch.onnx.is_in_onnx_export() else ""


def is_traceable() -> bool:
    """Say whether all is to be plain PyTorch here, by choice or since something follows it that knows no kernels."""
    return _chosen == "reference" or bool(_needs_reference())


def backend_names() -> tuple[str, ...]:
    """List what ``use_backend`` takes: "auto", the backends, the fastest first, and the forms."""
    return "auto", *backends.BACKENDS, *FORMS


def current_backend() -> str:
    """Name what ``use_backend`` has chosen, "auto" outside of it."""
    return _chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let ops run in one backend, or in one of their forms, in this process, for as long as the context lasts.

    Args:
        name: "auto" (the fastest backend that can run); a backend, "triton", "cpp" or "plain"; or a form in PyTorch
            that stands where the op is called. "reference" is the form that exporters are to see, in linear time;
            "parallel" and "sequential" are equal forms of the mixers, and ops without one run as under "auto".

    Raises:
        ValueError: for another name. An op that the backend cannot compute raises BackendError when it is called.
    """
    global _chosen
    if name not in backend_names():
        raise ValueError(f"backend {name!r} does not exist: use {', '.join(backend_names())}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before
