"""The selective scan in every backend: golden cases, definition, states, gradients and layouts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linvision.errors import BackendError
from linvision.ops import selective_scan, selective_scan_sequential, use_backend
from linvision.ops.backends import cpp, scan_inputs
from linvision.ops.backends.cpp import library
from linvision.ops.backends.plain import selective_scan as tiled
from tests import goldens

FORMS = [selective_scan, selective_scan_sequential]
TOKENS = ("u", "delta", "B", "C", "z", "residual")


def random_inputs(
    num_tokens: int,
    *,
    batch: int = 2,
    width: int = 6,
    num_states: int = 4,
    dtype: torch.dtype = torch.float64,
    options: bool = True,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_states)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "u": random(batch, num_tokens, width),
        "delta": random(batch, num_tokens, width).abs(),
        "A": -random(width, num_states).exp(),
        "B": random(batch, num_tokens, num_states),
        "C": random(batch, num_tokens, num_states),
    }
    if options:
        inputs |= {"D": random(width), "z": random(batch, num_tokens, width), "delta_bias": random(width).abs()}
        inputs |= {"residual": random(batch, num_tokens, width), "initial_state": random(batch, width, num_states)}
    return rounded(inputs, dtype)


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: x.to(dtype if name in TOKENS else wide) for name, x in inputs.items()}


@pytest.fixture
def small_tiles(monkeypatch):
    """Cut even small inputs into many tiles, several sequences and several kept states in each."""
    monkeypatch.setattr(tiled, "STEP_PER_THREAD", 32 // torch.get_num_threads())
    monkeypatch.setattr(tiled, "TILE_PER_THREAD", 1600 // torch.get_num_threads())


def gradients(form, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = form(**leaves, delta_softplus=True, return_state=True, **options)
    weight = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view_as(y)  # the same numbers in every type
    ((y * weight).sum() + state.square().sum()).backward()
    return y.detach(), state.detach(), {name: x.grad for name, x in leaves.items()}


def assert_as_exact(inputs: dict[str, Tensor], *, bound: float = 1e-5, **options) -> None:
    """Hold the op, in the backend of the test, against plain float64 of the same numbers."""
    y, state, ours = gradients(selective_scan, inputs, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    with use_backend("plain"):
        expected_y, expected_state, expected = gradients(selective_scan, exact, **options)
    assert goldens.relative_error(y, expected_y) < bound
    assert goldens.relative_error(state, expected_state) < bound
    for name, gradient in expected.items():
        assert ours[name].dtype == inputs[name].dtype
        error = (ours[name].double() - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert error < bound, f"gradient of {name}: relative error {error:.1e}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("form", "backend", "dtype"),
    [
        (selective_scan, "plain", torch.float64),
        (selective_scan, "plain", torch.float32),
        (selective_scan, "cpp", torch.float32),
        (selective_scan_sequential, "plain", torch.float64),
        (selective_scan_sequential, "plain", torch.float32),
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("name", goldens.names("op_scan"))
def test_golden(name, form, backend, reverse, dtype):
    case = goldens.load_op_case(name, dtype)

    def in_order(x: Tensor) -> Tensor:
        if x.ndim < 3:
            return x
        return x.transpose(1, 2).flip(1) if reverse else x.transpose(1, 2)

    keys = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = {key: in_order(case[key]).detach().requires_grad_() for key in keys}
    y = form(**inputs, delta_softplus=True, reverse=reverse)
    assert goldens.relative_error(y, in_order(case["y"])) <= goldens.OUTPUT_BOUND[dtype]
    (y * in_order(case["loss_weight"])).sum().backward()
    golden = {key: in_order(case[f"grad/{key}"]) for key in keys}
    goldens.assert_gradients_match({k: x.grad for k, x in inputs.items()}, golden, goldens.GRADIENT_BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_steps_stay_finite_in_half_precision(backend, dtype):
    case = goldens.load_op_case("op_scan_large_delta", dtype)
    keys = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = {key: (case[key].transpose(1, 2) if case[key].ndim == 3 else case[key]).requires_grad_() for key in keys}
    y, state = selective_scan(**inputs, delta_softplus=True, return_state=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert goldens.relative_error(y.transpose(1, 2), case["y"]) < 0.05
    y.float().sum().backward()
    for key, x in inputs.items():
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all(), key


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_states"), [(1, 1), (16, 3), (17, 16), (65, 64), (130, 1), (131, 7)])
@pytest.mark.usefixtures("small_tiles")
def test_tiles_agree_with_the_definition(num_tokens, num_states, reverse):
    inputs = random_inputs(num_tokens, batch=5, num_states=num_states)
    y, state, ours = gradients(selective_scan, inputs, reverse=reverse)
    expected_y, expected_state, expected = gradients(selective_scan_sequential, inputs, reverse=reverse)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 11),
    num_tokens=st.integers(1, 200),
    width=st.integers(1, 9),
    num_states=st.integers(1, 20),
    threads=st.integers(1, 64),
)
def test_every_cut_covers_each_token_of_each_sequence_once(batch, num_tokens, width, num_states, threads):
    u, A = torch.empty(batch, num_tokens, width), torch.empty(num_states, width)
    inputs = scan_inputs.Inputs(u, u, A, u, u, None, None, None, False, False)
    tiling = tiled._Tiling.plan(inputs, threads=threads)
    seen = torch.zeros(batch, num_tokens)
    for rows in tiling.rows():
        for tokens in tiling.tokens(from_the_end=False):
            assert tokens.start % scan_inputs.interval(num_states) == 0
            seen[rows, tokens] += 1
    assert (seen == 1).all()
    assert tiling.tokens(from_the_end=True) == tiling.tokens(from_the_end=False)[::-1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_states", [1, 3, 16, 64])
@pytest.mark.parametrize("num_tokens", [1, 63, 65, 300])
def test_float32_against_float64(num_tokens, num_states, reverse, backend):
    inputs = random_inputs(num_tokens, width=21, num_states=num_states, dtype=torch.float32)
    assert_as_exact(inputs, reverse=reverse)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision_against_float64(reverse, dtype, bound, backend):
    assert_as_exact(random_inputs(65, width=21, num_states=16, dtype=dtype), bound=bound, reverse=reverse)


@pytest.mark.parametrize("num_states", [7, 16])
def test_every_instruction_set_that_this_cpu_has(num_states, level):
    assert library.level() == level
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3)):
        assert_as_exact(random_inputs(37, width=21, num_states=num_states, dtype=dtype), bound=bound)
        large = {"A": -torch.linspace(0, 300, 21 * num_states).view(21, num_states)}
        assert_as_exact(random_inputs(37, width=21, num_states=num_states, dtype=dtype) | large, bound=bound)


def test_threads_share_the_work_of_any_batch(backend):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for batch in (1, 3):
                inputs = random_inputs(50, batch=batch, width=200, num_states=16, dtype=torch.float32)
                assert_as_exact(inputs)
                results.append(selective_scan(**inputs, delta_softplus=True))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_backends_leave_each_other_the_same_states(reverse, backend):
    inputs = random_inputs(70, width=21, num_states=5, dtype=torch.float32)
    A = inputs["A"].mT.contiguous()
    given = {name: x for name, x in inputs.items() if name not in ("A", "initial_state")}
    shared = scan_inputs.Inputs(**given, A=A, delta_softplus=True, reverse=reverse)
    ours = cpp.selective_scan.forward(shared, inputs["initial_state"], True)
    plain = tiled.forward(shared, inputs["initial_state"], True)
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected)
    dy = torch.randn(plain[0].shape, generator=torch.Generator().manual_seed(0))
    expected = tiled.backward(shared, plain[2], dy, plain[1])
    actual = cpp.selective_scan.backward(shared, plain[2], dy, plain[1])
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-4)


def strided(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make views of the inputs as models do, halves of u and z, pieces of B and C, and some without unit strides."""
    views = dict(inputs)
    if "z" in inputs:
        views["u"], views["z"] = torch.cat([inputs["u"], inputs["z"]], dim=-1).chunk(2, dim=-1)
    sizes = [3, inputs["B"].shape[-1], inputs["C"].shape[-1]]
    padding = inputs["B"].new_zeros(*inputs["B"].shape[:2], 3)
    _, views["B"], views["C"] = torch.cat([padding, inputs["B"], inputs["C"]], dim=-1).split(sizes, dim=-1)
    views["delta"] = inputs["delta"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    views["A"] = inputs["A"].mT.contiguous().mT
    return views


def test_views_of_the_layouts_that_models_use(backend):
    inputs = random_inputs(70, width=32, num_states=16, dtype=torch.float32)
    views = strided(inputs)
    assert not any(views[name].is_contiguous() for name in ("u", "z", "B", "C", "delta", "A"))
    expected = selective_scan(**inputs, delta_softplus=True)
    torch.testing.assert_close(selective_scan(**views, delta_softplus=True), expected, rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in inputs.values()]
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected.mT).mT
    ours = torch.autograd.grad((selective_scan(**strided(inputs)) * weight).sum(), leaves)
    expected = torch.autograd.grad((selective_scan(**inputs) * weight.contiguous()).sum(), leaves)
    for gradient, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 50),
    width=st.integers(1, 40),
    num_states=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    options=st.booleans(),
    views=st.booleans(),
    reverse=st.booleans(),
)
def test_any_shape(batch, num_tokens, width, num_states, dtype, options, views, reverse, backend):
    inputs = random_inputs(num_tokens, batch=batch, width=width, num_states=num_states, dtype=dtype, options=options)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert_as_exact(strided(inputs) if views else inputs, bound=bound, reverse=reverse)


