"""Depthwise convolutions of tokens: every backend against float64, their definition, and how torch sees them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvision.errors import BackendError
from linvision.ops import causal_conv1d, depthwise_conv2d, use_backend
from tests.goldens import relative_error
from tests.ops import kernels


def grid_inputs(shape, kernel, *, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(sum(shape) * 100 + sum(kernel))
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(shape[-1], 1, *kernel, generator=generator) / (kernel[0] * kernel[1]) ** 0.5
    shift = torch.randn(shape[-1], generator=generator)
    return [None if tensor is None else tensor.to(dtype) for tensor in (x, weight, shift if bias else None)]


def sequence_inputs(shape, kernel, **options):
    x, weight, bias = grid_inputs((shape[0], 1, *shape[1:]), (1, kernel), **options)
    return [x[:, 0], weight[:, :, 0], bias]


def grid_conv(activation=None, reverse=False):
    return lambda x, w, b: depthwise_conv2d(x, w, b, activation=activation, reverse=reverse)


def causal_conv(activation=None, reverse=False):
    return lambda x, w, b: causal_conv1d(x, w, b, activation=activation, reverse=reverse)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_definition(backend):
    x, weight, bias = grid_inputs((2, 5, 4, 6), (3, 3))
    image = x.permute(0, 3, 1, 2)
    with use_backend(backend):
        y, turned = depthwise_conv2d(x, weight, bias, activation="silu"), depthwise_conv2d(x, weight, reverse=True)
        expected = F.silu(F.conv2d(image, weight, bias, padding=1, groups=6)).permute(0, 2, 3, 1)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(turned, depthwise_conv2d(x.flip(1, 2), weight).flip(1, 2))
        x, weight, bias = sequence_inputs((2, 9, 6), 4)
        expected = F.conv1d(F.pad(x.mT, (3, 0)), weight, bias, groups=6).mT
        torch.testing.assert_close(causal_conv1d(x, weight, bias), expected)
        flipped = causal_conv1d(x.flip(1), weight, bias).flip(1)
        torch.testing.assert_close(causal_conv1d(x, weight, bias, reverse=True), flipped)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 1, 1, 16), (3, 3)),
        ((2, 1, 9, 5), (3, 3)),
        ((1, 9, 1, 33), (3, 3)),
        ((2, 5, 7, 13), (3, 3)),
        ((1, 16, 15, 40), (7, 7)),
        ((1, 3, 4, 17), (7, 7)),
        ((2, 5, 6, 20), (5, 1)),
        ((1, 5, 6, 3), (1, 9)),
        ((0, 3, 3, 4), (3, 3)),
    ],
)
def test_grid_backends_match_float64(shape, kernel, dtype, backend):
    for activation, reverse in ((None, False), ("silu", False), ("silu", True)):
        inputs = grid_inputs(shape, kernel, dtype=dtype, bias=reverse)
        kernels.assert_matches_float64(grid_conv(activation, reverse), inputs, backend)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel"), [((2, 1, 16), 4), ((1, 33, 19), 4), ((3, 150, 8), 4), ((2, 5, 7), 2)])
def test_causal_backends_match_float64(shape, kernel, dtype, backend):
    for activation, reverse in ((None, True), ("silu", False), ("silu", True)):
        inputs = sequence_inputs(shape, kernel, dtype=dtype, bias=reverse)
        kernels.assert_matches_float64(causal_conv(activation, reverse), inputs, backend)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", kernels.LEVELS)
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = grid_inputs((3, 9, 8, 21), (3, 3), dtype=dtype)
            kernels.assert_matches_float64(grid_conv("silu", reverse=True), inputs, "cpp")
            kernels.assert_matches_float64(causal_conv("silu"), sequence_inputs((1, 400, 21), 4, dtype=dtype), "cpp")


@kernels.needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5, 7, 15])),
    st.booleans(),
)
def test_any_size(shape, kernel, reverse):
    kernels.assert_matches_float64(grid_conv("silu", reverse), grid_inputs(shape, kernel), "cpp", bound=1e-4)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_views_are_read_where_they_lie(backend):
    _, weight, bias = grid_inputs((2, 5, 7, 12), (3, 3))
    wide = torch.randn(2, 5, 7, 24)
    views = [
        wide.chunk(2, dim=-1)[1],
        wide[..., ::2],
        wide.transpose(1, 2)[..., :12],
        wide[:1, :, :, :12].expand(3, -1, -1, -1),
    ]
    with use_backend(backend):
        for view in views:
            dense = depthwise_conv2d(view.contiguous(), weight, bias, activation="silu")
            torch.testing.assert_close(depthwise_conv2d(view, weight, bias, activation="silu"), dense)
    kernels.assert_matches_float64(
        lambda x, w, b: depthwise_conv2d(x.chunk(2, dim=-1)[0], w, b, activation="silu").transpose(1, 2),
        [wide, weight, bias],
        backend,
    )


@pytest.mark.parametrize("backend", kernels.BACKENDS)
def test_types(backend):
    x, weight, bias = grid_inputs((2, 5, 7, 12), (3, 3))
    expected = depthwise_conv2d(x.double(), weight.double(), bias.double(), activation="silu")
    with use_backend(backend):
        for dtype in (torch.bfloat16, torch.float16):
            y = depthwise_conv2d(x.to(dtype), weight, bias, activation="silu")
            assert y.dtype == dtype
            torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = depthwise_conv2d(x.bfloat16().requires_grad_(), weight.requires_grad_(), bias, activation="silu")
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32


@kernels.needs_kernels
@pytest.mark.parametrize(
    ("causal", "silu", "reverse", "bias"), [(False, True, False, True), (True, False, True, False)]
)
def test_torch_accepts_the_operator(causal, silu, reverse, bias):
    x, weight, shift = grid_inputs((2, 1 if causal else 5, 7, 8), (1 if causal else 3, 3), bias=bias)
    inputs = [None if tensor is None else tensor.requires_grad_() for tensor in (x, weight, shift)]
    torch.library.opcheck(torch.ops.linvision.depthwise_conv, (*inputs, causal, silu, reverse))


def test_compile_follows_the_backend():
    inputs = grid_inputs((2, 5, 7, 8), (3, 3))
    torch._dynamo.reset()
    compiled = torch.compile(grid_conv("silu"), fullgraph=True, backend="aot_eager")
    for backend in ("auto", "plain"):
        with use_backend(backend):
            torch.testing.assert_close(compiled(*inputs), grid_conv("silu")(*inputs))
    torch.testing.assert_close(
        kernels.results(compiled, inputs), kernels.results(grid_conv("silu"), inputs), rtol=1e-4, atol=1e-4
    )


def test_export():
    class Conv(torch.nn.Module):
        def forward(self, x, weight, bias):
            return depthwise_conv2d(x, weight, bias, activation="silu")

    inputs, rows = grid_inputs((2, 5, 7, 8), (3, 3)), torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Conv(), tuple(inputs), dynamic_shapes=[{1: rows}, None, None])
    inputs[0] = torch.randn(2, 9, 7, 8)
    torch.testing.assert_close(program.module()(*inputs), grid_conv("silu")(*inputs))


def test_flops_are_those_of_the_convolution():
    def count(device):
        x, weight, bias = (tensor.to(device) for tensor in grid_inputs((2, 5, 7, 8), (3, 3)))
        with FlopCounterMode(display=False) as counter:
            depthwise_conv2d(x, weight, bias)
        return counter.get_total_flops()

    assert count("cpu") == count("meta") == 2 * 2 * 5 * 7 * 8 * 9


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(2, 5, 7, 8), (8, 1, 2, 3), None], {}, "odd sides but are"),
        ([(2, 5, 7, 8), (4, 1, 3, 3), None], {}, "weight must have shape"),
        ([(2, 5, 8), (8, 1, 3, 3), None], {}, r"x must be \(B, rows, columns, C\)"),
        ([(2, 5, 7, 8), (8, 1, 3, 3), (4,)], {}, "bias must have shape"),
        ([(2, 5, 7, 8), (8, 1, 3, 0), None], {}, "at least one channel and tap"),
        ([(2, 5, 7, 8), (8, 1, 3, 3), None], {"activation": "gelu"}, "activation must be 'silu' or None"),
    ],
)
def test_wrong_arguments(shapes, options, message):
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(*tensors, **options)


def test_wrong_types_and_devices():
    x, weight, bias = sequence_inputs((2, 5, 8), 4)
    with pytest.raises(ValueError, match="floating-point type"):
        causal_conv1d(x.long(), weight, bias)
    with pytest.raises(ValueError, match="on one device"):
        causal_conv1d(x, weight.to("meta"), bias)


@kernels.needs_kernels
def test_a_forced_backend_says_why_it_cannot_run():
    x, weight, bias = grid_inputs((1, 3, 3, 4), (17, 1))
    with use_backend("cpp"):
        with pytest.raises(BackendError, match="above 15"):
            depthwise_conv2d(x, weight, bias)
        with pytest.raises(BackendError, match="float64"):
            depthwise_conv2d(x.double(), weight.double(), bias.double())
    expected = depthwise_conv2d(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(depthwise_conv2d(x, weight, bias).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_no_tokens_give_none_and_zero_gradients(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = torch.randn(8, 1, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    with use_backend(backend):
        y = causal_conv1d(x, weight, bias, activation="silu")
        y.sum().backward()
    assert y.shape == shape
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.timeout(50)
@pytest.mark.parametrize("autocast", [False, True])
def test_wide_convolutions_of_bfloat16_do_not_wait_for_ever(autocast):
    x, weight = torch.randn(1, 48, 7), torch.randn(7, 1, 17)
    expected = causal_conv1d(x, weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        y = causal_conv1d(x if autocast else x.bfloat16(), weight)
    assert relative_error(y, expected) < 2e-2
    assert y.dtype == (x if autocast else x.bfloat16()).dtype
