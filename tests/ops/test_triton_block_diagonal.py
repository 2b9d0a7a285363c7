"""The block-diagonal layers' Triton kernels against float64: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

from linvision.ops import use_backend
from linvision.ops.block_diagonal import block_diagonal
from tests.ops import kernels
from tests.ops.triton_kernels import DEVICE, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]


def inputs(batch, num_tokens, num_groups, *, dtype=torch.float32, biased=True):
    generator = torch.Generator().manual_seed(num_tokens + num_groups)
    shapes = ((batch, num_tokens, 4 * num_groups), (num_groups, 4, 4), (4 * num_groups,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return [x, weight, bias if biased else None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "num_tokens", "num_groups"), [(2, 1, 1), (1, 33, 3), (2, 70, 17), (1, 600, 2), (0, 3, 2), (2, 0, 2)]
)
def test_definition(batch, num_tokens, num_groups, dtype):
    for biased in (False, True):
        given = inputs(batch, num_tokens, num_groups, dtype=dtype, biased=biased)
        kernels.assert_matches_float64(block_diagonal, given, "triton")


def test_types_and_views():
    x, weight, bias = inputs(2, 9, 6)
    wide = torch.cat((x, x), 2)
    with use_backend("triton"):
        for view in (wide.chunk(2, dim=2)[1], wide[..., ::2], x.transpose(0, 1), x[:1].expand(3, -1, -1)):
            w, b = weight[: view.shape[2] // 4], bias[: view.shape[2]]
            torch.testing.assert_close(block_diagonal(view, w, b), block_diagonal(view.contiguous(), w, b))
        y = block_diagonal(x.half(), weight, bias.bfloat16())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), block_diagonal(x, weight, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("biased", [False, True])
def test_torch_accepts_the_operator(biased):
    given = [None if t is None else t.requires_grad_() for t in inputs(1, 5, 2, biased=biased)]
    with use_backend("triton"):
        torch.library.opcheck(torch.ops.linvision.block_diagonal, tuple(given))
