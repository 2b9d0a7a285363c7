"""Which backend runs, what forcing one that cannot says, and that passing one over is said once."""

import logging

import pytest
import torch

from linvision.errors import BackendError
from linvision.ops import mlstm, use_backend
from linvision.ops.backends.cpp import library
from linvision.ops.convolution import BODIES as CONVOLUTIONS
from linvision.ops.mlstm import BODIES


def inputs(dtype: torch.dtype = torch.float32, head_dim: int = 4) -> list[torch.Tensor]:
    return [*(torch.randn(1, 5, 2, head_dim, dtype=dtype) for _ in range(3)), *(torch.randn(1, 5, 2) for _ in range(2))]


@pytest.fixture
def not_compiled(monkeypatch):
    """Act as if the package had been installed without a compiler."""
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(BODIES, "told", set())


def test_auto_takes_the_kernels_where_they_can_run():
    if library.missing():
        pytest.skip("not compiled")
    assert BODIES.choose(*inputs()) is BODIES.bodies["cpp"]
    assert BODIES.choose(*inputs(torch.float64)) is BODIES.bodies["plain"]


def test_gradients_take_the_kernels_of_the_device_unless_others_are_forced():
    if library.missing():
        pytest.skip("not compiled")
    tensors = torch.randn(1, 2, 2, 4), torch.randn(4, 1, 3, 3)
    assert CONVOLUTIONS.kernels(*tensors) is CONVOLUTIONS.bodies["cpp"]
    with use_backend("plain"):
        assert CONVOLUTIONS.kernels(*tensors) is CONVOLUTIONS.bodies["cpp"]
    if CONVOLUTIONS.bodies["triton"].refuses(*tensors) is None:  # interpreted, as in these tests without a GPU
        with use_backend("triton"):
            assert CONVOLUTIONS.kernels(*tensors) is CONVOLUTIONS.bodies["triton"]


def test_a_backend_is_used_within_its_context_only():
    outside = BODIES.choose(*inputs())
    with use_backend("plain"):
        assert BODIES.choose(*inputs()) is BODIES.bodies["plain"]
        with use_backend("auto"):
            assert BODIES.choose(*inputs()) is outside
        assert BODIES.choose(*inputs()) is BODIES.bodies["plain"]
    assert BODIES.choose(*inputs()) is outside


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="'cuda' does not exist: use auto, triton, cpp, plain"), use_backend("cuda"):
        pass


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.float64}, "float64 is computed in plain PyTorch"),
        ({"head_dim": 2048}, "heads of 2048 channels, above 1024"),
    ],
)
def test_forcing_a_backend_that_cannot_run_names_the_reason(arguments, reason):
    with use_backend("cpp"), pytest.raises(BackendError, match=reason):
        mlstm(*inputs(**arguments))


def test_forcing_kernels_that_were_not_compiled_names_the_reason(not_compiled):
    with use_backend("cpp"), pytest.raises(BackendError, match="not compiled"):
        mlstm(*inputs())


def test_without_kernels_plain_pytorch_runs_and_says_so_once(not_compiled, caplog):
    tensors = inputs()
    with use_backend("plain"):
        expected = mlstm(*tensors)
    with caplog.at_level(logging.WARNING, logger="linvision"):
        for _ in range(3):
            assert torch.equal(mlstm(*tensors), expected)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("mlstm: cpp kernels cannot run (not compiled: the package was installed without a C++ ")
