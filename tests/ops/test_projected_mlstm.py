"""The mLSTM with its projections: the fused kernel against the two ops that it stands for, and how torch sees it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from linvision.errors import BackendError
from linvision.ops import BlockDiagonalParameters, GateParameters, use_backend
from linvision.ops.fused import projected_mlstm
from tests.goldens import relative_error
from tests.ops import kernels

BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def random_inputs(batch, tokens, heads, head_dim, *, dtype=torch.float32, bias=True):
    """Return c, x, three weights, three biases, two gate weights and two gate biases, as large as in a model."""
    generator = torch.Generator().manual_seed(tokens * 1000 + heads * head_dim)
    width = heads * head_dim
    shapes = [(batch, tokens, width)] * 2 + [(width // 4, 4, 4)] * 3 + [(width,) if bias else None] * 3
    shapes += [(heads, 3 * width)] * 2 + [(heads,)] * 2
    scales = [1, 1, *[0.5] * 3, *[0.1] * 3, *[(3 * width) ** -0.5] * 2, 1, 1]
    return [
        None if shape is None else (scale * torch.randn(shape, generator=generator)).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def compute(c, x, wq, wk, wv, bq, bk, bv, wi, wf, bi, bf, *, reverse=False):
    projections = (BlockDiagonalParameters(wq, bq), BlockDiagonalParameters(wk, bk), BlockDiagonalParameters(wv, bv))
    return projected_mlstm(c, x, *projections, i=GateParameters(wi, bi), f=GateParameters(wf, bf), reverse=reverse)


def assert_matches_float64(inputs, *, reverse):
    with use_backend("plain"):
        expected = compute(*(None if x is None else x.double() for x in inputs), reverse=reverse)
    with use_backend("cpp"), torch.no_grad():
        h = compute(*inputs, reverse=reverse)
    dtype = inputs[0].dtype
    assert h.dtype == dtype
    assert relative_error(h, expected, expected.norm()) <= BOUND[dtype]


@kernels.needs_kernels
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 1, 1, 4), (1, 13, 3, 8), (3, 33, 4, 12), (2, 70, 4, 96), (1, 300, 1, 20)])
def test_matches_float64(size, dtype, reverse):
    for bias in (True, False):
        assert_matches_float64(random_inputs(*size, dtype=dtype, bias=bias), reverse=reverse)


@kernels.needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("level", kernels.LEVELS)
def test_every_instruction_set_and_thread_number(level, threads):
    with kernels.settings(level, threads):
        for dtype in (torch.float32, torch.bfloat16):
            assert_matches_float64(random_inputs(1, 301, 2, 20, dtype=dtype), reverse=True)


@kernels.needs_kernels
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 80), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_any_size(batch, tokens, heads, blocks, reverse):
    assert_matches_float64(random_inputs(batch, tokens, heads, 4 * blocks), reverse=reverse)


@kernels.needs_kernels
def test_views_are_read_where_they_lie():
    _, _, *parameters = random_inputs(2, 6, 2, 8)
    wide = torch.randn(2, 6, 32)
    with torch.no_grad(), use_backend("cpp"):
        for c, x in (wide.chunk(2, dim=-1), (wide[..., ::2], wide[:1, :, :16].expand(2, -1, -1))):
            expected = compute(c.contiguous(), x.contiguous(), *parameters)
            torch.testing.assert_close(compute(c, x, *parameters), expected)


def test_gradients_and_autocast_take_the_two_ops():
    leaves = [x.requires_grad_() for x in random_inputs(2, 7, 2, 8)]
    compute(*leaves).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        h = compute(leaves[0].bfloat16(), leaves[1].bfloat16(), *leaves[2:])
    assert h.dtype == torch.bfloat16


def test_heads_that_no_kernel_computes():
    inputs = random_inputs(2, 7, 2, 6)  # blocks of 4 channels across heads
    with torch.no_grad():
        with use_backend("plain"):
            expected = compute(*inputs)
        torch.testing.assert_close(compute(*inputs), expected)
        with use_backend("cpp"), pytest.raises(BackendError, match=r"heads of 6 channels|not compiled"):
            compute(*inputs)


@kernels.needs_kernels
def test_torch_accepts_the_operator():
    torch.library.opcheck(torch.ops.linvision.projected_mlstm, (*random_inputs(2, 5, 2, 8), True))


def test_flops_do_not_depend_on_the_backend():
    def count(device):
        inputs = [tensor.to(device) for tensor in random_inputs(2, 5, 2, 8)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            compute(*inputs)
        return counter.get_total_flops()

    assert count("cpu") == count("meta") > 0


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (2, 5, 20), "x must have shape"),
        (9, (2, 12), "f.weight must have shape"),
        (11, (3,), "f.bias must have shape"),
        ((0, 1), (2, 0, 16), "at least one token"),
    ],
)
def test_wrong_shapes(place, shape, message):
    inputs = random_inputs(2, 5, 2, 8)
    for index in place if isinstance(place, tuple) else (place,):
        inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        compute(*inputs)


def test_heads_must_share_the_channels():
    inputs = random_inputs(1, 3, 1, 16)
    inputs[8:] = torch.zeros(3, 48), torch.zeros(3, 48), torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match="3 heads of one width"):
        compute(*inputs)
