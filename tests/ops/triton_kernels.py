"""What the tests of Triton kernels share: a GPU where there is one, else Triton's interpreter, where that works."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _counting_kernel(count):
    for _ in range(0, count):
        pass


def _fault() -> str | None:
    """Say why kernels cannot run here: the interpreter of Triton 3.6 fails in every loop with NumPy 2.4."""
    try:
        if DEVICE == "cpu":
            _counting_kernel[(1,)](1)
    except triton.runtime.errors.InterpreterError as error:
        return f"Triton {triton.__version__} and NumPy {np.__version__} do not fit: {error}"
    return None


def long(*values):
    """Leave a case to ``make test-all`` that keeps the interpreter busy; smaller ones of its kind run always."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.timeout(600)])


runs_kernels = pytest.mark.skipif(_fault() is not None, reason=str(_fault()))
