"""What ViL's mLSTM is fed: queries, keys and values by block-diagonal projections, and its gates.

Vision-LSTM (arXiv 2406.04303; the projections are those of xLSTM, arXiv 2405.04517, figure 11) takes queries and keys
from the convolved tokens c, values from the tokens x, and the gates' pre-activations from all three:

    q, k, v = P_q c, P_k c, P_v x        i = W_i [q, k, v] + b_i        f = W_f [q, k, v] + b_f

with the projections P of ``linvision.ops.block_diagonal``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.block_diagonal import BLOCK_SIZE, project_blocks
from linvision.ops.checks import ANY, OPTIONAL, SAME, check, check_axes
from linvision.ops.dispatch import Dispatcher
from linvision.ops.parameters import BlockDiagonalParameters, GateParameters

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class MLSTMInputs(NamedTuple):
    """What an mLSTM layer is fed."""

    q: Tensor  # (B, S, E)
    k: Tensor
    v: Tensor
    i: Tensor  # (B, S, H)
    f: Tensor


def mlstm_inputs(
    c: Tensor,
    x: Tensor,
    q: BlockDiagonalParameters,
    k: BlockDiagonalParameters,
    v: BlockDiagonalParameters,
    *,
    i: GateParameters,
    f: GateParameters,
) -> MLSTMInputs:
    """Project tokens to the queries, keys, values and gates of an mLSTM (equations above).

    Args:
        c: convolved tokens (B, S, E), the source of q and k.
        x: tokens (B, S, E) of c's type, the source of v; both of any strides.
        q, k, v: projections.
        i, f: gates. All parameters may be of other floating-point types than the tokens.

    Returns:
        q, k, v (B, S, E) in c's type and i, f (B, S, H), which are float32 at least.

    Raises:
        ValueError: where shapes, types or devices disagree.
    """
    weights, biases = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)
    form = IMPLEMENTATIONS.inlined(c, i.bias)
    if form is not None:
        tensors = (c, x, weights, biases, (i.weight, f.weight), (i.bias, f.bias))
        check_mlstm_inputs(*tensors)
        return MLSTMInputs(*form(*tensors))
    return MLSTMInputs(*torch.ops.linvision.mlstm_inputs(c, x, *weights, *biases, i.weight, f.weight, i.bias, f.bias))


def check_mlstm_inputs(
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
) -> None:
    """Raise ValueError unless c and x are tokens that the parameters fit."""
    check_axes("mlstm_inputs", "c", c, "BSE", needed="E")
    check_axes("mlstm_inputs", "i.bias", gate_biases[0], "H", needed="H")
    width, num_heads = c.shape[2], gate_biases[0].shape[0]
    if width % BLOCK_SIZE:
        raise ValueError(
            f"mlstm_inputs: c must have a multiple of {BLOCK_SIZE} channels but has shape {tuple(c.shape)}"
        )
    blocks, gate, heads = (width // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), (num_heads, 3 * width), (num_heads,)
    check(
        "mlstm_inputs",
        "c",
        c,
        ("x", x, "(B, S, E)", c.shape, SAME),
        ("q.weight", weights[0], "(E / 4, 4, 4)", blocks, ANY),
        ("k.weight", weights[1], "(E / 4, 4, 4)", blocks, ANY),
        ("v.weight", weights[2], "(E / 4, 4, 4)", blocks, ANY),
        ("q.bias", biases[0], "(E,)", (width,), ANY | OPTIONAL),
        ("k.bias", biases[1], "(E,)", (width,), ANY | OPTIONAL),
        ("v.bias", biases[2], "(E,)", (width,), ANY | OPTIONAL),
        ("i.weight", gate_weights[0], "(H, 3 E)", gate, ANY),
        ("f.weight", gate_weights[1], "(H, 3 E)", gate, ANY),
        ("i.bias", gate_biases[0], "(H,)", heads, ANY),
        ("f.bias", gate_biases[1], "(H,)", heads, ANY),
    )


def _check_backward(
    gradients: Sequence[Tensor],
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
) -> None:
    numbers = tuple(map(len, (gradients, weights, gate_weights, gate_biases)))
    if numbers != (5, 3, 2, 2):
        raise ValueError(f"mlstm_inputs: needs 5 gradients, 3 weights, 2 gate weights and 2 gate biases, not {numbers}")
    check_mlstm_inputs(c, x, weights, biases, gate_weights, gate_biases)
    gates = (*c.shape[:2], len(gate_biases[0]))
    check(
        "mlstm_inputs",
        "c",
        c,
        *(
            (f"d{name}", gradient, "(B, S, E)", c.shape, SAME)
            for name, gradient in zip("qkv", gradients[:3], strict=True)
        ),
        *((f"d{name}", gradient, "(B, S, H)", gates, ANY) for name, gradient in zip("if", gradients[3:], strict=True)),
    )


def _reference(
    c: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor],
) -> Five:
    q, k, v = (project_blocks(*given) for given in zip((c, c, x), weights, biases, strict=True))
    # One pre-activation per token, head and gate: a Linear of concat(q, k, v), as three products without the copy.
    dtype = torch.promote_types(c.dtype, torch.float32)  # autocast cannot concatenate float16 on a CPU
    gates, weight = (torch.cat([x.to(dtype) for x in group]).to(c.dtype) for group in (gate_biases, gate_weights))
    for source, part in zip((q, k, v), weight.chunk(3, dim=1), strict=True):
        gates = gates + F.linear(source, part)
    i, f = gates.to(dtype).chunk(2, dim=-1)
    return q, k, v, i, f


IMPLEMENTATIONS = Dispatcher("mlstm_inputs", reference=_reference)


# The op as torch sees it: opaque to compile and export, with a meta kernel, a gradient and a count of its operations.


@torch.library.custom_op("linvision::mlstm_inputs", mutates_args=())
def _mlstm_inputs(
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
) -> Five:
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    tensors = (c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias))
    check_mlstm_inputs(*tensors)
    with torch.autocast(c.device.type, enabled=False):
        return IMPLEMENTATIONS.choose(c, i_bias).forward(*tensors)


@_mlstm_inputs.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight, i_bias, f_bias):
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    check_mlstm_inputs(c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias))
    dtype = torch.promote_types(c.dtype, torch.float32)
    return *(c.new_empty(c.shape) for _ in range(3)), *(
        c.new_empty(*c.shape[:2], len(i_bias), dtype=dtype) for _ in "if"
    )


@torch.library.custom_op("linvision::mlstm_inputs_backward", mutates_args=())
def _mlstm_inputs_backward(
    gradients: list[Tensor],
    c: Tensor,
    x: Tensor,
    weights: list[Tensor],
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    gate_weights: list[Tensor],
    gate_biases: list[Tensor],
) -> list[Tensor]:
    """Return the gradients of all inputs in order, biases that are None left out."""
    tensors = (gradients, c, x, weights, (q_bias, k_bias, v_bias), gate_weights, gate_biases)
    _check_backward(*tensors)
    return IMPLEMENTATIONS.kernels(c, gate_biases[0]).backward(*tensors)


@_mlstm_inputs_backward.register_fake
def _(gradients, c, x, weights, q_bias, k_bias, v_bias, gate_weights, gate_biases):
    _check_backward(gradients, c, x, weights, (q_bias, k_bias, v_bias), gate_weights, gate_biases)
    biases = [bias for bias in (q_bias, k_bias, v_bias) if bias is not None]
    return [tensor.new_empty(tensor.shape) for tensor in (c, x, *weights, *biases, *gate_weights, *gate_biases)]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, *gradients):
    c, x, *parameters = ctx.saved_tensors
    weights, biases, gate_weights, gate_biases = parameters[:3], parameters[3:6], parameters[6:8], parameters[8:]
    computed = iter(
        torch.ops.linvision.mlstm_inputs_backward(list(gradients), c, x, weights, *biases, gate_weights, gate_biases)
    )
    return tuple(None if tensor is None else next(computed) for tensor in (c, x, *parameters))


_mlstm_inputs.register_autograd(_gradient, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvision.mlstm_inputs)
def mlstm_inputs_flops(
    c_shape, x_shape, q_shape, k_shape, v_shape, q_bias, k_bias, v_bias, i_shape, *args, out_shape=None, **options
) -> int:
    """Count the multiply-adds of the projections and of the gates."""
    batch, tokens, width = c_shape
    return 2 * batch * tokens * 3 * width * (BLOCK_SIZE + 2 * i_shape[0])
