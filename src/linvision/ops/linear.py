"""Linear layers of tokens together with what stands around them: norm and gate before, residual sum after.

    linear(x) = residual + W (norm(x) * SiLU(gate)) + b
    mlp(x)    = residual + W2 GELU(W1 norm(x) + b1) + b2

Without gradients a CPU computes each in one pass over the tokens, whose intermediate values stay in its caches. With
gradients, under autocast and while a compiler traces they are the plain PyTorch that stands for them here.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops._dispatch import Dispatcher, Plain, autocasts
from linvision.ops.backends.cpp import linear as cpp_linear


class Linear(NamedTuple):
    """Parameters of a linear layer: weight (outputs, inputs) and bias (outputs,) or None."""

    weight: Tensor
    bias: Tensor | None = None


class LayerNorm(NamedTuple):
    """Parameters of a layer norm over the last axis: weight (C,), bias (C,) or None, eps."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


def linear(
    x: Tensor,
    layer: Linear,
    *,
    norm: LayerNorm | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Map the last axis of x by a linear layer (first equation above).

    Args:
        x: tokens (..., inputs), of the weights' type but under autocast.
        layer: the linear layer.
        norm: a layer norm of x before it.
        gate: (..., inputs), whose SiLU x is multiplied by, after the norm.
        residual: (..., outputs), added to the result.

    Returns:
        (..., outputs) in x's type, under autocast in its own; kernels sum in float32.

    Raises:
        ValueError: where shapes, types or devices disagree.
    """
    check_layers("linear", x, [layer], norm)
    check_tokens("linear", "gate", gate, x, x.shape[-1])
    check_tokens("linear", "residual", residual, x, len(layer.weight))
    if LINEAR.runs_plain(x, layer.weight):
        return _plain_linear(x, layer, norm, gate, residual)
    return torch.ops.linvision.linear(x, *layer, *(norm or (None, None, 0.0)), gate, residual)


def mlp(
    x: Tensor, first: Linear, second: Linear, *, norm: LayerNorm | None = None, residual: Tensor | None = None
) -> Tensor:
    """Map the last axis of x by two linear layers with a GELU between them (second equation above).

    Args:
        x: tokens (..., inputs), of the weights' type but under autocast.
        first: the hidden layer.
        second: the output layer.
        norm: a layer norm of x before them.
        residual: (..., outputs), added to the result.

    Returns:
        (..., outputs) in x's type, under autocast in its own; kernels sum in float32.

    Raises:
        ValueError: where shapes, types or devices disagree.
    """
    check_layers("mlp", x, [first, second], norm)
    check_tokens("mlp", "residual", residual, x, len(second.weight))
    if MLP.runs_plain(x, first.weight, second.weight):
        return _plain_mlp(x, first, second, norm, residual)
    return torch.ops.linvision.mlp(x, *first, *second, *(norm or (None, None, 0.0)), residual)


def check_layers(op: str, x: Tensor, layers: list[Linear], norm: LayerNorm | None) -> None:
    """Raise ValueError unless the layers fit one another, the norm and the tokens x."""
    width = x.shape[-1] if x.ndim else 0
    shapes: list[tuple[Tensor | None, tuple[int, ...]]] = []
    if norm is not None:
        if norm.weight is None:
            raise ValueError(f"{op}: a layer norm without a weight; give ones")
        shapes += [(norm.weight, (width,)), (norm.bias, (width,))]
    for weight, bias in layers:
        if weight.ndim != 2 or min(weight.shape) == 0 or weight.shape[1] != width:
            raise ValueError(
                f"{op}: weight must be (outputs, {width}) for {width} channels but is {tuple(weight.shape)}"
            )
        width = weight.shape[0]
        shapes.append((bias, (width,)))
        if weight.dtype != x.dtype and not autocasts(x):
            raise ValueError(f"{op}: x and weights must have one type but are {x.dtype} and {weight.dtype}")
    for tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{op}: a parameter must have shape {shape} but has {tuple(tensor.shape)}")
    others = [tensor for tensor, _ in shapes if tensor is not None] + [layer.weight for layer in layers]
    for tensor in others:
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(
                f"{op}: parameters must be floating-point and on x's device, {x.device}, but one is {tensor.dtype} on "
                f"{tensor.device}"
            )


def check_tokens(op: str, name: str, tensor: Tensor | None, x: Tensor, width: int) -> None:
    """Raise ValueError unless a tensor, if there is one, has the tokens of x with so many channels."""
    expected = (*x.shape[:-1], width)
    if tensor is None:
        return
    if tensor.shape != expected or tensor.device != x.device or (tensor.dtype != x.dtype and not autocasts(x)):
        raise ValueError(
            f"{op}: {name} must have shape {expected}, {x.dtype} on {x.device}, but has {tuple(tensor.shape)}, "
            f"{tensor.dtype} on {tensor.device}"
        )


def normalise(x: Tensor, norm: LayerNorm | None) -> Tensor:
    """Apply a layer norm, or none, to the last axis of x in plain PyTorch."""
    if norm is None:
        return x
    return F.layer_norm(x, x.shape[-1:], _typed(norm.weight, x), _typed(norm.bias, x), norm.eps)


def project(x: Tensor, layer: Linear) -> Tensor:
    """Apply a linear layer to the last axis of x in plain PyTorch."""
    return F.linear(x, layer.weight, _typed(layer.bias, x))


def cast_once(x: Tensor) -> Tensor:
    """Cast x as autocast does for a matrix product, so that several products of x share, and keep, one copy."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) and x.dtype != torch.float64 else x


def _typed(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return parameter if parameter is None or autocasts(x) else parameter.to(x.dtype)


def _plain_linear(
    x: Tensor, layer: Linear, norm: LayerNorm | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    x = normalise(x, norm)
    y = project(x if gate is None else x * F.silu(gate), layer)
    return y if residual is None else residual + y


def _plain_mlp(x: Tensor, first: Linear, second: Linear, norm: LayerNorm | None, residual: Tensor | None) -> Tensor:
    y = project(F.gelu(project(normalise(x, norm), first)), second)
    return y if residual is None else residual + y


LINEAR = Dispatcher("linear", {"cpp": cpp_linear, "plain": Plain(_plain_linear)}, inference_only=True)
MLP = Dispatcher("mlp", {"cpp": cpp_linear, "plain": Plain(_plain_mlp)}, inference_only=True)


# The ops as torch sees them: opaque, with meta kernels and counted operations.


@torch.library.custom_op("linvision::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    norm = None if norm_weight is None else LayerNorm(norm_weight, norm_bias, eps)
    return cpp_linear.linear(x, Linear(weight, bias), norm, gate, residual)


@_linear.register_fake
def _(x, weight, bias, norm_weight, norm_bias, eps, gate, residual):
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("linvision::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor | None,
    second_weight: Tensor,
    second_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    norm = None if norm_weight is None else LayerNorm(norm_weight, norm_bias, eps)
    return cpp_linear.mlp(x, Linear(first_weight, first_bias), Linear(second_weight, second_bias), norm, residual)


@_mlp.register_fake
def _(x, first_weight, first_bias, second_weight, second_bias, norm_weight, norm_bias, eps, residual):
    return x.new_empty(*x.shape[:-1], len(second_weight))


@register_flop_formula(torch.ops.linvision.linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(torch.ops.linvision.mlp)
def _mlp_flops(x_shape, first_shape, first_bias_shape, second_shape, *args, out_shape=None, **kwargs) -> int:
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * (torch.Size(first_shape).numel() + torch.Size(second_shape).numel())
