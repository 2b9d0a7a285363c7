"""What the tests of ops with compiled kernels share: backends, instruction sets and threads against float64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from linvision.ops import backends, use_backend
from linvision.ops.backends.cpp import library as cpp
from linvision.ops.backends.cpp.library import library, missing
from tests.goldens import relative_error

needs_kernels = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NAMES = [name for name, backend in backends.BACKENDS.items() if backend.DEVICE in (None, "cpu")] + ["reference"]
BACKENDS = [pytest.param(name, marks=[needs_kernels] * (name == "cpp")) for name in NAMES]
LEVELS = range(len(cpp.LEVELS))  # one that this CPU lacks is tested as the best that it has
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def able(backend: str, dtype: torch.dtype) -> str:
    """Name a backend for matrix products of a type: not every CPU multiplies bfloat16, and then plain PyTorch does."""
    lacking = dtype == torch.bfloat16 and cpp.level() != "avx512_bf16"
    return "plain" if backend == "cpp" and lacking else backend


@contextmanager
def settings(level: int | None = None, threads: int | None = None) -> Iterator[None]:
    """Run kernels for an older CPU, or on so many threads, as long as the context lasts."""
    loaded, before = library(), torch.get_num_threads()
    if loaded is None:
        yield
        return
    try:
        loaded.linvision_set_level(-1 if level is None else level)
        torch.set_num_threads(threads or before)
        yield
    finally:
        loaded.linvision_set_level(-1)
        torch.set_num_threads(before)


def results(function: Function, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the outputs and the gradients of all inputs, for weights of the outputs that depend on shapes alone."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], weights)]


def assert_matches_float64(
    function: Function, inputs: Sequence[Tensor | None], backend: str, *, bound: float | None = None
) -> None:
    """Compare outputs and gradients of a backend with the plain expression in float64 at the same values.

    Kernels must return contiguous gradients, as their fakes say.
    """
    with use_backend("plain"):
        expected = results(function, [None if x is None else x.detach().double() for x in inputs])
    with use_backend(backend):
        actual = results(function, inputs)
    if backend not in ("plain", "reference"):  # compilers rely on what operators promise of their results
        assert all(gradient.is_contiguous() for gradient in actual[-sum(x is not None for x in inputs) :])
    first = next(x for x in inputs if x is not None)
    for place, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        error = relative_error(ours, theirs, theirs.norm().clamp_min(1e-30))
        assert error <= (bound or BOUND[first.dtype]), f"result {place}: {error}"
