"""The Triton kernels of ViL's gated head norm against float64: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

from linvision.ops import gated_head_norm, use_backend
from tests.ops import kernels
from tests.ops.test_gated_norm import EPS, gated, random_inputs
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]


def inputs(*size, dtype=torch.float32, bias=True):
    return [None if x is None else x.to(DEVICE) for x in random_inputs(*size, dtype=dtype, bias=bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size",
    [
        (2, 1, 1, 4),
        (2, 7, 4, 16),
        (1, 13, 3, 5),
        (1, 60, 2, 96),
        (2, 3, 1, 384),
        (0, 5, 2, 4),
        (1, 0, 2, 4),
        long((1, 530, 2, 96)),
    ],
)
def test_definition(size, dtype):
    for bias in (True, False):
        kernels.assert_matches_float64(gated, inputs(*size, dtype=dtype, bias=bias), "triton")


def test_float16():
    kernels.assert_matches_float64(gated, inputs(2, 9, 3, 24, dtype=torch.float16), "triton", bound=4e-3)


def test_a_large_mean_does_not_swallow_the_variance():
    h, *others = inputs(2, 5, 3, 8)
    kernels.assert_matches_float64(gated, [h + 1000, *others], "triton", bound=1e-3)


def test_tokens_that_fill_no_tile_reach_nothing():
    h, c, z, *parameters = (x.requires_grad_() for x in inputs(1, 5, 2, 4))
    with use_backend("triton"):
        y = gated_head_norm(h, c, z, weight=parameters[0], bias=parameters[1], skip=parameters[2], eps=0.0)
        y.sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no memory with holes")
def test_heads_beyond_32_bits(tmp_path):
    h, *others = inputs(1, 2, 4, 4)
    room = torch.from_file(str(tmp_path / "room"), shared=True, size=3 * 2**30 + 8)
    far = room.as_strided(h.shape, (0, 4, 2**30, 1)).copy_(h)
    with use_backend("triton"):
        results = [kernels.results(gated, [x, *others]) for x in (h, far)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_without_a_gate():
    h, c, _, *parameters = inputs(2, 5, 3, 8)
    with torch.no_grad():
        expected = gated(h, c, None, *parameters)
        with use_backend("triton"):
            torch.testing.assert_close(gated(h, c, None, *parameters), expected)


def test_types_and_views():
    h, c, z, *parameters = inputs(2, 6, 3, 4)
    wide = torch.cat((c, z), 2)
    with use_backend("triton"):
        heads = h.transpose(1, 2).contiguous().transpose(1, 2)
        for first, second in (wide.chunk(2, dim=2), (wide[..., ::2], wide[:1, :, 12:].expand(2, -1, -1))):
            torch.testing.assert_close(
                gated(heads, first, second, *parameters), gated(h, first.contiguous(), second.contiguous(), *parameters)
            )
        leaves = [p.bfloat16().requires_grad_() for p in parameters]
        y = gated(h.half(), c.half(), z.half(), *leaves)
        y.float().sum().backward()
        torch.testing.assert_close(y.float(), gated(h, c, z, *parameters), rtol=3e-2, atol=3e-2)
    assert y.dtype == torch.float16
    assert {p.grad.dtype for p in leaves} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
def test_torch_accepts_the_operator(bias):
    given = [None if x is None else x.requires_grad_() for x in inputs(1, 5, 2, 4, bias=bias)]
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.linvision.gated_head_norm, (*given, EPS))
