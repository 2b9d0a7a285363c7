"""Linear layers of tokens together with what stands around them: norm and gate before, residual sum after.

    linear(x) = residual + W (norm(x) * SiLU(gate)) + b
    mlp(x)    = residual + W2 GELU(W1 norm(x) + b1) + b2

Without gradients a CPU computes each in one pass over the tokens, whose intermediate values stay in its caches. With
gradients, under autocast and while a compiler traces they are the plain PyTorch that stands for them here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.autocast import casts
from linvision.ops.checks import ANY, OPTIONAL, SAME, Row, check, check_tensor
from linvision.ops.dispatch import Dispatcher
from linvision.ops.parameters import LayerNormParameters, LinearParameters


def linear(
    x: Tensor,
    layer: LinearParameters,
    *,
    norm: LayerNormParameters | None = None,
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
    form = LINEAR.inlined(x, layer.weight, inference_only=True)
    if form is not None:
        _check_linear(x, layer, norm, gate, residual, alike=not casts(x))
        return form(x, layer, norm, gate, residual)
    return torch.ops.linvision.linear(x, *layer, *given_norm("linear", norm), gate, residual)


def mlp(
    x: Tensor,
    first: LinearParameters,
    second: LinearParameters,
    *,
    norm: LayerNormParameters | None = None,
    residual: Tensor | None = None,
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
    form = MLP.inlined(x, first.weight, second.weight, inference_only=True)
    if form is not None:
        _check_mlp(x, first, second, norm, residual, alike=not casts(x))
        return form(x, first, second, norm, residual)
    return torch.ops.linvision.mlp(x, *first, *second, *given_norm("mlp", norm), residual)


def given_norm(op: str, norm: LayerNormParameters | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Hand a layer norm to an operator, for which one without a weight is none."""
    if norm is None:
        return None, None, 0.0
    if norm.weight is None:
        raise ValueError(f"{op}: a layer norm without a weight; give ones")
    return norm


def taken_norm(weight: Tensor | None, bias: Tensor | None, eps: float) -> LayerNormParameters | None:
    """Return the layer norm that an operator is given, or none."""
    return None if weight is bias is None else LayerNormParameters(weight, bias, eps)  # type: ignore[arg-type]


def _check_linear(
    x: Tensor,
    layer: LinearParameters,
    norm: LayerNormParameters | None,
    gate: Tensor | None,
    residual: Tensor | None,
    *,
    alike: bool = True,
) -> None:
    rows = layer_rows("linear", x, ("layer", layer), norm=norm, alike=alike)
    outputs = (*x.shape[:-1], len(layer.weight))
    gate_row = ("gate", gate, "(..., inputs)", x.shape, _same(gate, alike) | OPTIONAL)
    check(
        "linear",
        "x",
        x,
        *rows,
        gate_row,
        ("residual", residual, "(..., outputs)", outputs, _same(residual, alike) | OPTIONAL),
    )


def _check_mlp(
    x: Tensor,
    first: LinearParameters,
    second: LinearParameters,
    norm: LayerNormParameters | None,
    residual: Tensor | None,
    *,
    alike: bool = True,
) -> None:
    rows = layer_rows("mlp", x, ("first", first), ("second", second), norm=norm, alike=alike)
    outputs = (*x.shape[:-1], len(second.weight))
    check("mlp", "x", x, *rows, ("residual", residual, "(..., outputs)", outputs, _same(residual, alike) | OPTIONAL))