@pytest.mark.parametrize("name", ["u", "delta", "B", "z", "A", "initial_state"])
def test_nan_is_not_lost(name, backend):
    inputs = random_inputs(20, width=21, dtype=torch.float32)
    inputs[name].view(-1)[0] = torch.nan
    y = selective_scan(**inputs, delta_softplus=True)
    assert y[0, 0, 0].isnan()
    assert y[1].isfinite().all() or name == "A"


def test_cpp_leaves_float64_to_plain():
    with use_backend("cpp"), pytest.raises(BackendError, match=r"float64|not compiled"):
        selective_scan(**random_inputs(5))


def test_reverse_is_the_flipped_sequence_flipped_back():
    inputs = random_inputs(150)
    flipped = {name: x.flip(1) if name in TOKENS else x for name, x in inputs.items()}
    torch.testing.assert_close(selective_scan(**inputs, reverse=True), selective_scan(**flipped).flip(1))


@pytest.mark.parametrize("reverse", [False, True])
def test_long_inputs_can_be_fed_in_pieces(reverse):
    inputs = {name: x.requires_grad_() for name, x in random_inputs(90).items()}
    whole, final = selective_scan(**inputs, reverse=reverse, return_state=True)
    pieces, state = [], inputs["initial_state"]
    for start, stop in ((0, 33), (33, 34), (34, 90))[:: -1 if reverse else 1]:
        piece = {name: x[:, start:stop] if name in TOKENS else x for name, x in inputs.items()}
        y, state = selective_scan(**(piece | {"initial_state": state}), reverse=reverse, return_state=True)
        pieces.append(y)
    joined = torch.cat(pieces[::-1] if reverse else pieces, dim=1)
    torch.testing.assert_close(joined, whole)
    torch.testing.assert_close(state, final)
    leaves = list(inputs.values())
    expected = torch.autograd.grad(whole.square().sum() + final.sum(), leaves)
    actual = torch.autograd.grad(joined.square().sum() + state.sum(), leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("num_tokens", "options"), [(1, True), (5, False), (19, True)])
