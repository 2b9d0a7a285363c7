"""The end of a Vision-LSTM layer (arXiv 2406.04303, figure 2): norm of each head, skip and gate.

    y = (norm(h) * (1 + weight) + bias + skip * c) * SiLU(z),   norm(h) = (h - mean) / sqrt(variance + eps) per head

with the mean and the (biased) variance of a head's D channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.ops.checks import ANY, OPTIONAL, SAME, check, check_axes
from linvision.ops.dispatch import Dispatcher


def gated_head_norm(
    h: Tensor, c: Tensor, z: Tensor | None, *, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    """Normalise heads, add a skip connection and gate (equation above).

    Args:
        h: heads (B, S, H, D).
        c: skip input (B, S, H * D).
        z: pre-activation of the gate (B, S, H * D), or None for no gate; h, c and z of one type and any strides.
        weight: scale less one, (H * D,); the parameters may be of other floating-point types than h.
        bias: shift (H * D,) or None.
        skip: factor of c, (H * D,).
        eps: added to the variance.

    Returns:
        (B, S, H * D) in h's type; kernels compute in float32.

    Raises:
        ValueError: where shapes, types or devices disagree.
    """
    # Without a gate the kernels have no gradient.
    form = IMPLEMENTATIONS.inlined(h, inference_only=z is None)
    if form is not None:
        _check(h, c, z, weight, bias, skip)
        return form(h, c, z, weight, bias, skip, eps)
    return torch.ops.linvision.gated_head_norm(h, c, z, weight, bias, skip, eps)


def _check(h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor) -> None:
    check_axes("gated_head_norm", "h", h, "BSHD", needed="HD")
    batch, num_tokens, num_heads, head_dim = h.shape
    width = num_heads * head_dim
    tokens, channels = (batch, num_tokens, width), (width,)
    check(
        "gated_head_norm",
        "h",
        h,
        ("c", c, "(B, S, H * D)", tokens, SAME),
        ("z", z, "(B, S, H * D)", tokens, SAME | OPTIONAL),
        ("weight", weight, "(H * D,)", channels, ANY),
        ("bias", bias, "(H * D,)", channels, ANY | OPTIONAL),
        ("skip", skip, "(H * D,)", channels, ANY),
    )


def _check_backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor
) -> None:
    _check(h, c, z, weight, bias, skip)
    check("gated_head_norm", "c", c, ("dy", dy, "(B, S, H * D)", c.shape, SAME), ("z", z, "", c.shape, SAME))


def _reference(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    normalised = F.layer_norm(h, h.shape[-1:], eps=eps).flatten(2)
    scale = 1 + weight
    y = normalised * scale if bias is None else torch.addcmul(bias, normalised, scale)
    y = torch.addcmul(y, skip, c)
    return (y if z is None else y * F.silu(z)).to(h.dtype)


IMPLEMENTATIONS = Dispatcher("gated_head_norm", reference=_reference)


# The op as torch sees it: opaque to compile and export, with a meta kernel and a gradient.


@torch.library.custom_op("linvision::gated_head_norm", mutates_args=())
def _gated_head_norm(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    _check(h, c, z, weight, bias, skip)
    with torch.autocast(h.device.type, enabled=False):
        return IMPLEMENTATIONS.choose(h).forward(h, c, z, weight, bias, skip, eps)


@_gated_head_norm.register_fake
def _(h, c, z, weight, bias, skip, eps):
    _check(h, c, z, weight, bias, skip)
    return h.new_empty(c.shape)


@torch.library.custom_op("linvision::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> list[Tensor]:
    """Return the gradients of h, c, z, weight, bias where it is given, and skip."""
    _check_backward(dy, h, c, z, weight, bias, skip)
    return IMPLEMENTATIONS.kernels(h).backward(dy, h, c, z, weight, bias, skip, eps)


@_gated_head_norm_backward.register_fake
def _(dy, h, c, z, weight, bias, skip, eps):
    _check_backward(dy, h, c, z, weight, bias, skip)
    return [x.new_empty(x.shape) for x in (h, c, z, weight, bias, skip) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    tensors = ctx.saved_tensors
    computed = iter(torch.ops.linvision.gated_head_norm_backward(dy, *tensors, ctx.eps))
    return *(None if tensor is None else next(computed) for tensor in tensors), None


_gated_head_norm.register_autograd(_gradient, setup_context=_setup_context)
