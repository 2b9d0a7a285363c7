"""How torch sees the ops when Triton kernels compute them: registration, compilers, export, layouts, huge offsets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linvision.ops import depthwise_conv2d, mlstm, selective_scan, use_backend
from tests.ops import test_convolution, test_gated_norm, test_mlstm, test_mlstm_inputs, test_selective_scan
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = runs_kernels
NUM_APART = 6 * 2**29  # numbers of the room for 6 tokens with 2^29 elements from one to the next
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "residual", "initial_state")


@pytest.fixture(autouse=True)
def kernels():
    """Let Triton compute everything; compilers start anew."""
    torch._dynamo.reset()
    with use_backend("triton"):
        yield


def mlstm_inputs(num_tokens: int) -> list[Tensor]:
    return [x.to(DEVICE) for x in test_mlstm.random_inputs(num_tokens, 4, batch=1, dtype=torch.float32)]


def scan_inputs(num_tokens: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    inputs = test_selective_scan.random_inputs(num_tokens, batch=1, dtype=dtype)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize("with_state", [False, True])
def test_torch_accepts_the_mlstm(with_state):
    inputs = [x.requires_grad_() for x in mlstm_inputs(5)]
    state = (None, None, None)
    if with_state:
        C, n, m = (torch.zeros(1, 2, *shape, device=DEVICE) for shape in ((4, 4), (4,), ()))
        state = (C.requires_grad_(), n.requires_grad_(), m)
    torch.library.opcheck(torch.ops.linvision.mlstm, (*inputs, *state, with_state, True))


@pytest.mark.parametrize("given", [long(NAMES[:5]), NAMES])
def test_torch_accepts_the_selective_scan(given):
    inputs = scan_inputs(5)
    tensors = [inputs[name].requires_grad_() if name in given else None for name in NAMES]
    torch.library.opcheck(torch.ops.linvision.selective_scan, (*tensors, True, False, True))


@pytest.mark.parametrize("biased", [False, True])
def test_torch_accepts_the_convolution(biased):
    x, weight, bias = (t.to(DEVICE).requires_grad_() for t in test_convolution.grid_inputs((1, 3, 2, 4), (3, 3)))
    torch.library.opcheck(torch.ops.linvision.depthwise_conv, (x, weight, bias if biased else None, False, True, False))


def assert_compiled_is_eager(op: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for form in (compiled, op):
        y = form(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_compilers_see_no_break_forward_and_backward():
    assert_compiled_is_eager(lambda *x: mlstm(*x, reverse=True), mlstm_inputs(5))
    scan = scan_inputs(5)
    assert_compiled_is_eager(lambda *x: selective_scan(**dict(zip(scan, x, strict=True))), list(scan.values()))
    grid = [x.to(DEVICE) for x in test_convolution.grid_inputs((1, 3, 2, 4), (3, 3))]
    assert_compiled_is_eager(lambda *x: depthwise_conv2d(*x, activation="silu"), grid)
    projected = [x.to(DEVICE) for x in test_mlstm_inputs.random_inputs(1, 5, 12, 2)]
    assert_compiled_is_eager(lambda *x: torch.cat([y.flatten() for y in test_mlstm_inputs.project(*x)]), projected)
    heads = [x.to(DEVICE) for x in test_gated_norm.random_inputs(1, 5, 2, 4)]
    assert_compiled_is_eager(test_gated_norm.gated, heads)


def test_exported_programs_take_other_lengths():
    class Mixers(torch.nn.Module):
        def forward(self, gates: list[Tensor], tokens: list[Tensor], A: Tensor):
            return mlstm(*gates), selective_scan(*tokens[:2], A, *tokens[2:], delta_softplus=True)

    def example(num_tokens: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        scan = scan_inputs(num_tokens)
        return mlstm_inputs(num_tokens), [scan[name] for name in ("u", "delta", "B", "C")], scan["A"]

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ([{1: length}] * 5, [{1: length}] * 4, None)
    program = torch.export.export(Mixers(), example(5), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(*example(9)), Mixers()(*example(9)))


@pytest.mark.parametrize("place", range(5), ids=list("qkvif"))
def test_the_mlstm_does_not_lose_nan(place):
    inputs = mlstm_inputs(9)
    inputs[place][:, 4] = torch.nan
    assert mlstm(*inputs)[:, 4].isnan().any()


@pytest.mark.parametrize("name", ["u", "delta", "B", "z", "A", "residual", "initial_state"])
def test_the_scan_does_not_lose_nan(name):
    inputs = scan_inputs(5)
    inputs[name].view(-1)[0] = torch.nan
    assert selective_scan(**inputs, delta_softplus=True)[0, 0, 0].isnan()


def apart(x: Tensor, memory: Tensor, start: int) -> Tensor:
    """Return the same numbers with 2^29 elements between tokens."""
    strides = (NUM_APART, 2**29, *x.stride()[2:])
    view = memory.as_strided(x.shape, strides, start).copy_(x)
    assert view.shape[1] > 4  # so that offsets pass 2^31
    return view


def memory(path, dtype: torch.dtype) -> Tensor:
    """Make room for more than 2^31 elements in a file with holes, which takes up what is written alone."""
    return torch.from_file(str(path / "room"), shared=True, size=NUM_APART, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no memory with holes")
def test_offsets_beyond_32_bits(tmp_path):
    room = memory(tmp_path, torch.bfloat16)
    inputs = [x.bfloat16() for x in mlstm_inputs(6)]
    far = [apart(x, room, 1000 * place) for place, x in enumerate(inputs)]
    dy = torch.linspace(-1, 1, inputs[0].numel()).bfloat16().view_as(inputs[0])
    assert_same(lambda *x: mlstm(*x, reverse=True), far, inputs, apart(dy, room, 10000), dy)
    scan = scan_inputs(6, dtype=torch.bfloat16)
    far_scan = {
        name: apart(x, room, 20000 + 1000 * place)
        if x.shape[:2] == (1, 6) and name in test_selective_scan.TOKENS
        else x
        for place, (name, x) in enumerate(scan.items())
    }
    dy = torch.linspace(-1, 1, scan["u"].numel()).bfloat16().view_as(scan["u"])
    assert_same(
        lambda *x: selective_scan(**dict(zip(scan, x, strict=True))),
        list(far_scan.values()),
        list(scan.values()),
        apart(dy, room, 40000),
        dy,
    )


def assert_same(
    op: Callable[..., Tensor], far: list[Tensor], near: list[Tensor], d_far: Tensor, d_near: Tensor
) -> None:
    results = []
    for inputs, gradient in ((far, d_far), (near, d_near)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = op(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
    torch.testing.assert_close(*results, rtol=0, atol=0)
