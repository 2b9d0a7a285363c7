"""Sums over the threads of a warp, in Triton: against sums in PyTorch."""

import pytest
import torch

from tests.ops.triton_kernels import DEVICE, runs_kernels, triton

pytestmark = runs_kernels
channel_sums = pytest.importorskip("linvision.ops.backends.triton.channel_sums")
tl = triton.language


@triton.jit
def _kernel(a, b, out, ROWS: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    at = tl.arange(0, ROWS)[:, None] * LANES + lane[None, :]
    sums, row, keep = channel_sums.sum_channels(tl.load(a + at), tl.load(b + at), lane)
    tl.atomic_add(out + row, tl.where(keep, sums, 0.0))


@pytest.mark.parametrize("rows", [1, 2, 16, 64])
@pytest.mark.parametrize("lanes", [1, 2, 8, 32, 64])
def test_each_row_is_summed_once(rows, lanes):
    a, b = torch.randn(2, rows, lanes, device=DEVICE)
    out = torch.zeros(2 * rows, device=DEVICE)
    _kernel[(1,)](a, b, out, ROWS=rows, LANES=lanes, num_warps=1)
    torch.testing.assert_close(out, torch.cat((a, b)).sum(1), rtol=1e-5, atol=1e-5)
