"""When ops may read the parameters of standard layers instead of calling the layers, and how."""

from torch import Tensor, nn

from linvision.ops.linear import LayerNorm, Linear, linear

STANDARD = (nn.Linear, nn.LayerNorm, nn.GELU)


def fusible(*layers: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> bool:
    """Say whether these layers, in evaluation mode, do what their parameters say and nothing beside it.

    ``own`` are layer classes of the caller's that may be among them.
    """
    return not any(layer.training for layer in layers) and unchanged(*layers, own=own)


def unchanged(*layers: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> bool:
    """Say whether nobody has hooked one of these layers, or put an adapter or a quantised layer in its place."""
    return not any(
        type(layer) not in (*STANDARD, *own) or layer._forward_hooks or layer._forward_pre_hooks for layer in layers
    )


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call a linear layer, or the op that stands for it."""
    return linear(x, linear_of(layer)) if unchanged(layer) else layer(x)


def linear_of(layer: nn.Linear) -> Linear:
    """Return a layer's parameters."""
    return Linear(layer.weight, layer.bias)


def halves_of(layer: nn.Linear) -> tuple[Linear, Linear]:
    """Return a layer as two, one for each half of its outputs."""
    weights = layer.weight.chunk(2)
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    return Linear(weights[0], biases[0]), Linear(weights[1], biases[1])


def layer_norm_of(layer: nn.LayerNorm) -> LayerNorm:
    """Return a layer's parameters."""
    return LayerNorm(layer.weight, layer.bias, layer.eps)