def layer_rows(
    op: str,
    x: Tensor,
    *layers: tuple[str, LinearParameters],
    norm: LayerNormParameters | None = None,
    alike: bool,
) -> list[Row]:
    """List the parameters of a norm and of layers that follow one another, with the shapes that tokens x ask for.

    ``alike`` says whether weights must have the tokens' type; where autocast works, only float64 must, which it leaves.
    """
    check_tensor(op, "x", x)
    width, rows = x.shape[-1] if x.ndim else 0, []
    if norm is not None:
        given_norm(op, norm)
        rows += [
            ("norm.weight", norm.weight, "(C,)", (width,), ANY),
            ("norm.bias", norm.bias, "(C,)", (width,), ANY | OPTIONAL),
        ]
    for name, (weight, bias) in layers:
        check_tensor(op, f"{name}.weight", weight)
        if weight.ndim != 2 or weight.shape[0] == 0 or width == 0:
            raise ValueError(
                f"{op}: {name}.weight must be (outputs, {width}) for {width} channels but is {tuple(weight.shape)}"
            )
        outputs = weight.shape[0]
        rows += [
            (f"{name}.weight", weight, "(outputs, inputs)", (outputs, width), _same(weight, alike)),
            (f"{name}.bias", bias, "(outputs,)", (outputs,), ANY | OPTIONAL),
        ]
        width = outputs
    return rows


def _same(x: Tensor | None, alike: bool) -> int:
    return SAME if alike or (x is not None and x.dtype == torch.float64) else ANY


def normalise(x: Tensor, norm: LayerNormParameters | None) -> Tensor:
    """Apply a layer norm, or none, to the last axis of x in plain PyTorch."""
    if norm is None:
        return x
    weight, bias = (None if each is None else each.to(_parameter_type(x)) for each in norm[:2])
    return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


def project(x: Tensor, layer: LinearParameters) -> Tensor:
    """Apply a linear layer to the last axis of x in plain PyTorch."""
    return F.linear(x, layer.weight, None if layer.bias is None else layer.bias.to(_parameter_type(x)))


def _parameter_type(x: Tensor) -> torch.dtype:
    return torch.float32 if casts(x) else x.dtype


def _linear_reference(
    x: Tensor, layer: LinearParameters, norm: LayerNormParameters | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    x = normalise(x, norm)
    y = project(x if gate is None else x * F.silu(gate), layer)
    return y if residual is None else residual + y


def _mlp_reference(
    x: Tensor,
    first: LinearParameters,
    second: LinearParameters,
    norm: LayerNormParameters | None,
    residual: Tensor | None,
) -> Tensor:
    y = project(F.gelu(project(normalise(x, norm), first)), second)
    return y if residual is None else residual + y


LINEAR = Dispatcher("linear", reference=_linear_reference)
MLP = Dispatcher("mlp", reference=_mlp_reference)


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
    arguments = x, LinearParameters(weight, bias), taken_norm(norm_weight, norm_bias, eps), gate, residual
    _check_linear(*arguments)
    return LINEAR.choose(x, weight).forward(*arguments)


@_linear.register_fake
def _(x, weight, bias, norm_weight, norm_bias, eps, gate, residual):
    _check_linear(x, LinearParameters(weight, bias), taken_norm(norm_weight, norm_bias, eps), gate, residual)
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
    first, second = LinearParameters(first_weight, first_bias), LinearParameters(second_weight, second_bias)
    arguments = x, first, second, taken_norm(norm_weight, norm_bias, eps), residual
    _check_mlp(*arguments)
    return MLP.choose(x, first_weight, second_weight).forward(*arguments)


@_mlp.register_fake
def _(x, first_weight, first_bias, second_weight, second_bias, norm_weight, norm_bias, eps, residual):
    first, second = LinearParameters(first_weight, first_bias), LinearParameters(second_weight, second_bias)
    _check_mlp(x, first, second, taken_norm(norm_weight, norm_bias, eps), residual)
    return x.new_empty(*x.shape[:-1], len(second_weight))


@register_flop_formula(torch.ops.linvision.linear)
def _linear_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]


@register_flop_formula(torch.ops.linvision.mlp)
def _mlp_flops(x_shape, first_shape, first_bias_shape, second_shape, *args, out_shape=None, **kwargs) -> int:
    tokens = torch.Size(x_shape[:-1]).numel()
    return 2 * tokens * (torch.Size(first_shape).numel() + torch.Size(second_shape).numel())
