"""ViL's mLSTM together with the projections before it.

    h = mlstm(q, k, v, i, f)     with q, k, v, i and f of ``mlstm_inputs``

Without gradients a CPU projects one chunk at a time, where the mLSTM needs it: queries, keys and values, half of what a
ViL layer would keep alive at once, are never written to memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops._dispatch import Dispatcher, Plain
from linvision.ops.backends.cpp import projected_mlstm as cpp_projected_mlstm
from linvision.ops.block_diagonal import (
    BlockDiagonal,
    Gate,
    MLSTMInputs,
    check_mlstm_inputs,
    mlstm_inputs,
    mlstm_inputs_flops,
)
from linvision.ops.mlstm import mlstm, mlstm_flops


def projected_mlstm(
    c: Tensor,
    x: Tensor,
    q: BlockDiagonal,
    k: BlockDiagonal,
    v: BlockDiagonal,
    *,
    i: Gate,
    f: Gate,
    reverse: bool = False,
    form: Callable[..., Any] = mlstm,
) -> Tensor:
    """Project tokens and compute their mLSTM.

    Args:
        c: convolved tokens (B, S, E), the source of queries and keys.
        x: tokens (B, S, E) of c's type, the source of values; both of any strides.
        q, k, v: projections.
        i, f: gates of H heads. All parameters may be of other floating-point types than the tokens.
        reverse: scan from the last token to the first.
        form: another form of the mLSTM, ``mlstm_parallel`` or ``mlstm_recurrent``, to be called with what is projected.

    Returns:
        h (B, S, H, E / H) in c's type.

    Raises:
        ValueError: where shapes, types or devices disagree, or a sequence is empty.
    """
    arguments = (c, x, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, i.weight, f.weight, i.bias, f.bias)
    check_mlstm_inputs(*arguments)
    if c.shape[1] == 0 or c.shape[2] % len(i.bias):
        raise ValueError(
            f"projected_mlstm: needs at least one token and {len(i.bias)} heads of one width but c has shape "
            f"{tuple(c.shape)}"
        )
    if form is not mlstm or BODIES.runs_plain(c, i.bias):
        return _plain(mlstm_inputs(c, x, q, k, v, i=i, f=f), form, reverse)
    return torch.ops.linvision.projected_mlstm(*arguments, reverse)


def _plain(inputs: MLSTMInputs, form: Callable[..., Any], reverse: bool) -> Tensor:
    *tokens, i, f = inputs
    return form(*(x.unflatten(-1, (i.shape[-1], -1)) for x in tokens), i, f, reverse=reverse)


BODIES = Dispatcher("projected_mlstm", {"cpp": cpp_projected_mlstm, "plain": Plain(_plain)}, inference_only=True)


# The op as torch sees it: opaque, with a meta kernel and counted operations.


@torch.library.custom_op("linvision::projected_mlstm", mutates_args=())
def _projected_mlstm(
    c: Tensor,
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    i_weight: Tensor,
    f_weight: Tensor,
    i_bias: Tensor,
    f_bias: Tensor,
    reverse: bool,
) -> Tensor:
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    return cpp_projected_mlstm.forward(c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias), reverse=reverse)


@_projected_mlstm.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight, i_bias, f_bias, reverse):
    return c.new_empty(*c.shape[:2], len(i_bias), c.shape[2] // len(i_bias))


@register_flop_formula(torch.ops.linvision.projected_mlstm)
def _flops(
    c_shape, x_shape, q_shape, k_shape, v_shape, q_bias, k_bias, v_bias, i_shape, *args, out_shape=None, **options
) -> int:
    batch, tokens, width = c_shape
    heads = i_shape[0]
    inputs = mlstm_inputs_flops(c_shape, x_shape, q_shape, k_shape, v_shape, q_bias, k_bias, v_bias, i_shape)
    return inputs + mlstm_flops((batch, tokens, heads, width // heads))
