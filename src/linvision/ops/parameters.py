"""The parameters of layers, as ops take them: plain tensors, whatever module they belong to."""

from typing import NamedTuple

from torch import Tensor


class LinearParameters(NamedTuple):
    """A linear layer: weight (outputs, inputs) and bias (outputs,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class LayerNormParameters(NamedTuple):
    """A layer norm over the last axis: weight (C,), bias (C,) or None, eps."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


class BlockDiagonalParameters(NamedTuple):
    """A block-diagonal projection of 4 G channels."""

    weight: Tensor  # (G, 4, 4)
    bias: Tensor | None  # (4 G,)


class GateParameters(NamedTuple):
    """A gate for each of H heads, of E channels altogether."""

    weight: Tensor  # (H, 3 E), for q, k and v in this order
    bias: Tensor  # (H,)
