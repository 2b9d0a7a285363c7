"""The gated head norm of ViL: every backend against float64, its definition, and how torch sees it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from linvision.ops import gated_head_norm, use_backend
from tests.ops import kernels

EPS = 1e-5


def random_inputs(batch, tokens, heads, head_dim, *, dtype=torch.float32, bias=True):
    """Return h, c, z, weight, bias and skip."""
    generator = torch.Generator().manual_seed(tokens * 1000 + head_dim)
    width = heads * head_dim
    shapes = [(batch, tokens, heads, head_dim), *[(batch, tokens, width)] * 2, (width,), (width,), (width,)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return inputs if bias else [*inputs[:4], None, inputs[5]]


def gated(h, c, z, weight, bias, skip):
    return gated_head_norm(h, c, z, weight=weight, bias=bias, skip=skip, eps=EPS)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_definition(backend):
    h, c, z, weight, bias, skip = inputs = random_inputs(2, 5, 3, 8)
    normalised = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    with use_backend(backend):
        y = gated(*inputs)
    ungated = normalised.flatten(2) * (1 + weight) + bias + skip * c
    torch.testing.assert_close(y, ungated * F.silu(z))
    for with_gradient in (True, False):
        with use_backend(backend), torch.set_grad_enabled(with_gradient):
            torch.testing.assert_close(gated(h, c, None, weight.requires_grad_(), bias, skip), ungated)


SIZES = [(2, 1, 1, 4), (2, 7, 4, 16), (1, 13, 3, 5), (3, 33, 4, 33), (1, 70, 4, 96), (0, 5, 2, 4), (1, 0, 2, 4)]


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_backends_match_float64(size, dtype, backend):
    for bias in (True, False):
        kernels.assert_matches_float64(gated, random_inputs(*size, dtype=dtype, bias=bias), backend)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", kernels.LEVELS)
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            kernels.assert_matches_float64(gated, random_inputs(3, 37, 3, 21, dtype=dtype), "cpp")


@kernels.needs_kernels
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(8, 70))
def test_any_size(batch, tokens, heads, head_dim):
    kernels.assert_matches_float64(gated, random_inputs(batch, tokens, heads, head_dim), "cpp", bound=1e-4)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_a_large_mean_does_not_swallow_the_variance(backend):
    h, *others = random_inputs(2, 5, 3, 8)
    kernels.assert_matches_float64(gated, [h + 1000, *others], backend, bound=1e-3)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_views_are_read_where_they_lie(backend):
    _, _, _, *parameters = random_inputs(2, 6, 3, 4)
    wide = torch.randn(2, 6, 24)
    heads = [torch.randn(2, 3, 6, 4).transpose(1, 2), torch.randn(2, 6, 3, 8)[..., ::2]]
    for h, (c, z) in zip(
        heads, [wide.chunk(2, dim=-1), (wide[..., ::2], wide[:1, :, 12:].expand(2, -1, -1))], strict=True
    ):
        with use_backend(backend):
            expected = gated(h.contiguous(), c.contiguous(), z.contiguous(), *parameters)
            torch.testing.assert_close(gated(h, c, z, *parameters), expected)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_types(backend):
    inputs = random_inputs(2, 6, 3, 8)
    expected = gated(*(tensor.double() for tensor in inputs))
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            y = gated(*(tensor.to(dtype) for tensor in inputs[:3]), *inputs[3:])
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = gated(*(tensor.bfloat16() for tensor in inputs[:3]), *(p.requires_grad_() for p in inputs[3:]))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert {p.grad.dtype for p in inputs[3:]} == {torch.float32}


@kernels.needs_kernels
@pytest.mark.parametrize("bias", [True, False])
def test_torch_accepts_the_operator(bias):
    inputs = [None if x is None else x.requires_grad_() for x in random_inputs(2, 5, 3, 8, bias=bias)]
    torch.library.opcheck(torch.ops.linvision.gated_head_norm, (*inputs, EPS))


def test_compile_follows_the_backend():
    inputs = random_inputs(2, 5, 3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    for backend in ("auto", "plain"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), gated(*inputs))
    torch.testing.assert_close(kernels.results(compiled, inputs), kernels.results(gated, inputs), rtol=1e-4, atol=1e-4)


def test_export():
    class Norm(torch.nn.Module):
        def forward(self, *inputs):
            return gated(*inputs)

    inputs, tokens = random_inputs(2, 5, 3, 8), torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(Norm(), tuple(inputs), dynamic_shapes=(({1: tokens},) * 3 + (None,) * 3,))
    inputs[:3] = random_inputs(2, 11, 3, 8)[:3]
    torch.testing.assert_close(program.module()(*inputs), gated(*inputs))


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 5, 24), r"h must be \(B, S, H, D\)"),
        (1, (2, 5, 23), "c must have shape"),
        (2, (2, 4, 24), "z must have shape"),
        (3, (8,), "weight must have shape"),
        (4, (8,), "bias must have shape"),
        (5, (23,), "skip must have shape"),
    ],
)
def test_wrong_shapes(place, shape, message):
    inputs = random_inputs(2, 5, 3, 8)
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        gated(*inputs)


def test_wrong_types_and_devices():
    inputs = random_inputs(2, 5, 3, 8)
    with pytest.raises(ValueError, match="one floating-point type"):
        gated(inputs[0].double(), *inputs[1:])
    with pytest.raises(ValueError, match="c is on meta and h on cpu"):
        gated(inputs[0], inputs[1].to("meta"), *inputs[2:])
