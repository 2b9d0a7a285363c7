"""When ops may read the parameters of standard layers instead of calling the layers, and how."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from linvision.ops.fused.linear import linear
from linvision.ops.parameters import LayerNormParameters, LinearParameters

STANDARD = (nn.Linear, nn.LayerNorm, nn.GELU)


def fusible(*layers: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> bool:
    """Say whether an op may stand for these layers: in evaluation mode, and ``unchanged``.

    ``own`` are classes of the caller's that may be among them.
    """
    return not any(layer.training for layer in layers) and unchanged(*layers, own=own)


def unchanged(*layers: nn.Module, own: tuple[type[nn.Module], ...] = ()) -> bool:
    """Say whether these layers do what their parameters say: of a standard class, without hooks or wrapped tensors.

    Adapters, quantised, pruned, parametrised and offloaded layers are not, and must be called.
    """
    return all(type(layer) in (*STANDARD, *own) for layer in layers) and (
        torch.compiler.is_compiling() or not (_has_any_global_hook() or any(map(_is_changed, layers)))
    )


def _is_changed(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in vars(layer)
        or any(type(parameter) not in (nn.Parameter, Tensor) for parameter in layer.parameters(recurse=False))
        or (isinstance(layer, nn.GELU) and layer.approximate != "none")
        or (isinstance(layer, nn.LayerNorm) and layer.weight is None)
    )


def gates_in_products(x: Tensor) -> bool:
    """Say whether the op of the product that ends a layer gates its input as well: then the gate is computed last."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def call_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Call a linear layer, or the op that stands for it."""
    return linear(x, linear_of(layer)) if unchanged(layer) else layer(x)


def linear_of(layer: nn.Linear) -> LinearParameters:
    """Return a layer's parameters."""
    return LinearParameters(layer.weight, layer.bias)


def halves_of(layer: nn.Linear) -> tuple[LinearParameters, LinearParameters]:
    """Return a layer as two, one for each half of its outputs."""
    weights = layer.weight.chunk(2)
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    return LinearParameters(weights[0], biases[0]), LinearParameters(weights[1], biases[1])


def layer_norm_of(layer: nn.LayerNorm) -> LayerNormParameters:
    """Return a layer's parameters."""
    return LayerNormParameters(layer.weight, layer.bias, layer.eps)
