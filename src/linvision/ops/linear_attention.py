"""Enhanced linear attention, L2ViT's global token mixer: linear in the number of tokens.

Paper: "The Linear Attention Resurrection in Vision Transformer" (L2ViT). Per head, with the rectified queries and keys
q'_t = ReLU(q_t) and k'_t = ReLU(k_t):

    h_t = T (sum_s k'_s v_s^T)^T q'_t / max(q'_t . sum_s k'_s, 100)

The matrix sum_s k'_s v_s^T is (D, D) whatever the number of tokens S is, so time is O(S D^2) and nothing is S x S.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linvision.ops.autocast import without_autocast
from linvision.ops.checks import ANY, SAME, check, check_axes
from linvision.ops.dispatch import has_unknown_sides, is_traceable

MIN_DENOMINATOR = 100.0


def linear_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Mix the tokens of a sequence by rectified linear attention (equation above), every token with every token.

    Sums over tokens are float32 whatever the inputs are (float64 for float64 inputs), autocast included: those of a
    large image leave the range of float16. It is differentiable in all four arguments.

    Args:
        q, k, v: queries, keys and values, (B, S, H, D), of one floating-point type; views such as the three parts of
            a fused projection are fine.
        temperature: scale T of each head, (H, 1, 1).

    Returns:
        h (B, S, H, D) in q's type.

    Raises:
        ValueError: where shapes, types or devices disagree, or a sequence is empty.
    """
    _check(q, k, v, temperature)
    if has_unknown_sides(q) and not torch.is_grad_enabled() and not is_traceable():
        return torch.ops.linvision.linear_attention(q, k, v, temperature)
    # The copies of q and k are rectified where they are, a twentieth of the time, but in the reference form.
    return _linear_attention(q, k, v, temperature, F.relu if is_traceable() else torch.relu_)


def _check(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> None:
    check_axes("linear_attention", "q", q, "BSHD", needed="SHD")
    check(
        "linear_attention",
        "q",
        q,
        ("k", k, "(B, S, H, D)", q.shape, SAME),
        ("v", v, "(B, S, H, D)", q.shape, SAME),
        ("temperature", temperature, "(H, 1, 1)", (q.shape[2], 1, 1), ANY),
    )


@without_autocast
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, rectified: Callable[[Tensor], Tensor]
) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_t, k_t = (rectified(_heads_first(x, dtype)) for x in (q, k))
    memory = temperature.to(dtype) * (k_t.mT @ v.transpose(1, 2).to(dtype))
    # The denominators ride along as one more column of the product: queries are read once.
    sums = q_t @ torch.cat([memory, k_t.sum(2).unsqueeze(-1)], dim=-1)
    h = sums[..., :-1] / sums[..., -1:].clamp(min=MIN_DENOMINATOR)
    return h.to(q.dtype).transpose(1, 2)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy (B, S, H, D) to a dense (B, H, S, D), the layout of batched products, which owns its memory."""
    return x.transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)


# The op for compilers that do not know the number of tokens, in inference: one step for them instead of thirty.


@torch.library.custom_op("linvision::linear_attention", mutates_args=())
def _linear_attention_op(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    _check(q, k, v, temperature)
    return _linear_attention(q, k, v, temperature, torch.relu_).contiguous()


@_linear_attention_op.register_fake
def _(q, k, v, temperature):
    _check(q, k, v, temperature)
    return q.new_empty(q.shape)
