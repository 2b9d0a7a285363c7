"""ViL's mLSTM together with the projections before it.

    h = mlstm(q, k, v, i, f)     with q, k, v, i and f of ``mlstm_inputs``

Without gradients a CPU projects one chunk at a time, where the mLSTM needs it: queries, keys and values, half of what a
ViL layer would keep alive at once, are never written to memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.dispatch import Dispatcher
from linvision.ops.mlstm import mlstm, mlstm_flops
from linvision.ops.mlstm_inputs import check_mlstm_inputs, mlstm_inputs, mlstm_inputs_flops
from linvision.ops.parameters import BlockDiagonalParameters, GateParameters


def projected_mlstm(
    c: Tensor,
    x: Tensor,
    q: BlockDiagonalParameters,
    k: BlockDiagonalParameters,
    v: BlockDiagonalParameters,
    *,
    i: GateParameters,
    f: GateParameters,
    reverse: bool = False,
) -> Tensor:
    """Project tokens and compute their mLSTM.

    Args:
        c: convolved tokens (B, S, E), the source of queries and keys.
        x: tokens (B, S, E) of c's type, the source of values; both of any strides.
        q, k, v: projections.
        i, f: gates of H heads. All parameters may be of other floating-point types than the tokens.
        reverse: scan from the last token to the first.

    Returns:
        h (B, S, H, E / H) in c's type.

    Raises:
        ValueError: where shapes, types or devices disagree, or a sequence is empty.
    """
    weights, biases = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)
    form = IMPLEMENTATIONS.inlined(c, i.bias, inference_only=True)
    if form is not None:
        tensors = (c, x, weights, biases, (i.weight, f.weight), (i.bias, f.bias))
        _check(*tensors)
        return form(*tensors, reverse=reverse)
    gates = (i.weight, f.weight, i.bias, f.bias)
    return torch.ops.linvision.projected_mlstm(c, x, *weights, *biases, *gates, reverse)


def _check(c: Tensor, *others: Any) -> None:
    check_mlstm_inputs(c, *others)
    num_heads = len(others[-1][0])
    if c.shape[1] == 0 or c.shape[2] % num_heads:
        raise ValueError(
            f"projected_mlstm: needs at least one token and {num_heads} heads of one width but c has shape "
            f"{tuple(c.shape)}"
        )


def _reference(
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
    *,
    reverse: bool,
) -> Tensor:
    """Call the two ops, each in the form that is asked of it."""
    projections = [BlockDiagonalParameters(*parameters) for parameters in zip(weights, biases, strict=True)]
    i, f = (GateParameters(*parameters) for parameters in zip(gate_weights, gate_biases, strict=True))
    *tokens, input_gate, forget_gate = mlstm_inputs(c, x, *projections, i=i, f=f)
    q, k, v = (each.unflatten(-1, (input_gate.shape[-1], -1)) for each in tokens)
    return mlstm(q, k, v, input_gate, forget_gate, reverse=reverse)


IMPLEMENTATIONS = Dispatcher("projected_mlstm", reference=_reference, parallel=_reference, sequential=_reference)


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
    tensors = (c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias))
    _check(*tensors)
    return IMPLEMENTATIONS.choose(c, i_bias).forward(*tensors, reverse=reverse)


@_projected_mlstm.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight, i_bias, f_bias, reverse):
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    _check(c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias))
    return c.new_empty(*c.shape[:2], len(i_bias), c.shape[2] // len(i_bias))


@register_flop_formula(torch.ops.linvision.projected_mlstm)
def _flops(
    c_shape, x_shape, q_shape, k_shape, v_shape, q_bias, k_bias, v_bias, i_shape, *args, out_shape=None, **options
) -> int:
    batch, tokens, width = c_shape
    heads = i_shape[0]
    inputs = mlstm_inputs_flops(c_shape, x_shape, q_shape, k_shape, v_shape, q_bias, k_bias, v_bias, i_shape)
    return inputs + mlstm_flops((batch, tokens, heads, width // heads))
