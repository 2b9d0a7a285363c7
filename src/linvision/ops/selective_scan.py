"""Selective scan, the state space recurrence of Mamba and Vision Mamba: linear in the number of tokens.

Paper: Mamba (arXiv 2312.00752, algorithm 2 and equation 2, with B discretised to first order as its implementation
does). Each of E channels carries N states, coupled to the other channels through B, C and delta alone:

    s_t = exp(delta_t A) s_{t-1} + delta_t u_t B_t     (E, N)
    y_t = s_t C_t + D u_t                              (E,)

With a residual r and a gate z the output is (y_t + r_t) SiLU(z_t).

Equal forms: ``selective_scan_sequential`` (the lines above, one token after the other, by autograd), the reference form
(functional, all states at once) and ``selective_scan`` itself, which is what models run: in the fastest backend, with a
backward pass that computes the states again instead of keeping them.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.utils.flop_counter import register_flop_formula

from linvision.ops.autocast import without_autocast
from linvision.ops.backends.scan_inputs import Inputs, interval
from linvision.ops.checks import ANY, FLOATING, OPTIONAL, SAME, check, check_axes, check_tensor
from linvision.ops.dispatch import Dispatcher
from linvision.ops.recurrence import linear_recurrence


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    D: Tensor | None = ..., z: Tensor | None = ..., delta_bias: Tensor | None = ..., residual: Tensor | None = ...,
    delta_softplus: bool = ..., reverse: bool = ..., initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    D: Tensor | None = ..., z: Tensor | None = ..., delta_bias: Tensor | None = ..., residual: Tensor | None = ...,
    delta_softplus: bool = ..., reverse: bool = ..., initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    residual: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the selective scan of a sequence in linear time and memory (equations above), tile by tile.

    Args:
        u: input, (B, S, E).
        delta: step size of each token and channel, (B, S, E).
        A: decay rate of each state, (E, N); negative, or states grow.
        B, C: what each token writes to and reads from the states, (B, S, N).
        D: weight of the input in the output, (E,).
        z: gate, (B, S, E): the output is multiplied by silu(z).
        delta_bias: added to delta first, (E,).
        residual: added to the output before the gate, (B, S, E), such as the result of a scan from the other side.
        delta_softplus: take softplus(delta + delta_bias) as the step size.
        reverse: scan from the last token to the first. The result equals that of the flipped sequence, flipped back;
            "initial" then means before token S-1 and "final" after token 0.
        initial_state: states before the first token, (B, E, N), so that a long sequence can be fed in pieces.
        return_state: also return the states after the last token.

        u, delta, B, C, z and the residual share one floating-point type; the other tensors may have another. States,
        decays and sums are float32 whatever the inputs are (float64 for float64 u).

    Returns:
        y (B, S, E) in u's type, or (y, final state (B, E, N)).

    Raises:
        ValueError: where shapes, types or devices disagree, or a sequence is empty.
    """
    form = IMPLEMENTATIONS.form()
    if form is not None:
        _check(u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
        y, state = form(u, delta, A, B, C, D, z, delta_bias, residual, delta_softplus, reverse, initial_state)
        return (y, state) if return_state else y
    dtype = _state_dtype(u)
    converted: list[Any] = [
        x if x is None or x.dtype is dtype or x.dtype not in FLOATING else x.to(dtype)
        for x in (A, D, delta_bias, initial_state)
    ]
    A, D, delta_bias, initial_state = converted
    tensors = (u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
    for_backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    y, state, _ = torch.ops.linvision.selective_scan(*tensors, delta_softplus, reverse, for_backward)
    return (y, state) if return_state else y


def selective_scan_sequential(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    residual: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute what ``selective_scan`` computes one token after the other; for tests and for reading."""
    _check(u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
    y, state = _sequential(u, delta, A, B, C, D, z, delta_bias, residual, delta_softplus, reverse, initial_state)
    return (y, state) if return_state else y


@without_autocast
def _sequential(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(u)
    x, A, B, C = (tensor.to(dtype) for tensor in (u, A, B, C))
    step = _step_size(delta.to(dtype), delta_bias, delta_softplus)
    state = x.new_zeros(len(x), *A.shape) if initial_state is None else initial_state.to(dtype)
    y = [x] * x.shape[1]
    for t in reversed(range(len(y))) if reverse else range(len(y)):
        state = torch.exp(step[:, t, :, None] * A) * state + (step * x)[:, t, :, None] * B[:, t, None, :]
        y[t] = (state * C[:, t, None, :]).sum(-1)
    return _output(torch.stack(y, dim=1), x, D, z, residual).to(u.dtype), state


@without_autocast
def _reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(u)
    x, A, B, C = (tensor.to(dtype) for tensor in (u, A, B, C))
    step = _step_size(delta.to(dtype), delta_bias, delta_softplus)
    decay, update = torch.exp(step[..., None] * A), (step * x)[..., None] * B[:, :, None, :]
    if reverse:
        decay, update, C = decay.flip(1), update.flip(1), C.flip(1)
    start = torch.zeros_like(update[:, 0]) if initial_state is None else initial_state.to(dtype)
    states = linear_recurrence(decay, update, start)
    y = (states * C[:, :, None, :]).sum(-1)  # no matrix product, which autocast would narrow in the backward pass
    return _output(y.flip(1) if reverse else y, x, D, z, residual).to(u.dtype), states[:, -1]


def _step_size(delta: Tensor, bias: Tensor | None, with_softplus: bool) -> Tensor:
    delta = delta if bias is None else delta + bias.to(delta.dtype)
    return softplus(delta) if with_softplus else delta


def _output(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, residual: Tensor | None) -> Tensor:
    """Add what stands beside the states' output (B, S, E), and gate it."""
    if D is not None:
        y = y + D.to(y.dtype) * x
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y if z is None else y * silu(z.to(y.dtype))


IMPLEMENTATIONS = Dispatcher("selective_scan", reference=_reference, sequential=_sequential)


def _state_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    check_axes("selective_scan", "u", u, "BSE", needed="SE")
    check_axes("selective_scan", "A", A, "EN", needed="EN")
    (batch, num_tokens, width), num_states = u.shape, A.shape[1]
    tokens, states = u.shape, (batch, num_tokens, num_states)
    check(
        "selective_scan",
        "u",
        u,
        ("delta", delta, "(B, S, E)", tokens, SAME),
        ("A", A, "(E, N)", (width, num_states), ANY),
        ("B", B, "(B, S, N)", states, SAME),
        ("C", C, "(B, S, N)", states, SAME),
        ("D", D, "(E,)", (width,), ANY | OPTIONAL),
        ("z", z, "(B, S, E)", tokens, SAME | OPTIONAL),
        ("delta_bias", delta_bias, "(E,)", (width,), ANY | OPTIONAL),
        ("residual", residual, "(B, S, E)", tokens, SAME | OPTIONAL),
        ("initial_state", initial_state, "(B, E, N)", (batch, width, num_states), ANY | OPTIONAL),
    )


def _check_operator(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Check what the operator is given, for which the public function has converted parameters and states."""
    _check(u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
    dtype = _state_dtype(u)
    for x in (A, D, delta_bias, initial_state):
        if x is not None and x.dtype is not dtype:
            raise ValueError(
                f"selective_scan: beside u of {u.dtype} the operator takes A, D, delta_bias and states of {dtype}, not "
                f"{x.dtype}; linvision.ops.selective_scan converts them"
            )


def _check_backward(
    dy: Tensor, d_state: Tensor, kept: Tensor, u: Tensor, delta: Tensor, A: Tensor, *others: Any
) -> None:
    check_tensor("selective_scan", "d_state", d_state)
    inputs: list[Any] = [u, delta, A, *others, d_state]
    _check_operator(*inputs)
    (batch, num_tokens, width), num_states = u.shape, A.shape[1]
    num_kept = -(-num_tokens // interval(num_states))
    check("selective_scan", "u", u, ("dy", dy, "(B, S, E)", u.shape, SAME))
    kept_shape = (num_kept, batch, num_states, width)
    check("selective_scan", "d_state", d_state, ("kept", kept, "(S / interval, B, N, E)", kept_shape, SAME))


# The op as torch sees it: opaque to compile and export, with a meta kernel, a gradient and a count of its operations.
# The third output, the states at every so many tokens, is for the backward pass alone.


@torch.library.custom_op("linvision::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_operator(u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
    implementation, A = IMPLEMENTATIONS.choose(u, A), A.mT.contiguous()
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, residual)
    with torch.autocast(u.device.type, enabled=False):
        return implementation.forward(inputs, initial_state, keep_states)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, residual, initial_state, delta_softplus, reverse, keep_states):
    _check_operator(u, delta, A, B, C, D, z, delta_bias, residual, initial_state)
    (batch, num_tokens, width), num_states = u.shape, A.shape[1]
    num_kept = -(-num_tokens // interval(num_states)) if keep_states else 0
    return (
        u.new_empty(u.shape),
        A.new_empty(batch, width, num_states),
        A.new_empty(num_kept, batch, num_states, width),
    )


@torch.library.custom_op("linvision::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    dy: Tensor,
    d_state: Tensor,
    kept: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    residual: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> list[Tensor]:
    """Return the gradients of u, delta, A, B, C, initial_state, then those given of D, z, delta_bias, residual."""
    _check_backward(dy, d_state, kept, u, delta, A, B, C, D, z, delta_bias, residual)
    implementation, A = IMPLEMENTATIONS.choose(u, A), A.mT.contiguous()
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, residual)
    with torch.autocast(u.device.type, enabled=False):
        gradients = implementation.backward(inputs, kept.contiguous(), dy, d_state)
    gradients["A"] = gradients["A"].mT.contiguous()
    order = ("u", "delta", "A", "B", "C", "initial_state", "D", "z", "delta_bias", "residual")
    return [gradients[name] for name in order if name in gradients]


@_selective_scan_backward.register_fake
def _(dy, d_state, kept, u, delta, A, B, C, D, z, delta_bias, residual, delta_softplus, reverse):
    _check_backward(dy, d_state, kept, u, delta, A, B, C, D, z, delta_bias, residual)
    return [x.new_empty(x.shape) for x in (u, delta, A, B, C, d_state, D, z, delta_bias, residual) if x is not None]


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.has_initial_state = inputs[9] is not None
    ctx.save_for_backward(output[2], *tensors)


def _gradient(ctx, dy, d_state, _):
    kept, *tensors = ctx.saved_tensors
    gradients = torch.ops.linvision.selective_scan_backward(
        dy, d_state, kept, *tensors, ctx.delta_softplus, ctx.reverse
    )
    required, (d_initial, *rest) = gradients[:5], gradients[5:]
    optional = iter(rest)
    of_given = [None if x is None else next(optional) for x in tensors[5:]]
    return *required, *of_given, d_initial if ctx.has_initial_state else None, None, None, None


_selective_scan.register_autograd(_gradient, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvision.selective_scan)
def selective_scan_flops(u_shape, delta_shape, A_shape, *args, out_shape=None, **options) -> int:
    """Count 9 operations per token, channel and state of a forward pass.

    As usual for selective scans, products count as multiply-adds, 2 each: delta A, delta u B, the step of the
    recurrence and the product with C; the exponential counts 1. What is done once per channel is left out.
    """
    batch, num_tokens, width = u_shape
    return 9 * batch * num_tokens * width * A_shape[1]


@register_flop_formula(torch.ops.linvision.selective_scan_backward)
def selective_scan_backward_flops(dy_shape, d_state_shape, *args, out_shape=None, **options) -> int:
    """Count three forward passes: the states once more, and two products for each product."""
    batch, num_tokens, _ = dy_shape
    return 27 * batch * num_tokens * d_state_shape[1] * d_state_shape[2]
