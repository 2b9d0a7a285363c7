"""The selective scan's Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from linvision.ops import selective_scan, selective_scan_sequential, use_backend
from linvision.ops.backends.triton import selective_scan as implementation
from tests import goldens
from tests.ops.test_selective_scan import gradients, random_inputs
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]
# Relative errors that are allowed.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def assert_kernels_agree(inputs: dict[str, Tensor], *, reverse: bool) -> None:
    dtype = inputs["u"].dtype
    exact = {name: x.double() for name, x in inputs.items()}
    y, state, expected = gradients(selective_scan_sequential, exact, reverse=reverse)
    on_device = {name: x.to(DEVICE) for name, x in inputs.items()}
    with use_backend("triton"):
        our_y, our_state, ours = gradients(selective_scan, on_device, reverse=reverse)
    assert our_y.dtype == dtype
    assert our_state.dtype == torch.float32
    expected |= {"y": y, "state": state}
    ours |= {"y": our_y, "state": our_state}
    for name, x in expected.items():
        assert goldens.relative_error(ours[name].cpu(), x) <= BOUNDS[dtype], name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_states", "width", "options"),
    [
        (1, 1, 6, True),
        (16, 3, 40, False),
        long(18, 16, 40, True),
        (33, 16, 6, True),
        long(19, 17, 3, True),
        long(65, 64, 2, True),
    ],
)
def test_kernels_agree_with_the_definition(num_tokens, num_states, width, options, reverse):
    inputs = random_inputs(
        num_tokens, width=width, batch=1, num_states=num_states, dtype=torch.float32, options=options
    )
    assert_kernels_agree(inputs, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("u", 0),
        ("delta", 18),
        *(long(name, 0) for name in ("delta", "B", "C", "z")),
        *(long(name, 18) for name in ("u", "B", "C", "z")),
    ],
)
def test_nan_reaches_what_it_must_and_no_more(name, place, reverse):
    inputs = random_inputs(19, width=3, batch=1, num_states=3, dtype=torch.float32)
    inputs[name][:, place, 1] = torch.nan
    y, state, expected = gradients(selective_scan_sequential, inputs, reverse=reverse)
    with use_backend("triton"):
        on_device = {key: x.to(DEVICE) for key, x in inputs.items()}
        our_y, our_state, ours = gradients(selective_scan, on_device, reverse=reverse)
    expected |= {"y": y, "state": state}
    ours |= {"y": our_y, "state": our_state}
    for key, x in expected.items():
        assert torch.equal(ours[key].isnan().cpu(), x.isnan()), key


@pytest.mark.parametrize("dtype", [long(torch.float16), torch.bfloat16])
def test_half_precision(dtype):
    assert_kernels_agree(random_inputs(21, batch=1, num_states=4, dtype=dtype), reverse=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes a GPU: too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_states", [1, 16, 64])
@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences(dtype, num_states, reverse):
    assert_kernels_agree(random_inputs(785, width=200, num_states=num_states, dtype=dtype), reverse=reverse)


def test_large_steps_keep_their_precision():
    inputs = random_inputs(20, batch=1, dtype=torch.float32)
    inputs["delta"] *= torch.logspace(-12, 2, 20)[:, None]
    inputs["delta_bias"] -= 14
    inputs["A"] = -torch.linspace(0.01, 300, 24).view(6, 4)
    assert_kernels_agree(inputs, reverse=False)


@pytest.mark.parametrize("left_out", [("residual",), long(("z",)), ("z", "D"), long(("delta_bias", "initial_state"))])
def test_some_options_without_the_others(left_out):
    inputs = random_inputs(18, batch=1, dtype=torch.float32)
    assert_kernels_agree({name: x for name, x in inputs.items() if name not in left_out}, reverse=True)


def test_without_softplus_gate_and_state():
    inputs = random_inputs(18, batch=1, options=False, dtype=torch.float32)
    expected = selective_scan_sequential(**{name: x.double() for name, x in inputs.items()})
    with use_backend("triton"), torch.no_grad():
        y = selective_scan(**{name: x.to(DEVICE) for name, x in inputs.items()})
    assert goldens.relative_error(y.cpu(), expected) < 1e-6


def test_states_kept_by_one_backend_serve_the_other():
    inputs = {
        name: x.to(DEVICE).requires_grad_() for name, x in random_inputs(37, batch=1, dtype=torch.float32).items()
    }
    results = []
    for first, second in (("triton", "plain"), ("plain", "plain"), ("plain", "triton")):
        with use_backend(first):
            y = selective_scan(**inputs, reverse=True)
        with use_backend(second):
            results.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    for one, other, third in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(third, other, rtol=1e-4, atol=1e-5)


def test_views_are_read_by_their_strides():
    inputs = {name: x.to(DEVICE) for name, x in random_inputs(18, batch=1, dtype=torch.float32).items()}
    views = {name: torch.cat([x, x], -1)[..., : x.shape[-1]] for name, x in inputs.items()}
    views["delta"] = torch.stack([inputs["delta"]] * 2, -1)[..., 0]  # channels apart: the one layout that is copied
    with use_backend("triton"):
        expected_y, expected_state, expected = gradients(selective_scan, inputs)
        y, state, ours = gradients(lambda **x: selective_scan(**x), views)
        torch.testing.assert_close(selective_scan(**views), selective_scan(**inputs), rtol=0, atol=0)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=0)


def test_an_empty_batch_has_an_empty_answer():
    inputs = random_inputs(5, batch=0, dtype=torch.float32)
    with use_backend("triton"):
        y, state, ours = gradients(selective_scan, {name: x.to(DEVICE) for name, x in inputs.items()})
    assert y.shape == (0, 5, 6)
    assert state.shape == (0, 6, 4)
    assert (ours["A"] == 0).all()


def test_a_tile_is_a_warp_wide_or_the_channels_that_there_are():
    assert [implementation._channels(width) for width in (1, 6, 32, 768)] == [1, 8, 32, 32]
