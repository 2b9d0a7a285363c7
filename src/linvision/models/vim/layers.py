"""The layers of Vim (Vision Mamba, arXiv 2401.09417), with the published parameter keys.

A layer carries two tensors (B, S, D): what the last layer put out (*hidden*) and the sum of all that came before it
(*residual*, float32 at least). Nothing is ever flipped: what runs from the end scans in reverse and convolves with the
kernel turned round.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from linvision.ops import causal_conv1d, selective_scan

Directions = Literal["v2", "v1", "forward", "backward"]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # of a scan: u, delta, B, C
KERNEL_SIZE = 4
EXPAND = 2

for _name in ("add_residual", "causal_conv1d", "decay", "selective_scan"):
    torch.fx.wrap(_name)  # torch.fx cannot look into them


class RMSNorm(nn.RMSNorm):
    """RMSNorm of a residual that may be of a wider type than the weights; the result has the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., dim)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm of a residual that may be of a wider type than the weights; the result has the weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., dim)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class CausalConv(nn.Conv1d):
    """Depthwise convolution that sees the tokens before, with ``reverse`` those after, and SiLU."""

    def __init__(self, dim: int, *, reverse: bool) -> None:
        super().__init__(dim, dim, KERNEL_SIZE, groups=dim)
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, S, dim)."""
        return causal_conv1d(x, self.weight, self.bias, activation="silu", reverse=self.reverse)


class MambaMixer(nn.Module):
    """Gated selective scan of inner width E = 2 dim, one-way or both ways (arXiv 2401.09417, algorithm 1).

    With x, z = in_proj(tokens), a branch is u = SiLU(conv(x)); dt, B, C = x_proj(u); delta = softplus(dt_proj(dt));
    y = selective_scan(u, delta, -exp(A_log), B, C, D); and the result is out_proj of the branches' sum * SiLU(z).

    Args:
        dim: token width D.
        d_state: states per channel, N.
        directions: "v2": two branches with their own parameters (``*_b`` those of the backward one); "v1": one set of
            parameters, scanned both ways with two A; "forward" or "backward": one branch.
        halve: divide the sum of the two branches of "v2" by 2.
        layer_scale: initial value of a factor per channel on the result; None for no such factor.
    """

    in_proj: nn.Linear
    conv1d: CausalConv
    x_proj: nn.Linear
    dt_proj: nn.Linear
    conv1d_b: CausalConv
    x_proj_b: nn.Linear
    dt_proj_b: nn.Linear
    out_proj: nn.Linear

    def __init__(
        self, dim: int, *, d_state: int, directions: Directions, halve: bool, layer_scale: float | None
    ) -> None:
        super().__init__()
        inner = EXPAND * dim
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.directions, self.halve = directions, halve
        projected = self.dt_rank + 2 * d_state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, reverse=directions == "backward")
        self.x_proj = nn.Linear(inner, projected, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        if directions in ("v1", "v2"):
            self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        if directions == "v2":
            self.conv1d_b = CausalConv(inner, reverse=True)
            self.x_proj_b = nn.Linear(inner, projected, bias=False)
            self.dt_proj_b = nn.Linear(self.dt_rank, inner)
            self.D_b = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix (B, S, dim) over the sequence."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        inputs = self._project(x, self.conv1d, self.x_proj, self.dt_proj)
        y = self._scan(inputs, self.A_log, self.D, z, reverse=self.directions == "backward")
        if self.directions == "v1":
            y = y + self._scan(inputs, self.A_b_log, self.D, z, reverse=True)
        elif self.directions == "v2":
            inputs = self._project(x, self.conv1d_b, self.x_proj_b, self.dt_proj_b)
            y = y + self._scan(inputs, self.A_b_log, self.D_b, z, reverse=True)
        out = self.out_proj(y / 2 if self.halves else y)
        return out if self.gamma is None else out * self.gamma

    def _project(self, x: Tensor, conv: CausalConv, x_proj: nn.Linear, dt_proj: nn.Linear) -> Inputs:
        u = conv(x)
        dt, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return u, dt_proj(dt), B, C

    @staticmethod
    def _scan(inputs: Inputs, A_log: Tensor, D: Tensor, z: Tensor, *, reverse: bool) -> Tensor:
        u, delta, B, C = inputs
        return selective_scan(u, delta, decay(A_log), B, C, D=D, z=z, delta_softplus=True, reverse=reverse)

    @property
    def halves(self) -> bool:
        """Whether the sum of the branches is divided by 2."""
        return self.halve and self.directions == "v2"

    @torch.no_grad()
    def initialise(self, *, depth: int) -> None:
        """Initialise as the table in ``VisionMamba`` says; ``depth`` is the model's number of layers."""
        for name, parameter in self.named_parameters():
            if name in ("dt_proj.weight", "dt_proj_b.weight"):
                nn.init.uniform_(parameter, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            elif name in ("dt_proj.bias", "dt_proj_b.bias"):
                step = torch.empty_like(parameter).uniform_(math.log(0.001), math.log(0.1)).exp_().clamp_(min=1e-4)
                parameter.copy_(step + torch.log(-torch.expm1(-step)))
            elif name in ("A_log", "A_b_log"):
                parameter.copy_(torch.arange(1, self.d_state + 1).log().expand_as(parameter))
            elif name in ("D", "D_b"):
                nn.init.ones_(parameter)
        self.out_proj.weight /= math.sqrt(depth)


class VimLayer(nn.Module):
    """Residual layer: residual = residual + drop_path(hidden); hidden = mixer(norm(residual))."""

    norm: RMSNorm | LayerNorm
    mixer: MambaMixer
    drop_path: DropPath

    def __init__(self, *, mixer: MambaMixer, norm: RMSNorm | LayerNorm, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map (B, S, D) hidden and residual, which is None before the first layer."""
        residual = add_residual(residual, self.drop_path(hidden))
        return self.mixer(self.norm(residual)), residual


def decay(A_log: Tensor) -> Tensor:
    """Return A = -exp(A_log), in float32 or wider."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def add_residual(residual: Tensor | None, hidden: Tensor) -> Tensor:
    """Return residual + hidden in float32, or wider where hidden is."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide if residual is None else residual + wide


class RotaryEmbedding(nn.Module):
    """Rotation of channel pairs by angles that grow along rows (first half of the channels) and columns (second half).

    x * cos + rot(x) * sin with rot(x)[2i] = -x[2i + 1], rot(x)[2i + 1] = x[2i]. With F = dim / 2 and frequencies
    w_j = 10000^(-2j / F), the token in row t of T has angles t / T * reference * w_j, each for two channels in a row;
    columns likewise. So another grid means other tables, which are computed where they are needed.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], *, reference: int) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"rotary embedding: the width must be a multiple of 4 but is {dim}")
        self.dim, self.reference = dim, reference
        self.set_grid(grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make the tables for a grid (rows, columns)."""
        self.grid = grid
        freqs_cos, freqs_sin = self._tables(grid, getattr(self, "freqs_cos", None))
        self.register_buffer("freqs_cos", freqs_cos)
        self.register_buffer("freqs_sin", freqs_sin)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Rotate the last rows * columns tokens of (B, S, dim); a class token before them stays as it is."""
        tables = (self.freqs_cos, self.freqs_sin) if grid == self.grid else self._tables(grid, self.freqs_cos)
        cos, sin = (table.to(x.dtype) for table in tables)
        first, patches = x.split([x.shape[1] - len(cos), len(cos)], dim=1)
        rotated = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([first, patches * cos + rotated * sin], dim=1)

    def _tables(self, grid: tuple[int, int], like: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute the tables (rows * columns, dim) in float64 on the CPU, for the device and type of a tensor."""
        half = self.dim // 2
        exponents = torch.arange(0, half, 2, device="cpu", dtype=torch.float64) / half
        frequencies = (10000**-exponents).repeat_interleave(2)
        rows, columns = (
            (torch.arange(side, device="cpu", dtype=torch.float64) / side * self.reference)[:, None] * frequencies
            for side in grid
        )
        angles = torch.cat([rows[:, None].expand(*grid, half), columns[None].expand(*grid, half)], dim=-1)
        device = torch.get_default_device() if like is None else like.device
        dtype = torch.get_default_dtype() if like is None else like.dtype
        cos, sin = (table.flatten(0, 1).to(device, dtype) for table in (angles.cos(), angles.sin()))
        return cos, sin
