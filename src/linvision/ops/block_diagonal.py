"""Block-diagonal projections and the inputs of ViL's mLSTM that they give, channels last.

A block-diagonal projection maps each group of 4 channels by a matrix of its own,

    y[4g + o] = bias[4g + o] + sum over i of weight[g, o, i] x[4g + i]

Vision-LSTM (arXiv 2406.04303; the projections are those of xLSTM, arXiv 2405.04517, figure 11) takes queries and keys
from the convolved tokens c, values from the tokens x, and the gates' pre-activations from all three:

    q, k, v = P_q c, P_k c, P_v x        i = W_i [q, k, v] + b_i        f = W_f [q, k, v] + b_f
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from linvision.ops._dispatch import Dispatcher, Plain
from linvision.ops.backends.cpp import block_diagonal as cpp_block_diagonal
from linvision.ops.backends.triton import block_diagonal as triton_block_diagonal

BLOCK_SIZE = 4


class BlockDiagonal(NamedTuple):
    """The parameters of a block-diagonal projection of 4 G channels."""

    weight: Tensor  # (G, 4, 4)
    bias: Tensor | None  # (4 G,)


class Gate(NamedTuple):
    """The parameters of a gate for each of H heads, of E channels altogether."""

    weight: Tensor  # (H, 3 E), for q, k and v in this order
    bias: Tensor  # (H,)


class MLSTMInputs(NamedTuple):
    """What an mLSTM layer is fed."""

    q: Tensor  # (B, S, E)
    k: Tensor
    v: Tensor
    i: Tensor  # (B, S, H)
    f: Tensor


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each group of 4 channels of x (B, S, 4 G) by its matrix of weight (G, 4, 4), and add bias (4 G,).

    Computed by a grouped 1x1 convolution, which takes channels-last memory as it is. Parameters may be of other
    floating-point types than x, whose type the result has.

    Raises:
        ValueError: where shapes disagree.
    """
    if x.ndim != 3 or weight.shape[1:] != (BLOCK_SIZE, BLOCK_SIZE) or x.shape[-1] != BLOCK_SIZE * len(weight):
        raise ValueError(
            "block_diagonal: x must be (B, S, 4 G) and weight (G, 4, 4) but their shapes are "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.numel() == 0:  # torch's convolution refuses it; so all gradients are there, and zero
        return x * sum(parameter.sum() for parameter in (weight, bias) if parameter is not None)
    kernels = weight.reshape(-1, BLOCK_SIZE, 1, 1).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x[:, None].permute(0, 3, 1, 2), kernels, bias, groups=len(weight)).permute(0, 2, 3, 1)[:, 0]


def mlstm_inputs(
    c: Tensor, x: Tensor, q: BlockDiagonal, k: BlockDiagonal, v: BlockDiagonal, *, i: Gate, f: Gate
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
    arguments = (c, x, *weights, *biases, i.weight, f.weight, i.bias, f.bias)
    check_mlstm_inputs(*arguments)
    if BODIES.runs_plain(c, i.bias):
        return MLSTMInputs(*_plain(*arguments))
    return MLSTMInputs(*torch.ops.linvision.mlstm_inputs(*arguments))


def check_mlstm_inputs(c: Tensor, x: Tensor, *parameters: Tensor | None) -> None:
    """Raise ValueError unless c and x are tokens that the parameters, in ``mlstm_inputs``' order, fit."""
    if c.ndim != 3 or c.shape != x.shape or c.shape[-1] % BLOCK_SIZE:
        raise ValueError(
            f"mlstm_inputs: c and x must have one shape (B, S, E), E a multiple of {BLOCK_SIZE}, but are "
            f"{tuple(c.shape)} and {tuple(x.shape)}"
        )
    if c.dtype != x.dtype or not c.is_floating_point():
        raise ValueError(f"mlstm_inputs: c and x must have one floating-point type but are {c.dtype} and {x.dtype}")
    width, heads = c.shape[-1], parameters[-1]
    num_heads = 0 if heads is None else len(heads)
    if width == 0 or num_heads == 0:
        raise ValueError(f"mlstm_inputs: needs at least one channel and head but c is {tuple(c.shape)}")
    blocks, gate = (width // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE), (num_heads, 3 * width)
    needed = [blocks] * 3 + [(width,)] * 3 + [gate] * 2 + [(num_heads,)] * 2
    names = (
        "q.weight",
        "k.weight",
        "v.weight",
        "q.bias",
        "k.bias",
        "v.bias",
        "i.weight",
        "f.weight",
        "i.bias",
        "f.bias",
    )
    for name, parameter, shape in zip(names, parameters, needed, strict=True):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise ValueError(
                f"mlstm_inputs: {name} must have shape {shape} for c of {tuple(c.shape)} and {num_heads} heads but has "
                f"{tuple(parameter.shape)}"
            )
        if not parameter.is_floating_point():
            raise ValueError(f"mlstm_inputs: {name} must be of a floating-point type but is {parameter.dtype}")
    others = [x.device, *(p.device for p in parameters if p is not None)]
    if any(device != c.device for device in others):
        raise ValueError(f"mlstm_inputs: all tensors must be on one device but c is on {c.device}, others on {others}")


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _plain(
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
    q, k, v = (
        block_diagonal(c, q_weight, q_bias),
        block_diagonal(c, k_weight, k_bias),
        block_diagonal(x, v_weight, v_bias),
    )
    # One pre-activation per token, head and gate: a Linear of concat(q, k, v), as three products without the copy.
    gates, weight = torch.cat([i_bias, f_bias]).to(c.dtype), torch.cat([i_weight, f_weight]).to(c.dtype)
    for source, part in zip((q, k, v), weight.chunk(3, dim=1), strict=True):
        gates = gates + F.linear(source, part)
    i, f = gates.to(torch.promote_types(c.dtype, torch.float32)).chunk(2, dim=-1)
    return q, k, v, i, f


BODIES = Dispatcher(
    "mlstm_inputs", {"triton": triton_block_diagonal, "cpp": cpp_block_diagonal, "plain": Plain(_plain)}
)


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
    body = BODIES.choose(c, i_bias)
    weights, biases = (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias)
    with torch.autocast(c.device.type, enabled=False):
        if body is BODIES.bodies["plain"]:
            q, k, v, i, f = _plain(c, x, *weights, *biases, i_weight, f_weight, i_bias, f_bias)
            return q.contiguous(), k.contiguous(), v.contiguous(), i.contiguous(), f.contiguous()
        return body.forward(c, x, weights, biases, (i_weight, f_weight), (i_bias, f_bias))


@_mlstm_inputs.register_fake
def _(c, x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, i_weight, f_weight, i_bias, f_bias):
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
    body, biases = BODIES.kernels(c, gate_biases[0]), (q_bias, k_bias, v_bias)
    return body.backward(gradients, c, x, weights, biases, gate_weights, gate_biases)


@_mlstm_inputs_backward.register_fake
def _(gradients, c, x, weights, q_bias, k_bias, v_bias, gate_weights, gate_biases):
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
