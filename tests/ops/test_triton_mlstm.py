"""The mLSTM's Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from linvision.ops import MLSTMState, mlstm, mlstm_recurrent, use_backend
from linvision.ops.backends.triton import mlstm as implementation
from tests import goldens
from tests.ops.test_mlstm import random_inputs
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]
# Relative errors that are allowed: of outputs and of gradients.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 3e-3), torch.bfloat16: (6e-3, 5e-2)}


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    """Cut even short sequences into several chunks of several tiles; wide states into few, as interpreting is slow."""
    if "own_tiles" in request.fixturenames:
        return
    monkeypatch.setattr(implementation, "CHUNK", 32)
    monkeypatch.setattr(implementation, "GATE_BLOCK", 64)
    monkeypatch.setattr(implementation, "TILES", dict.fromkeys(implementation.TILES, (16, 128, 64, 128)))


@pytest.fixture
def own_tiles():
    """Leave the tiles as models use them."""


def random_state(head_dim: int, *, num_heads: int = 2) -> MLSTMState:
    generator = torch.Generator().manual_seed(head_dim)
    C = torch.randn(1, num_heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    n = torch.randn(1, num_heads, head_dim, generator=generator, dtype=torch.float64)
    return MLSTMState(C, n, torch.randn(1, num_heads, generator=generator, dtype=torch.float64))


def outcome(
    form, inputs: list[Tensor], state: MLSTMState | None, *, state_out: bool, **options
) -> tuple[dict[str, Tensor], dict]:
    """Return what an mLSTM answers, and the gradients of a loss that takes in all of it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in zip("qkvif", inputs, strict=True)}
    if state is not None:
        leaves |= {"C": state.C.clone().requires_grad_(), "n": state.n.clone().requires_grad_()}
        options["initial_state"] = MLSTMState(leaves["C"], leaves["n"], state.m)
    answer = form(*(leaves[name] for name in "qkvif"), return_state=state_out, **options)
    h, final = answer if state_out else (answer, None)
    weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64, device=h.device).view_as(h)
    loss = (h.double() * weight).sum()
    if final is not None:
        loss = loss + final.C.double().sum() + final.n.double().square().sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"h": h} | (final._asdict() if final else {}), dict(zip(leaves, gradients, strict=True))


def assert_kernels_agree(
    inputs: list[Tensor],
    state: MLSTMState | None = None,
    *,
    state_out: bool = False,
    reverse: bool = False,
    allowance: float = 1,
) -> None:
    dtype, options = inputs[0].dtype, {"state_out": state_out, "reverse": reverse}
    inputs = [*inputs[:3], *(x.float() for x in inputs[3:])]
    exact = None if state is None else MLSTMState(*(x.double() for x in state))
    expected = outcome(mlstm_recurrent, [x.double() for x in inputs], exact, **options)
    rounded = None if state is None else MLSTMState(*(x.float().to(DEVICE) for x in state))
    with use_backend("triton"):
        ours = outcome(mlstm, [x.to(DEVICE) for x in inputs], rounded, **options)
    for actual, exact_one, bound in zip(ours, expected, BOUNDS[dtype], strict=True):
        for name, x in exact_one.items():
            assert goldens.relative_error(actual[name].cpu(), x) <= allowance * bound, name
    assert ours[0]["h"].dtype == dtype
    assert {x.dtype for name, x in ours[0].items() if name != "h"} <= {torch.float32}


@pytest.mark.parametrize(
    ("num_tokens", "head_dim", "reverse", "state_in", "state_out"),
    [
        (1, 4, False, True, True),
        (5, 4, True, False, False),
        (70, 8, False, False, False),
        (70, 8, True, True, True),
        (70, 8, False, True, False),
        (65, 48, False, False, True),
        (65, 48, True, False, False),
        (33, 96, True, True, True),
        (67, 96, False, False, False),
        long(35, 192, False, True, True),
        (17, 192, True, False, False),
        long(35, 192, True, False, False),
        long(33, 384, True, True, True),
        long(33, 384, False, False, False),
    ],
)
def test_kernels_agree_with_the_definition(num_tokens, head_dim, reverse, state_in, state_out):
    num_heads = 2 if head_dim < 96 else 1
    inputs = random_inputs(num_tokens, head_dim, batch=1, num_heads=num_heads, dtype=torch.float32)
    state = random_state(head_dim, num_heads=num_heads) if state_in else None
    assert_kernels_agree(inputs, state, state_out=state_out, reverse=reverse)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float16, 48),
        *((torch.bfloat16, width) for width in (48, 96)),
        *(long(torch.bfloat16, w) for w in (192, 384)),
    ],
)
@pytest.mark.parametrize("states", [False, True])
def test_half_precision(dtype, head_dim, states):
    inputs = random_inputs(37, head_dim, batch=1, num_heads=1, dtype=dtype)
    state = random_state(head_dim, num_heads=1) if states else None
    # Chunks of 32 tokens hand over rounded states more often than models do.
    assert_kernels_agree(inputs, state, state_out=states, reverse=states, allowance=3)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.bfloat16, 96), long(torch.float32, 96), long(torch.float16, 192)]
)
@pytest.mark.usefixtures("own_tiles")
def test_tiles_as_models_use_them(dtype, head_dim):
    inputs = random_inputs(331, head_dim, batch=1, num_heads=1, dtype=dtype)
    assert_kernels_agree(inputs, reverse=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU: too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [4, 48, 96, 192, 384])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.usefixtures("own_tiles")
