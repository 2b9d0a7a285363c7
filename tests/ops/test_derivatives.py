"""Operators under torch.func, forward-mode derivatives and unknown sizes: right, or refused in our words."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp

from linvision.errors import BackendError
from linvision.ops import depthwise_conv2d, use_backend


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, 4, 8), torch.randn(8, 1, 3, 3)


def test_gradients_by_torch_func_are_those_of_the_kernels():
    x, weight = inputs()
    expected = weight.clone().requires_grad_()
    depthwise_conv2d(x, expected).square().sum().backward()
    actual = grad(lambda weight: depthwise_conv2d(x, weight).square().sum())(weight)
    torch.testing.assert_close(actual, expected.grad)


def test_a_forced_backend_says_what_it_cannot():
    x, weight = inputs()
    with use_backend("cpp"):
        with pytest.raises(BackendError, match=r"'cpp' cannot run under the transforms of torch\.func; use 'auto'"):
            grad(lambda weight: depthwise_conv2d(x, weight).sum())(weight)
        with forward_ad.dual_level(), pytest.raises(BackendError, match="cannot run with forward-mode derivatives"):
            depthwise_conv2d(forward_ad.make_dual(x, x), weight)
    with use_backend("reference"):
        assert jvp(lambda x: depthwise_conv2d(x, weight), (x,), (x,))[1].any()


def test_operators_themselves_refuse_forward_mode():
    x, weight = inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(BackendError, match=r"linvision::depthwise_conv has no forward-mode derivative"):
            torch.ops.linvision.depthwise_conv(dual, weight, None, False, False, False)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (1, 1)])
def test_windows_as_operators(size):
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    to_windows, from_windows = torch.ops.linvision.to_windows, torch.ops.linvision.from_windows
    windows = to_windows(x, 2)
    assert windows.shape == (2 * -(-size[0] // 2) * -(-size[1] // 2), 4, 8)
    torch.testing.assert_close(from_windows(windows, 2, 2, *size), x)
    torch.autograd.gradcheck(lambda x: from_windows(to_windows(x, 2).sin(), 2, 2, *size), (x,), fast_mode=True)
    for operator, arguments in ((to_windows, (x, 2)), (from_windows, (windows.detach(), 2, 2, *size))):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
