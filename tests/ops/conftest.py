"""What the tests of all ops share: every backend that can run here."""

import pytest
import torch
from hypothesis import settings

from linvision.ops import use_backend
from linvision.ops.backends.cpp import library
from tests.ops.kernels import NAMES

# The same examples in every run: a change is judged by what it does, not by what was drawn.
settings.register_profile("reproducible", derandomize=True)
settings.load_profile("reproducible")


@pytest.fixture(params=NAMES)
def backend(request):
    """Run a test in each backend for a CPU and in the reference form; in C++ only where it was compiled."""
    if request.param == "cpp" and library.missing():
        pytest.skip(f"cpp: {library.missing()}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def nearest(monkeypatch):
    """Let Triton's interpreter round to bfloat16 as GPUs do, to the nearest number; by itself it cuts off."""
    tl, interpreter = pytest.importorskip("triton.language"), pytest.importorskip("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        bits = torch.tensor(source.data).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view("uint16"), tl.bfloat16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture(params=range(len(library.LEVELS)), ids=library.LEVELS)
def level(request):
    """Run a test in the C++ kernels for each instruction set that this CPU has."""
    loaded = library.library()
    if loaded is None:
        pytest.skip(f"cpp: {library.missing()}")
    if loaded.linvision_set_level(request.param) != request.param:
        pytest.skip(f"this CPU has no {library.LEVELS[request.param]}")
    with use_backend("cpp"):
        yield library.LEVELS[request.param]
    loaded.linvision_set_level(-1)
