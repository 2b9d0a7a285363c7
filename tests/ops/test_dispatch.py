"""Which implementation runs, what forcing one that cannot says, that passing one over is logged once; new backends."""

import logging
from types import SimpleNamespace

import pytest
import torch

from linvision import ops
from linvision.bench.options import BenchOptions
from linvision.bench.plan import make_plan
from linvision.errors import BackendError
from linvision.ops import backend_names, backends, current_backend, mlstm, selective_scan, use_backend
from linvision.ops.backends import cpp, plain, triton
from linvision.ops.backends.cpp import library
from linvision.ops.convolution import IMPLEMENTATIONS as CONVOLUTIONS
from linvision.ops.dispatch import OPS
from linvision.ops.mlstm import IMPLEMENTATIONS


def inputs(dtype: torch.dtype = torch.float32, head_dim: int = 4) -> list[torch.Tensor]:
    return [*(torch.randn(1, 5, 2, head_dim, dtype=dtype) for _ in range(3)), *(torch.randn(1, 5, 2) for _ in range(2))]


@pytest.fixture
def not_compiled(monkeypatch):
    """Act as if the package had been installed without a compiler."""
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(IMPLEMENTATIONS, "logged", set())


@pytest.fixture
def toy(monkeypatch):
    """Add a backend for a CPU, before all others; its mLSTM answers with zeros, and has no heads wider than 8."""
    implementation = SimpleNamespace(
        unsupported=lambda q: "wide heads" if q.shape[-1] > 8 else None,
        forward=lambda q, k, v, i, f, state, **options: (torch.zeros_like(q), tuple(q.new_empty(0) for _ in range(3))),
    )
    backend = SimpleNamespace(DEVICE="cpu", IMPLEMENTATIONS={"mlstm": implementation})
    monkeypatch.setattr(backends, "BACKENDS", {"toy": backend, **backends.BACKENDS})
    monkeypatch.setattr(IMPLEMENTATIONS, "logged", set())
    return implementation


def test_a_new_backend_is_picked_forced_and_named(toy, caplog):
    assert backend_names()[:2] == ("auto", "toy")
    others, names = ", ".join(backends.NAMES), ", ".join(backend_names())
    assert IMPLEMENTATIONS.choose(inputs()[0]) is toy
    assert not mlstm(*inputs()).any()
    with use_backend("toy"):
        assert not mlstm(*inputs()).any()
        with pytest.raises(BackendError, match="mlstm: backend 'toy' cannot run: wide heads"):
            mlstm(*inputs(head_dim=16))
        with pytest.raises(BackendError, match=f"selective_scan has no backend 'toy', only {others}"):
            selective_scan(*(torch.ones(1, 2, 3) for _ in range(2)), torch.ones(3, 3), *(torch.ones(1, 2, 3),) * 2)
        ops.causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 1, 2))  # left to plain PyTorch
    with caplog.at_level(logging.WARNING, logger="linvision"):
        assert mlstm(*inputs(head_dim=16)).any()
    assert caplog.records[0].message.startswith("mlstm: toy kernels cannot run (wide heads)")
    with (
        pytest.raises(ValueError, match=f"'cuda' does not exist: use {names}"),
        use_backend("cuda"),
    ):
        pass
    assert make_plan(BenchOptions(backend="toy")).settings[0].backend == "toy"


def test_backends_implement_known_ops_alone():
    for name, backend in backends.BACKENDS.items():
        assert backend.IMPLEMENTATIONS.keys() <= OPS.keys(), name
        assert all(callable(one.unsupported) and callable(one.forward) for one in backend.IMPLEMENTATIONS.values())
    assert list(backends.BACKENDS) == [*backends.NAMES]


def test_auto_takes_the_kernels_where_they_can_run():
    if library.missing():
        pytest.skip("not compiled")
    assert IMPLEMENTATIONS.choose(*inputs()[:1]) is cpp.mlstm
    assert IMPLEMENTATIONS.choose(*inputs(torch.float64)[:1]) is plain.mlstm


def test_gradients_take_the_kernels_of_the_device_unless_others_are_forced():
    if library.missing():
        pytest.skip("not compiled")
    tensors = torch.randn(1, 2, 2, 4), torch.randn(4, 1, 3, 3)
    assert CONVOLUTIONS.kernels(*tensors) is cpp.convolution
    with use_backend("plain"):
        assert CONVOLUTIONS.kernels(*tensors) is cpp.convolution
    if triton.convolution.unsupported(*tensors) is None:  # interpreted, as in these tests without a GPU
        with use_backend("triton"):
            assert CONVOLUTIONS.kernels(*tensors) is triton.convolution


def test_a_backend_is_used_within_its_context_only():
    q, *_ = inputs()
    outside = IMPLEMENTATIONS.choose(q)
    assert current_backend() == "auto"
    with use_backend("plain"):
        assert IMPLEMENTATIONS.choose(q) is plain.mlstm
        with use_backend("auto"):
            assert IMPLEMENTATIONS.choose(q) is outside
        assert current_backend() == "plain"
        assert IMPLEMENTATIONS.choose(q) is plain.mlstm
    assert IMPLEMENTATIONS.choose(q) is outside
    assert current_backend() == "auto"


def test_forms_run_where_an_op_has_them_and_the_rest_as_usual():
    q, *_ = tensors = inputs()
    expected = mlstm(*tensors)
    for form in ("reference", "parallel", "sequential"):
        with use_backend(form):
            torch.testing.assert_close(mlstm(*tensors), expected)
            assert IMPLEMENTATIONS.form() is not None
    with use_backend("parallel"):
        assert OPS["selective_scan"].form() is None
        assert CONVOLUTIONS.choose(torch.ones(1, 2, 2, 4), torch.ones(4, 1, 3, 3)) is not None
        with pytest.raises(BackendError, match="hands no states on"):
            mlstm(*tensors, return_state=True)
    assert all(op.forms["reference"] is not None for op in OPS.values())
    assert IMPLEMENTATIONS.choose(q) is not None


def test_unknown_backends_are_refused():
    names = ", ".join(backend_names())
    with pytest.raises(ValueError, match=f"'cuda' does not exist: use {names}"), use_backend("cuda"):
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