def test_gradients_against_numeric_derivatives(num_tokens, options, reverse):
    inputs = random_inputs(num_tokens, batch=1, width=2, num_states=2, options=options)
    names, tensors = list(inputs), [x.requires_grad_() for x in inputs.values()]

    def scan(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        return selective_scan(**arguments, delta_softplus=options, reverse=reverse, return_state=True)

    assert torch.autograd.gradcheck(scan, tensors)


def test_positive_rates_and_any_decay_are_taken_as_they_are():
    inputs = random_inputs(20) | {"A": torch.linspace(-300, 0.1, 24, dtype=torch.float64).view(6, 4)}
    y, _, ours = gradients(selective_scan, inputs)
    expected_y, _, expected = gradients(selective_scan_sequential, inputs)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(ours["A"], expected["A"])


def test_float32_is_as_exact_as_the_sequential_definition(backend):
    exact = selective_scan_sequential(**random_inputs(700, width=16, num_states=16), delta_softplus=True)
    inputs = random_inputs(700, width=16, num_states=16, dtype=torch.float32)
    ours = goldens.relative_error(selective_scan(**inputs, delta_softplus=True), exact)
    sequential = goldens.relative_error(selective_scan_sequential(**inputs, delta_softplus=True), exact)
    assert ours < 2 * sequential


def test_autocast_leaves_the_inside_in_float32(backend):
    inputs = {name: x.requires_grad_() for name, x in random_inputs(70, dtype=torch.float32).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(**inputs)
        inside_gradients = torch.autograd.grad(inside.sum(), list(inputs.values()))
    outside = selective_scan(**inputs)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    outside_gradients = torch.autograd.grad(outside.sum(), list(inputs.values()))
    for ours, expected in zip(inside_gradients, outside_gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_non_contiguous_inputs():
    inputs = random_inputs(70)
    views = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in views.values())
    y, state, ours = gradients(selective_scan, views)
    expected_y, expected_state, expected = gradients(selective_scan, inputs)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(state, expected_state)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(5, 6)}, r"u must be \(B, S, E\)"),
        ({"delta": torch.zeros(2, 6, 5)}, "delta must have shape"),
        ({"A": torch.zeros(5, 4)}, "A must have shape"),
        ({"B": torch.zeros(2, 5, 3)}, "B must have shape"),
        ({"C": torch.zeros(2, 4, 5)}, "C must have shape"),
        ({"D": torch.zeros(6, 1)}, "D must have shape"),
        ({"z": torch.zeros(1, 5, 6)}, "z must have shape"),
        ({"delta_bias": torch.zeros(4)}, "delta_bias must have shape"),
        ({"initial_state": torch.zeros(2, 4, 6)}, r"initial_state must have shape \(B, E, N\) = \(2, 6, 4\)"),
        ({"B": torch.zeros(2, 5, 4, dtype=torch.float64)}, "one floating-point type"),
        ({"A": torch.zeros(6, 4, dtype=torch.int64)}, "A is torch.int64"),
        ({"C": torch.zeros(2, 5, 4, device="meta")}, "C is on meta and u on cpu"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_disagree_are_named(form, change, message):
    inputs = random_inputs(5, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        form(**inputs)


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(**random_inputs(0))


def test_an_empty_batch_has_an_empty_answer(backend):
    inputs = {name: x.requires_grad_() for name, x in random_inputs(5, batch=0, dtype=torch.float32).items()}
    y, state = selective_scan(**inputs, return_state=True)
    assert y.shape == (0, 5, 6)
    assert state.shape == (0, 6, 4)
    (y.sum() + state.sum()).backward()
    for name, x in inputs.items():
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all(), name
