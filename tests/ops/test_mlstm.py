"""The mLSTM op: golden cases, its three forms against each other, states, gradients and how torch sees it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linvision.ops import MLSTMState, mlstm, mlstm_parallel, mlstm_recurrent, use_backend
from linvision.ops.backends.cpp import library
from linvision.ops.backends.plain.mlstm import chunk_length
from tests import goldens

FORMS = [mlstm, mlstm_parallel, mlstm_recurrent]


def random_inputs(
    num_tokens: int, head_dim: int, *, batch: int = 2, num_heads: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + head_dim)
    shape = (batch, num_tokens, num_heads)
    q, k, v = (torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64) for _ in range(3))
    i, f = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype) for x in (q, k, v, i, f + 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", goldens.names("op_mlstm"))
def test_golden(name, form, dtype):
    case = goldens.load_op_case(name, dtype)
    inputs = {key: case[key].transpose(1, 2).requires_grad_() for key in "qkvif"}
    h = form(**inputs)
    bound = 1e-4 if dtype == torch.float32 and "extreme" in name else goldens.OUTPUT_BOUND[dtype]
    assert goldens.relative_error(h.transpose(1, 2), case["h"]) <= bound
    (h.transpose(1, 2) * case["loss_weight"]).sum().backward()
    golden = {key.removeprefix("grad/"): g.transpose(1, 2) for key, g in case.items() if key.startswith("grad/")}
    goldens.assert_gradients_match({key: x.grad for key, x in inputs.items()}, golden, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extreme_gates_stay_finite_in_half_precision(dtype, backend):
    case = goldens.load_op_case("op_mlstm_extreme_gates", dtype)
    inputs = [case[key].transpose(1, 2).requires_grad_() for key in "qkvif"]
    h = mlstm(*inputs)
    assert h.dtype == dtype
    assert h.isfinite().all()
    assert goldens.relative_error(h.transpose(1, 2), case["h"]) < 0.1
    h.float().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 4), (63, 48), (65, 96), (300, 16), (130, 192), (400, 384)])
def test_forms_agree(num_tokens, head_dim, reverse):
    inputs = random_inputs(num_tokens, head_dim)
    expected = mlstm_recurrent(*inputs, reverse=reverse)
    for form in (mlstm, mlstm_parallel):
        assert goldens.relative_error(form(*inputs, reverse=reverse), expected) < 1e-10


def test_reverse_is_the_flipped_sequence_flipped_back():
    inputs = random_inputs(150, 8)
    flipped = mlstm(*(x.flip(1) for x in inputs)).flip(1)
    torch.testing.assert_close(mlstm(*inputs, reverse=True), flipped)


@pytest.mark.parametrize("reverse", [False, True])
def test_long_inputs_can_be_fed_in_pieces(reverse):
    inputs = [x.requires_grad_() for x in random_inputs(230, 8)]
    whole, final = mlstm(*inputs, return_state=True, reverse=reverse)
    pieces, state = [], None
    for start, stop in ((0, 70), (70, 71), (71, 230))[:: -1 if reverse else 1]:
        piece = [x[:, start:stop] for x in inputs]
        h, state = mlstm(*piece, initial_state=state, return_state=True, reverse=reverse)
        pieces.append(h)
    joined = torch.cat(pieces[::-1] if reverse else pieces, dim=1)
    torch.testing.assert_close(joined, whole)
    for ours, expected in zip(state, final, strict=True):
        torch.testing.assert_close(ours, expected)
    loss_weight = torch.linspace(-1, 1, whole.numel(), dtype=whole.dtype).view_as(whole)
    expected = torch.autograd.grad((whole * loss_weight).sum() + final.C.sum() + final.n.sum(), inputs)
    actual = torch.autograd.grad((joined * loss_weight).sum() + state.C.sum() + state.n.sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 97])
def test_gradients_against_numeric_derivatives(num_tokens, reverse):
    inputs = [x.requires_grad_() for x in random_inputs(num_tokens, 2, batch=1)]
    C, n = torch.randn(1, 2, 2, 2, dtype=torch.float64), torch.randn(1, 2, 2, dtype=torch.float64)

    def stateless(q, k, v, i, f):
        return mlstm(q, k, v, i, f, reverse=reverse)

    assert torch.autograd.gradcheck(stateless, inputs, fast_mode=num_tokens > 5)
    state = MLSTMState(C.requires_grad_(), n.requires_grad_(), torch.zeros(1, 2, dtype=torch.float64))
    h = mlstm(*inputs, initial_state=state, reverse=reverse)
    reference = mlstm_recurrent(*inputs, initial_state=state, reverse=reverse)
    torch.testing.assert_close(h, reference)
    ours = torch.autograd.grad(h.square().sum(), [*inputs, C, n])
    expected = torch.autograd.grad(reference.square().sum(), [*inputs, C, n])
    for actual, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, theirs, rtol=1e-5, atol=1e-6)


def test_gates_and_states_are_float32_whatever_the_inputs_are(backend):
    q, k, v, i, f = random_inputs(70, 8, dtype=torch.bfloat16)
    h, state = mlstm(q, k, v, i.float(), f.float(), return_state=True)
    assert h.dtype == torch.bfloat16
    assert {x.dtype for x in state} == {torch.float32}


def test_autocast_leaves_the_inside_in_float32(backend):
    inputs = random_inputs(70, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mlstm(*inputs)
    torch.testing.assert_close(inside, mlstm(*inputs), rtol=0, atol=0)


def test_non_contiguous_inputs(backend):
    inputs = random_inputs(70, 8, dtype=torch.float32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    torch.testing.assert_close(mlstm(*views), mlstm(*inputs))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_torch_accepts_the_operator(with_state, reverse, backend):
    inputs = [x.requires_grad_() for x in random_inputs(70, 4, dtype=torch.float32)]
    state = (None, None, None)
    if with_state:
        state = (torch.zeros(2, 2, 4, 4).requires_grad_(), torch.zeros(2, 2, 4).requires_grad_(), torch.zeros(2, 2))
    torch.library.opcheck(torch.ops.linvision.mlstm, (*inputs, *state, with_state, reverse))


def test_compile_and_export(backend):
    inputs = random_inputs(70, 4, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: mlstm(*args, reverse=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), mlstm(*inputs, reverse=True))

    class Mixer(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return mlstm(q, k, v, i, f)

    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=4096)
    dynamic = {0: batch} if backend == "reference" else {0: batch, 1: tokens}
    program = torch.export.export(Mixer(), tuple(inputs), dynamic_shapes=[dynamic] * 5)
    other = random_inputs(70 if backend == "reference" else 131, 4, batch=3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*other), mlstm(*other))


# The kernels are float32 inside. Where a norm is close to zero, plain PyTorch in float32 errs by far more than the last
# digit too; the kernels may err a little more than that. A gradient far below the largest is measured against that one.


def computed(inputs: list[Tensor], state: MLSTMState | None, reverse: bool, backend: str) -> list[Tensor]:
    """Return h, the final state and the gradients of everything that is given."""
    tensors = [x.clone().requires_grad_() for x in inputs]
    given = None
    if state is not None:
        tensors += [state.C.clone().requires_grad_(), state.n.clone().requires_grad_()]
        given = MLSTMState(tensors[5], tensors[6], state.m)
    with use_backend(backend):
        h, final = mlstm(*tensors[:5], initial_state=given, return_state=True, reverse=reverse)
        loss = (h * torch.linspace(-1, 1, h.numel()).view(h.shape)).sum() + final.C.sum() + final.n.sum()
        return [h, *final, *torch.autograd.grad(loss, tensors)]


def assert_kernels_are_exact(inputs: list[Tensor], state: MLSTMState | None, reverse: bool) -> None:
    wide = None if state is None else MLSTMState(*(x.double() for x in state))
    exact = computed([x.double() for x in inputs], wide, reverse, "plain")
    ours, plain = (computed(inputs, state, reverse, backend) for backend in ("cpp", "plain"))
    largest = max(x.norm() for x in exact[4:])
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert one.dtype == other.dtype
        scale = torch.maximum(truth.norm(), 1e-3 * largest)
        error, bound = (goldens.relative_error(x, truth, scale) for x in (one, other))
        assert error <= max(3 * bound, 1e-4)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "head_dim"), [(1, 4), (63, 48), (65, 17), (300, 96)])
def test_kernels_are_exact(num_tokens, head_dim, dtype, reverse, with_state, level):
    inputs = random_inputs(num_tokens, head_dim, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, head_dim, head_dim), (2, 2, head_dim), (2, 2))
    state = MLSTMState(*(torch.randn(shape, generator=generator) for shape in shapes))
    assert_kernels_are_exact(inputs, state if with_state else None, reverse)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_kernels_take_any_shape_and_layout(data):
    if library.missing():
        pytest.skip("not compiled")
    batch, num_tokens, num_heads, head_dim = (
        data.draw(st.integers(low, high), name)
        for name, low, high in (("B", 0, 2), ("S", 1, 70), ("H", 1, 3), ("D", 1, 37))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    order = data.draw(st.permutations(range(4)), "memory layout")
    back = [order.index(axis) for axis in range(4)]
    shape = (batch, num_tokens, num_heads, head_dim)
    q, k, v = (torch.randn([shape[axis] for axis in order], generator=generator).permute(back) for _ in range(3))
    i, f = (5 * torch.randn(shape[:3], generator=generator).transpose(1, 2).contiguous().transpose(1, 2) for _ in "if")
    reverse = data.draw(st.booleans(), "reverse")
    if batch == 0:
        with use_backend("cpp"):
            assert mlstm(q, k, v, i, f, reverse=reverse).shape == shape
        return
    assert_kernels_are_exact([q, k, v, i, f], None, reverse)


@pytest.mark.parametrize("place", range(5), ids=list("qkvif"))
def test_nan_is_not_lost(place, backend):
    inputs = random_inputs(70, 8, dtype=torch.float32)
    inputs[place][:, 40] = torch.nan
    assert mlstm(*inputs)[:, 40].isnan().any()


def test_threads_share_a_sequence_with_fewer_heads_than_threads():
    if library.missing():
        pytest.skip("not compiled")
    inputs = random_inputs(1000, 16, batch=1, num_heads=1, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_kernels_are_exact(inputs, None, threads == 2)
    finally:
        torch.set_num_threads(before)


def test_flops_are_counted_and_grow_linearly():
    def count(num_tokens):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.device("meta"):
            q = torch.empty(1, num_tokens, 4, 96)
            mlstm(q, q, q, q[..., 0], q[..., 0])
        return counter.get_total_flops()

    assert count(64) > 0
    assert count(6400) == 10 * count(640)


@pytest.mark.parametrize("head_dim", [4, 96, 384])
@pytest.mark.parametrize("num_tokens", [1, 63, 196, 6084, 65537])
def test_chunks_cover_the_sequence_and_pad_less_than_one_chunk(num_tokens, head_dim):
    length = chunk_length(num_tokens, head_dim)
    num_chunks = -(-num_tokens // length)
    assert num_tokens <= num_chunks * length < num_tokens + length
    assert length <= 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 5, 2, 3)}, r"k must have shape \(B, S, H, D\) = \(2, 5, 2, 4\)"),
        ({"i": torch.zeros(2, 2, 5)}, r"i must have shape \(B, S, H\)"),
        ({"f": torch.zeros(2, 5, 2, dtype=torch.int64)}, "floating-point"),
        ({"v": torch.zeros(2, 5, 2, 4, dtype=torch.float64)}, "one floating-point type"),
        ({"v": torch.zeros(2, 5, 2, 4, device="meta")}, "one device"),
        ({"initial_state": MLSTMState(torch.zeros(2, 2, 4), torch.zeros(2, 2, 4), torch.zeros(2, 2))}, "initial_state"),
    ],
)
def test_inputs_that_disagree_are_named(change, message):
    q, gate = torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2)
    arguments = {"q": q, "k": q, "v": q, "i": gate, "f": gate} | change
    with pytest.raises(ValueError, match=message):
        mlstm(**arguments)


def test_an_empty_sequence_is_refused():
    q, gate = torch.zeros(2, 0, 2, 4), torch.zeros(2, 0, 2)
    with pytest.raises(ValueError, match="at least one token"):
        mlstm(q, q, q, gate, gate)
