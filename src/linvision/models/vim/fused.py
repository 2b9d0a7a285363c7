"""Forms of Vim's layers: fewer passes over memory than the definitions in ``layers``, and the same function.

``in_proj`` is two products, so that x and z are contiguous and z is not computed before it is needed; the scan adds
``dt_proj``'s bias, in float32, and the other branch; half of ``out_proj``'s weights stands for half of the sum. Without
gradients a CPU also joins the gate and the residual sum to the last product, and a stack of layers hands on the sum of
hidden and residual, one tensor instead of two.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linvision.models.forms import halves, linear_parameters, stands_for
from linvision.models.vim.layers import CausalConv, MambaMixer, VimLayer, add_residual, decay
from linvision.ops import LinearParameters, selective_scan
from linvision.ops.autocast import cast_once
from linvision.ops.fused import linear


class _Scanned(NamedTuple):
    """What a branch scans: u (B, S, E), delta without its bias (B, S, E), that bias, B and C (B, S, N)."""

    u: Tensor
    delta: Tensor
    delta_bias: Tensor
    B: Tensor
    C: Tensor


@stands_for(VimLayer, "inference")
@stands_for(VimLayer, "training")
def layer(self: VimLayer, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute a layer, with gradients or without."""
    residual = add_residual(residual, self.drop_path(hidden))
    return mix(self.mixer, self.norm(residual)), residual


@stands_for(VimLayer, "stack")
def layer_of_sums(self: VimLayer, x: Tensor) -> Tensor:
    """Map the sum (B, S, D) of hidden and residual to that of those that follow."""
    return mix(self.mixer, self.norm(x), residual=x)


def mix(self: MambaMixer, tokens: Tensor, residual: Tensor | None = None) -> Tensor:
    """Mix (B, S, dim) over the sequence; a residual sum of that shape and type may follow."""
    x_half, z_half = halves(self.in_proj)
    tokens = cast_once(tokens)
    x, y, last = linear(tokens, x_half), None, (self.A_log, self.D)
    scanned = _project(self, x, self.conv1d, self.x_proj, self.dt_proj)
    if self.directions == "v2":
        # What one branch projects is free again before the other begins.
        y = _scan(scanned, *last, reverse=False)
        scanned = _project(self, x, self.conv1d_b, self.x_proj_b, self.dt_proj_b)
        last = (self.A_b_log, self.D_b)
    elif self.directions == "v1":
        y = _scan(scanned, *last, reverse=False)
        last = (self.A_b_log, self.D)
    del x
    reverse = self.directions != "forward"
    if tokens.device.type != "cpu" or torch.is_grad_enabled():
        y = _scan(scanned, *last, reverse=reverse, residual=y, z=linear(tokens, z_half))
        return _project_out(self, y, gate=None, residual=residual)
    y = _scan(scanned, *last, reverse=reverse, residual=y)
    del scanned  # the gate is not to be alive beside it: the last product applies it
    return _project_out(self, y, gate=linear(tokens, z_half), residual=residual)


def _project(self: MambaMixer, x: Tensor, conv: CausalConv, x_proj: nn.Linear, dt_proj: nn.Linear) -> _Scanned:
    u = conv(x)
    dt, B, C = linear(u, linear_parameters(x_proj)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
    return _Scanned(u, linear(dt, LinearParameters(dt_proj.weight)), dt_proj.bias, B, C)


def _scan(
    scanned: _Scanned,
    A_log: Tensor,
    D: Tensor,
    *,
    reverse: bool,
    residual: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    u, delta, delta_bias, B, C = scanned
    options = {"D": D, "z": z, "residual": residual, "delta_bias": delta_bias}
    return selective_scan(u, delta, decay(A_log), B, C, **options, delta_softplus=True, reverse=reverse)


def _project_out(self: MambaMixer, y: Tensor, *, gate: Tensor | None, residual: Tensor | None) -> Tensor:
    weights = LinearParameters(self.out_proj.weight / 2 if self.halves else self.out_proj.weight, self.out_proj.bias)
    if self.gamma is None:
        return linear(y, weights, gate=gate, residual=residual)
    out = linear(y, weights, gate=gate) * self.gamma
    return out if residual is None else residual + out
