"""What every implementation of the selective scan is given, and where all of them keep states for the backward pass."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def interval(num_states: int) -> int:
    """Count the tokens between kept states, such that these are together no more than (B, S, E)."""
    return max(16, 16 * math.ceil(num_states / 16))


@dataclass(frozen=True)
class Inputs:
    """What a scan reads; shapes as in ``linvision.ops.selective_scan``, but A is (N, E), contiguous."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    reverse: bool
    residual: Tensor | None = None

    @property
    def state_dtype(self) -> torch.dtype:
        """The type of states, decays and sums."""
        return self.A.dtype
