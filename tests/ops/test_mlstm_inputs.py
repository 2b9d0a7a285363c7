"""ViL's mLSTM inputs: every backend against float64, their definition, and how torch sees them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvision.ops import BlockDiagonalParameters, GateParameters, block_diagonal, mlstm_inputs, use_backend
from tests.ops import kernels


def random_inputs(batch, tokens, width, heads, *, dtype=torch.float32, bias=True):
    """Return c, x, three weights, three biases, two gate weights and two gate biases."""
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    shapes = [(batch, tokens, width)] * 2 + [(width // 4, 4, 4)] * 3 + [(width,) if bias else None] * 3
    shapes += [(heads, 3 * width)] * 2 + [(heads,)] * 2
    return [None if s is None else torch.randn(s, generator=generator).to(dtype) for s in shapes]


def project(c, x, wq, wk, wv, bq, bk, bv, wi, wf, bi, bf):
    projections = (BlockDiagonalParameters(wq, bq), BlockDiagonalParameters(wk, bk), BlockDiagonalParameters(wv, bv))
    return tuple(mlstm_inputs(c, x, *projections, i=GateParameters(wi, bi), f=GateParameters(wf, bf)))


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_definition(backend):
    inputs = c, x, wq, wk, wv, bq, bk, bv, wi, wf, bi, bf = random_inputs(2, 5, 12, 3)
    with use_backend(backend):
        q, k, v, i, f = project(*inputs)
    torch.testing.assert_close(q, c @ torch.block_diag(*wq).mT + bq)
    torch.testing.assert_close(k, c @ torch.block_diag(*wk).mT + bk)
    torch.testing.assert_close(v, x @ torch.block_diag(*wv).mT + bv)
    together = torch.cat([q, k, v], dim=-1)
    torch.testing.assert_close(i, together @ wi.mT + bi, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f, together @ wf.mT + bf, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block_diagonal(c, wq, bq), q)


SIZES = [(2, 1, 4, 1), (2, 7, 16, 4), (1, 13, 20, 3), (3, 33, 48, 4), (1, 70, 384, 4), (0, 5, 8, 2)]


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_backends_match_float64(size, dtype, backend):
    for bias in (True, False):
        kernels.assert_matches_float64(project, random_inputs(*size, dtype=dtype, bias=bias), backend)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", kernels.LEVELS)
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            kernels.assert_matches_float64(project, random_inputs(3, 37, 52, 3, dtype=dtype), "cpp")


@kernels.needs_kernels
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_any_size(batch, tokens, blocks, heads):
    kernels.assert_matches_float64(project, random_inputs(batch, tokens, 4 * blocks, heads), "cpp", bound=1e-4)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_views_are_read_where_they_lie(backend):
    _, _, *parameters = random_inputs(2, 6, 12, 2)
    wide = torch.randn(2, 6, 24)
    for c, x in (wide.chunk(2, dim=-1), (wide[..., ::2], wide[:1, :, :12].expand(2, -1, -1))):
        with use_backend(backend):
            expected = project(c.contiguous(), x.contiguous(), *parameters)
            torch.testing.assert_close(project(c, x, *parameters), expected)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_types(backend):
    inputs = random_inputs(2, 6, 12, 2)
    expected = project(*(tensor.double() for tensor in inputs))
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            outputs = project(inputs[0].to(dtype), inputs[1].to(dtype), *inputs[2:])
            assert [y.dtype for y in outputs] == [dtype] * 3 + [torch.float32] * 2
            for ours, theirs in zip(outputs, expected, strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=3e-2, atol=1e-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = project(inputs[0].bfloat16(), inputs[1].bfloat16(), *(p.requires_grad_() for p in inputs[2:]))
        sum(y.float().sum() for y in outputs).backward()
        assert [y.dtype for y in outputs] == [torch.bfloat16] * 3 + [torch.float32] * 2
        assert {p.grad.dtype for p in inputs[2:]} == {torch.float32}


@kernels.needs_kernels
@pytest.mark.parametrize("bias", [True, False])
def test_torch_accepts_the_operator(bias):
    inputs = [None if x is None else x.requires_grad_() for x in random_inputs(2, 5, 12, 2, bias=bias)]
    torch.library.opcheck(torch.ops.linvision.mlstm_inputs, tuple(inputs))


def test_compile_follows_the_backend():
    inputs = random_inputs(2, 5, 12, 2)
    torch._dynamo.reset()
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    for backend in ("auto", "plain"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), project(*inputs))
    torch.testing.assert_close(
        kernels.results(compiled, inputs), kernels.results(project, inputs), rtol=1e-4, atol=1e-4
    )


def test_export():
    class Inputs(torch.nn.Module):
        def forward(self, *inputs):
            return project(*inputs)

    inputs, tokens = random_inputs(2, 5, 12, 2), torch.export.Dim("tokens", min=2, max=64)
    shapes = (({1: tokens},) * 2 + (None,) * 10,)
    program = torch.export.export(Inputs(), tuple(inputs), dynamic_shapes=shapes)
    inputs[:2] = random_inputs(2, 11, 12, 2)[:2]
    torch.testing.assert_close(program.module()(*inputs), project(*inputs))


def test_flops_do_not_depend_on_the_backend():
    def count(device):
        inputs = [tensor.to(device) for tensor in random_inputs(2, 5, 12, 2)]
        with FlopCounterMode(display=False) as counter:
            project(*inputs)
        return counter.get_total_flops()

    assert count("cpu") == count("meta") == 2 * 2 * 5 * 36 * (4 + 4)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 5, 16), "x must have shape"),
        (2, (2, 4, 4), "q.weight must have shape"),
        (5, (8,), "q.bias must have shape"),
        (9, (2, 12), "f.weight must have shape"),
        (10, (3,), "i.weight must have shape"),
        (11, (0,), "f.bias must have shape"),
    ],
)
def test_wrong_shapes(place, shape, message):
    inputs = random_inputs(2, 5, 12, 2)
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        project(*inputs)


def test_wrong_types_and_devices():
    inputs = random_inputs(2, 5, 12, 2)
    with pytest.raises(ValueError, match="one floating-point type"):
        project(inputs[0].double(), *inputs[1:])
    with pytest.raises(ValueError, match="on one device"):
        project(inputs[0], inputs[1].to("meta"), *inputs[2:])
    with pytest.raises(ValueError, match=r"weight must have shape \(G, 4, 4\)"):
        block_diagonal(inputs[0], inputs[2][:2])
