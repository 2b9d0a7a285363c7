"""Linear attention against its equation, numeric derivatives, half precision, and bad input."""

import pytest
import torch
from torch import Tensor

from linvision.ops import linear_attention


def inputs(num_tokens: int = 11, *, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v = (scale * torch.randn(2, num_tokens, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    temperature = torch.rand(3, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return [x.to(dtype) for x in (q, k, v, temperature)]


def by_the_equation(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q.relu(), k.relu(), v))
    weights = q @ k.mT
    return (temperature * (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=100)).transpose(1, 2)


@pytest.mark.parametrize("scale", [1.0, 30.0])  # denominators at their floor, and above it
@pytest.mark.parametrize("num_tokens", [1, 11, 64])
def test_equation(num_tokens, scale):
    given = inputs(num_tokens, scale=scale)
    torch.testing.assert_close(linear_attention(*given), by_the_equation(*given))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_against_numeric_derivatives(scale):
    given = [x.requires_grad_() for x in inputs(5, scale=scale)]
    assert torch.autograd.gradcheck(linear_attention, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_tokens_stay_in_float32(dtype):
    q, k, v, temperature = inputs(20000, dtype=dtype, scale=3.0)
    h = linear_attention(q, k, v, temperature)
    assert h.dtype == dtype
    expected = by_the_equation(*(x.double()[:, :64] if x.ndim == 4 else x.double() for x in (q, k, v, temperature)))
    few = linear_attention(*(x[:, :64] if x.ndim == 4 else x for x in (q, k, v, temperature)))
    assert (few.double() - expected).norm() < 0.01 * expected.norm()
    assert h.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_attention(*inputs(70, dtype=torch.float32))
    torch.testing.assert_close(inside, linear_attention(*inputs(70, dtype=torch.float32)), rtol=0, atol=0)


def test_views_of_a_fused_projection():
    fused = torch.randn(2, 7, 3, 3, 4, dtype=torch.float64)
    q, k, v = fused.unbind(2)
    temperature = torch.ones(3, 1, 1, dtype=torch.float64)
    expected = by_the_equation(q.contiguous(), k.contiguous(), v.contiguous(), temperature)
    torch.testing.assert_close(linear_attention(q, k, v, temperature), expected)


def test_inputs_that_disagree_are_named():
    q, k, v, temperature = inputs()
    with pytest.raises(ValueError, match=r"k must have shape \(B, S, H, D\)"):
        linear_attention(q, k[:, :5], v, temperature)
    with pytest.raises(ValueError, match="linear_attention"):
        linear_attention(q, k, v, temperature[:2])
    with pytest.raises(ValueError, match="linear_attention"):
        linear_attention(q[:, :0], k[:, :0], v[:, :0], temperature)
    with pytest.raises(ValueError, match="linear_attention"):
        linear_attention(q, k.float(), v, temperature)