def test_long_sequences(dtype, head_dim, reverse):
    assert_kernels_agree(
        random_inputs(785, head_dim, batch=1, dtype=dtype), random_state(head_dim), state_out=True, reverse=reverse
    )


@pytest.mark.usefixtures("own_tiles")
def test_roundings_cancel_in_the_gradients_of_forget_gates():
    inputs = random_inputs(100, 96, batch=1, num_heads=1, dtype=torch.bfloat16)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    with use_backend("plain"):
        leaves = [x.double().requires_grad_() for x in inputs]
        (expected,) = torch.autograd.grad(mlstm(*leaves), leaves[4], weight.double())
    with use_backend("triton"):
        leaves = [x.to(DEVICE).requires_grad_() for x in inputs]
        (ours,) = torch.autograd.grad(mlstm(*leaves), leaves[4], weight.to(DEVICE))
    assert goldens.relative_error(ours.cpu(), expected) < 0.04  # 0.13 if the kernels round differently


def test_extreme_gates():
    case = goldens.load_op_case("op_mlstm_extreme_gates", torch.float32)
    inputs = [case[key].transpose(1, 2)[:1, :40].to(DEVICE) for key in "qkvif"]
    expected = mlstm_recurrent(*(x.double() for x in inputs))
    with use_backend("triton"):
        assert goldens.relative_error(mlstm(*inputs), expected) < 1e-4
        halves = [x.bfloat16().requires_grad_() for x in inputs]
        h = mlstm(*halves)
        assert goldens.relative_error(h, expected) < 0.1
        assert all(x.isfinite().all() for x in torch.autograd.grad(h.float().sum(), halves))


def test_float16_does_not_overflow_in_sums_or_inverse_norms():
    q, k, v, i, f = random_inputs(40, 4, batch=1, dtype=torch.float16)
    large = [(30 * x).to(DEVICE).requires_grad_() for x in (q, k.abs(), v.abs())]
    gates = [x.float().to(DEVICE) for x in (i + 12, f + 20)]
    with use_backend("triton"):
        h = mlstm(*large, *gates)
        assert h.isfinite().all()
        assert all(x.isfinite().all() for x in torch.autograd.grad(h.float().mean(), large))


def test_views_are_read_by_their_strides():
    inputs = [x.to(DEVICE) for x in random_inputs(37, 8, dtype=torch.float32)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    views[0] = torch.stack([views[0], views[0]], -1)[..., 0]  # channels apart: the one layout that is copied
    with use_backend("triton"):
        torch.testing.assert_close(mlstm(*views), mlstm(*inputs), rtol=0, atol=0)
        for x in views:
            x.requires_grad_()
        gradients = torch.autograd.grad(mlstm(*views).sum(), views)  # the gradient that comes in has stride 0
    with use_backend("plain"):
        expected = torch.autograd.grad(mlstm(*views).sum(), views)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_empty_batch_has_an_empty_answer():
    inputs = [x.to(DEVICE).requires_grad_() for x in random_inputs(5, 4, batch=0, dtype=torch.float32)]
    with use_backend("triton"):
        h, state = mlstm(*inputs, return_state=True)
        h.sum().backward()
    assert h.shape == (0, 5, 2, 4)
    assert [x.shape for x in state] == [(0, 2, 4, 4), (0, 2, 4), (0, 2)]
    assert inputs[0].grad.shape == h.shape


def test_kernels_are_those_that_were_meant_to_be_tested():
    from linvision.ops.backends.triton.mlstm_gates import gates_kernel

    interpreted = "Interpreted" in type(gates_kernel).__name__
    assert interpreted == (DEVICE == "cpu")
