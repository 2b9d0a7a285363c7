"""The depthwise convolutions' Triton kernels against float64: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

from linvision.errors import BackendError
from linvision.ops import depthwise_conv2d, use_backend
from tests.ops import kernels
from tests.ops.test_convolution import causal_conv, grid_conv, grid_inputs, sequence_inputs
from tests.ops.triton_kernels import DEVICE, long, runs_kernels

pytestmark = [runs_kernels, pytest.mark.usefixtures("nearest")]


def assert_kernels_agree(function, inputs):
    """Compare with plain PyTorch in float64."""
    on_device = [None if x is None else x.to(DEVICE) for x in inputs]
    kernels.assert_matches_float64(function, on_device, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 1, 1, 16), (3, 3)),
        ((1, 9, 1, 33), (3, 3)),
        ((1, 5, 7, 70), (3, 3)),
        ((1, 3, 4, 5), (5, 7)),
        ((0, 3, 3, 4), (3, 3)),
    ],
)
def test_grids(shape, kernel, dtype):
    for activation, reverse in ((None, False), ("silu", True)):
        assert_kernels_agree(grid_conv(activation, reverse), grid_inputs(shape, kernel, dtype=dtype, bias=reverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel"), [((2, 1, 16), 4), long((1, 300, 6), 4), ((1, 40, 6), 4), ((2, 5, 7), 2)])
def test_sequences(shape, kernel, dtype):
    for activation, reverse in ((None, True), ("silu", False), ("silu", True)):
        assert_kernels_agree(
            causal_conv(activation, reverse), sequence_inputs(shape, kernel, dtype=dtype, bias=reverse)
        )


def test_float16_and_weights_of_another_type():
    x, weight, bias = (None if t is None else t.to(DEVICE) for t in grid_inputs((2, 5, 4, 8), (3, 3)))
    expected = depthwise_conv2d(x.double(), weight.double(), bias.double(), activation="silu")
    with use_backend("triton"):
        y = depthwise_conv2d(x.half(), weight, bias.bfloat16(), activation="silu")
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_views_are_read_where_they_lie():
    wide, weight, bias = grid_inputs((2, 5, 7, 24), (3, 3))
    weight, bias = weight[:12], bias[:12]

    def function(x, w, b):
        views = (x.chunk(2, dim=-1)[1], x[..., ::2], x[:1, ..., :12].expand(2, -1, -1, -1))
        return tuple(depthwise_conv2d(view, w, b, activation="silu").transpose(1, 2) for view in views)

    assert_kernels_agree(function, [wide, weight, bias])


def test_a_kernel_of_too_many_taps_is_refused():
    x, weight, bias = (t.to(DEVICE) for t in grid_inputs((1, 3, 3, 4), (17, 3)))
    with use_backend("triton"), pytest.raises(BackendError, match="51 taps, above 49"):
        depthwise_conv2d(x, weight, bias)
