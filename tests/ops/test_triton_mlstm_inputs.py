"""The Triton kernels of ViL's mLSTM inputs against float64: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

from linvision.ops import use_backend
from tests.ops import kernels
from tests.ops.test_mlstm_inputs import project, random_inputs
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]


def inputs(*size, dtype=torch.float32, bias=True):
    return [None if x is None else x.to(DEVICE) for x in random_inputs(*size, dtype=dtype, bias=bias)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size",
    [(2, 1, 4, 1), (1, 13, 20, 3), (1, 70, 48, 4), long((1, 1100, 12, 2)), (1, 5, 64, 8), (0, 5, 8, 2), (2, 0, 8, 2)],
)
def test_definition(size, dtype):
    for bias in (True, False):
        kernels.assert_matches_float64(project, inputs(*size, dtype=dtype, bias=bias), "triton")


def test_float16():
    given = inputs(2, 9, 24, 2, dtype=torch.float16)
    kernels.assert_matches_float64(project, given, "triton", bound=4e-3)


def test_a_projection_may_have_no_bias_where_others_have_one():
    given = inputs(1, 6, 12, 2)
    for place in (5, 6, 7):
        kernels.assert_matches_float64(project, [None if n == place else x for n, x in enumerate(given)], "triton")


def test_types_and_views():
    c, x, *parameters = inputs(2, 6, 12, 2)
    wide = torch.cat((c, x), 2)
    with use_backend("triton"):
        for first, second in (wide.chunk(2, dim=2), (wide[..., ::2], wide[:1, :, :12].expand(2, -1, -1))):
            torch.testing.assert_close(
                project(first, second, *parameters), project(first.contiguous(), second.contiguous(), *parameters)
            )
        outputs = project(c.half(), x.half(), *(p.bfloat16() for p in parameters))
        assert [y.dtype for y in outputs] == [torch.float16] * 3 + [torch.float32] * 2
        torch.testing.assert_close([y.float() for y in outputs], list(project(c, x, *parameters)), rtol=3e-2, atol=1e-1)
        leaves = [p.bfloat16().requires_grad_() for p in parameters]
        sum(y.float().sum() for y in project(c.half(), x.half(), *leaves)).backward()
    assert {p.grad.dtype for p in leaves} == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
def test_torch_accepts_the_operator(bias):
    given = [None if x is None else x.requires_grad_() for x in inputs(1, 5, 4, 1, bias=bias)]
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.linvision.mlstm_inputs, tuple(given))


def test_more_heads_than_a_tile_has_columns():
    given = inputs(1, 2, 36, 9)
    with use_backend("plain"):
        expected = project(*given)
    torch.testing.assert_close(project(*given), expected, rtol=1e-3, atol=1e-3)
    with use_backend("triton"), pytest.raises(RuntimeError, match="9 heads, above 8"):
        project(*given)
