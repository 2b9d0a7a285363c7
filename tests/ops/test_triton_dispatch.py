"""When the Triton kernels run, and what is said where they cannot: on no GPU, an old one, for other types and sizes."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linvision.errors import BackendError
from linvision.ops import backends, mlstm, selective_scan, use_backend
from linvision.ops.backends.triton import device
from linvision.ops.dispatch import OPS
from tests.ops import test_mlstm, test_selective_scan
from tests.ops.triton_kernels import DEVICE, runs_kernels

MIXERS = ("mlstm", "selective_scan")


def implementation(backend: str, op: str):
    return backends.BACKENDS[backend].IMPLEMENTATIONS[op]


@pytest.fixture
def on_gpu(monkeypatch):
    """Act as if there were a GPU of some capability: tensors on it have shapes and types, but no numbers."""

    def choose(op: str, capability: tuple[int, int], *, dtype=torch.bfloat16, head_dim=96, num_states=16):
        monkeypatch.setattr(device, "interpreted", lambda: False)
        monkeypatch.setattr(device, "_capability", lambda _: capability)
        monkeypatch.setattr(OPS[op], "logged", set())
        with FakeTensorMode():
            u, A = torch.empty(2, 5, 4), torch.empty(4, num_states)
            tensors = (torch.empty(2, 5, 4, head_dim),) if op == "mlstm" else (u, A)
            return OPS[op].choose(*(x.to("cuda:0", dtype) for x in tensors))

    return choose


@pytest.mark.parametrize("op", MIXERS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_takes_the_kernels_on_a_gpu(op, capability, dtype, on_gpu):
    assert on_gpu(op, capability, dtype=dtype) is implementation("triton", op)


@pytest.mark.parametrize(
    ("op", "changes", "reason"),
    [
        ("mlstm", {"capability": (7, 5)}, "an old GPU, of compute capability 7.5; 8.0 is needed"),
        ("selective_scan", {"capability": (7, 0)}, "an old GPU, of compute capability 7.0; 8.0 is needed"),
        ("mlstm", {"dtype": torch.float64}, "float64 is computed in plain PyTorch"),
        ("selective_scan", {"dtype": torch.float64}, "float64 is computed in plain PyTorch"),
        ("mlstm", {"head_dim": 513}, "heads of 513 channels, above 512"),
        ("selective_scan", {"num_states": 257}, "257 states a channel, above 256"),
    ],
)
def test_what_a_gpu_cannot_run_falls_back_by_name_and_raises_if_forced(op, changes, reason, on_gpu, caplog):
    arguments = {"capability": (9, 0)} | changes
    with caplog.at_level(logging.WARNING, logger="linvision"):
        assert on_gpu(op, **arguments) is implementation("plain", op)
    expected = f"{op}: triton kernels cannot run ({reason}); a slower backend computes the same"
    assert [record.message for record in caplog.records] == [expected]
    with use_backend("triton"), pytest.raises(BackendError, match=f"{op}: backend 'triton' cannot run: {reason}"):
        on_gpu(op, **arguments)


def test_a_gpu_without_triton_falls_back_by_name(on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    assert on_gpu("mlstm", (9, 0)) is implementation("plain", "mlstm")
    assert "triton is not installed" in caplog.text


def test_gpus_of_amd_have_no_capability_to_ask_for(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert on_gpu("mlstm", (0, 0)) is implementation("triton", "mlstm")


def test_without_a_gpu_nothing_is_said_and_forcing_the_kernels_raises(monkeypatch, caplog):
    monkeypatch.setattr(device, "interpreted", lambda: False)
    inputs, scan = test_mlstm.random_inputs(3, 4, dtype=torch.float32), test_selective_scan.random_inputs(3)
    mlstm(*inputs)
    selective_scan(**scan)
    assert "triton" not in caplog.text
    scan = test_selective_scan.random_inputs(3, dtype=torch.float32)
    with use_backend("triton"):
        with pytest.raises(
            BackendError, match="mlstm: backend 'triton' cannot run: the tensors are on cpu, not on a GPU"
        ):
            mlstm(*inputs)
        with pytest.raises(BackendError, match="the tensors are on cpu, not on a GPU"):
            selective_scan(**scan)


def test_tensors_on_two_devices_are_refused():
    q, k, v, i, f = test_mlstm.random_inputs(3, 4, dtype=torch.float32)
    scan = test_selective_scan.random_inputs(3, dtype=torch.float32)
    with use_backend("triton"):
        with pytest.raises(ValueError, match="mlstm: all tensors must be on one device"):
            mlstm(q, k, v, i.to("meta"), f)
        with pytest.raises(ValueError, match="residual is on meta and u on cpu"):
            selective_scan(**scan | {"residual": scan["residual"].to("meta")})


@runs_kernels
def test_no_token_is_refused_and_one_is_enough():
    with use_backend("triton"):
        with pytest.raises(ValueError, match="at least one token"):
            mlstm(*(x.to(DEVICE) for x in test_mlstm.random_inputs(0, 4, dtype=torch.float32)))
        with pytest.raises(ValueError, match="at least one token"):
            selective_scan(**test_selective_scan.random_inputs(0, dtype=torch.float32))
        one = [x.to(DEVICE) for x in test_mlstm.random_inputs(1, 4, dtype=torch.float32)]
        scan = {name: x.to(DEVICE) for name, x in test_selective_scan.random_inputs(1, dtype=torch.float32).items()}
        ours = mlstm(*one), selective_scan(**scan)
    with use_backend("plain"):
        torch.testing.assert_close(ours, (mlstm(*one), selective_scan(**scan)))
