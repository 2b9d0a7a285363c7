"""The end of a Vision-LSTM layer (arXiv 2406.04303, figure 2): norm of each head, skip and gate.

    y = (norm(h) * (1 + weight) + bias + skip * c) * SiLU(z),   norm(h) = (h - mean) / sqrt(variance + eps) per head

with the mean and the (biased) variance of a head's D channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.ops._dispatch import Dispatcher, Plain
from linvision.ops.backends.cpp import gated_norm as cpp_gated_norm
from linvision.ops.backends.triton import gated_norm as triton_gated_norm


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
    _check(h, c, z, weight, bias, skip)
    if (UNGATED if z is None else BODIES).runs_plain(h):
        return _plain(h, c, z, weight, bias, skip, eps)
    return torch.ops.linvision.gated_head_norm(h, c, z, weight, bias, skip, eps)


def _check(h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor) -> None:
    if h.ndim != 4 or min(h.shape[2:]) == 0:
        raise ValueError(
            f"gated_head_norm: h must be (B, S, H, D) with at least one head and channel but has shape {tuple(h.shape)}"
        )
    batch, num_tokens, num_heads, head_dim = h.shape
    tokens, channels = (batch, num_tokens, num_heads * head_dim), (num_heads * head_dim,)
    given = {"c": c, "z": z, "weight": weight, "bias": bias, "skip": skip}
    for name, tensor in given.items():
        if tensor is None:
            continue
        needed = tokens if name in ("c", "z") else channels
        if tensor.shape != needed:
            raise ValueError(
                f"gated_head_norm: {name} must have shape {needed} for h of {tuple(h.shape)} but has "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != h.device:
            raise ValueError(f"gated_head_norm: {name} is on {tensor.device} but h on {h.device}")
        if not tensor.is_floating_point() or (name in ("c", "z") and tensor.dtype != h.dtype):
            raise ValueError(
                "gated_head_norm: h, c and z must have one floating-point type, the others any, but "
                f"{name} is {tensor.dtype} and h {h.dtype}"
            )
    if not h.is_floating_point():
        raise ValueError(f"gated_head_norm: h must be of a floating-point type but is {h.dtype}")


def _plain(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    normalised = F.layer_norm(h, h.shape[-1:], eps=eps).flatten(2)
    scale = 1 + weight
    y = normalised * scale if bias is None else torch.addcmul(bias, normalised, scale)
    y = torch.addcmul(y, skip, c)
    return (y if z is None else y * F.silu(z)).to(h.dtype)


BODIES = Dispatcher("gated_head_norm", {"triton": triton_gated_norm, "cpp": cpp_gated_norm, "plain": Plain(_plain)})
UNGATED = Dispatcher("gated_head_norm without a gate", BODIES.bodies, inference_only=True)


# The op as torch sees it: opaque to compile and export, with a meta kernel and a gradient.


@torch.library.custom_op("linvision::gated_head_norm", mutates_args=())
def _gated_head_norm(
    h: Tensor, c: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> Tensor:
    with torch.autocast(h.device.type, enabled=False):
        return BODIES.choose(h).forward(h, c, z, weight, bias, skip, eps)


@_gated_head_norm.register_fake
def _(h, c, z, weight, bias, skip, eps):
    return h.new_empty(c.shape)


@torch.library.custom_op("linvision::gated_head_norm_backward", mutates_args=())
def _gated_head_norm_backward(
    dy: Tensor, h: Tensor, c: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor, eps: float
) -> list[Tensor]:
    """Return the gradients of h, c, z, weight, bias where it is given, and skip."""
    return BODIES.kernels(h).backward(dy, h, c, z, weight, bias, skip, eps)


@_gated_head_norm_backward.register_fake
def _(dy, h, c, z, weight, bias, skip, eps):
    return [x.new_empty(x.shape) for x in (h, c, z, weight, bias, skip) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):
    tensors = ctx.saved_tensors
    computed = iter(torch.ops.linvision.gated_head_norm_backward(dy, *tensors, ctx.eps))
    return *(None if tensor is None else next(computed) for tensor in tensors), None


_gated_head_norm.register_autograd(_gradient, setup_context=_setup_context)
