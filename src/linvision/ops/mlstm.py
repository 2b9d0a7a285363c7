"""mLSTM, the matrix-memory LSTM of xLSTM and Vision-LSTM: linear in the number of tokens, forward and backward.

Papers: xLSTM (arXiv 2405.04517, equations 19-27) and Vision-LSTM (arXiv 2406.04303). With scaled keys k_t / sqrt(D),
the log forget gate lf_t = logsigmoid(f_t) and the input gate's pre-activation i_t, per head:

    m_t = max(lf_t + m_{t-1}, i_t)                                       stabiliser, m_0 = -inf
    C_t = exp(lf_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) v_t k_t^T   (D, D)
    n_t = exp(lf_t + m_{t-1} - m_t) n_{t-1} + exp(i_t - m_t) k_t         (D,)
    h_t = C_t q_t / (max(|n_t . q_t|, exp(-m_t)) + 1e-6)

Equal forms: ``mlstm_recurrent`` (the lines above, O(S D^2), one token after the other), ``mlstm_parallel`` (one S x S
matrix, O(S^2 D)), the reference form (chunkwise, O(S (chunk + D) D), functional) and ``mlstm`` itself, which is what
models run: chunkwise too, in the fastest backend. The stabiliser only keeps numbers in range; gradients treat it as a
constant.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import register_flop_formula

from linvision.errors import BackendError
from linvision.ops.autocast import without_autocast
from linvision.ops.backends.plain.mlstm import EPS, chunk_length
from linvision.ops.checks import ANY, OPTIONAL, SAME, check, check_axes, check_together
from linvision.ops.dispatch import Dispatcher
from linvision.ops.recurrence import linear_recurrence, running_maximum


class MLSTMState(NamedTuple):
    """What the tokens so far leave behind: float32 (float64 for float64 inputs)."""

    C: Tensor  # (B, H, D, D): weighted sum of v k^T, times exp(-m)
    n: Tensor  # (B, H, D): weighted sum of k, times exp(-m)
    m: Tensor  # (B, H): the stabiliser, a constant to the gradients


@overload
def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *,
    initial_state: MLSTMState | None = ..., return_state: Literal[False] = ..., reverse: bool = ...,
) -> Tensor: ...  # fmt: skip
@overload
def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *,
    initial_state: MLSTMState | None = ..., return_state: Literal[True], reverse: bool = ...,
) -> tuple[Tensor, MLSTMState]: ...  # fmt: skip
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Compute the mLSTM of a sequence in linear time and memory (equations above), chunk by chunk.

    Args:
        q, k, v: queries, unscaled keys and values, (B, S, H, D), of one floating-point type.
        i, f: pre-activations of the input and forget gates, (B, S, H), of any floating-point type. Gates, states and
            sums are float32 whatever the inputs are (float64 for float64 inputs); cumulated gates are float64.
        initial_state: state before the first token, so that a long sequence can be fed in pieces.
        return_state: also return the state after the last token.
        reverse: scan from the last token to the first. The result equals that of the flipped sequence, flipped back;
            "initial" then means before token S-1 and "final" after token 0.

    Returns:
        h (B, S, H, D) in q's type, or (h, final state).

    Raises:
        ValueError: where shapes, types or devices disagree, or a sequence is empty.
    """
    C, n, m = (None, None, None) if initial_state is None else initial_state
    form = IMPLEMENTATIONS.form()
    if form is not None:
        _check(q, k, v, i, f, C, n, m)
        return form(q, k, v, i, f, initial_state=initial_state, return_state=return_state, reverse=reverse)
    h, C, n, m = torch.ops.linvision.mlstm(q, k, v, i, f, C, n, m, return_state, reverse)
    return (h, MLSTMState(C, n, m)) if return_state else h


@without_autocast
def mlstm_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: MLSTMState | None = None,
    return_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Compute what ``mlstm`` computes one token after the other, as the equations stand; for tests and for reading."""
    _check(q, k, v, i, f, *(initial_state or (None, None, None)))
    dtype = _state_dtype(q)
    batch, num_tokens, num_heads, head_dim = q.shape
    if initial_state is None:
        C, n = q.new_zeros(batch, num_heads, head_dim, head_dim, dtype=dtype), q.new_zeros(1, dtype=dtype)
        m = q.new_full((batch, num_heads), -torch.inf, dtype=dtype)
    else:
        C, n, m = (x.to(dtype) for x in initial_state)
    queries, keys, values, i = q.to(dtype), k.to(dtype) * head_dim**-0.5, v.to(dtype), i.to(dtype)
    log_f = logsigmoid(f.to(dtype))
    h = [q] * num_tokens
    for t in reversed(range(num_tokens)) if reverse else range(num_tokens):
        m_before, m = m, torch.maximum(log_f[:, t] + m, i[:, t]).detach()
        keep, add = (log_f[:, t] + m_before - m).exp()[..., None], (i[:, t] - m).exp()[..., None]
        C = keep[..., None] * C + add[..., None] * values[:, t, :, :, None] * keys[:, t, :, None, :]
        n = keep * n + add * keys[:, t]
        norm = torch.maximum((n * queries[:, t]).sum(-1).abs(), (-m).exp()) + EPS
        h[t] = (C @ queries[:, t, :, :, None])[..., 0] / norm[..., None]
    result = torch.stack(h, dim=1).to(q.dtype)
    return (result, MLSTMState(C, n, m)) if return_state else result


def mlstm_parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, reverse: bool = False) -> Tensor:
    """Compute what ``mlstm`` computes through one S x S matrix a head, O(S^2 D); for tests and benchmarks."""
    _check(q, k, v, i, f, None, None, None)
    return _parallel(q, k, v, i, f, reverse=reverse)


@without_autocast
def _parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, reverse: bool) -> Tensor:
    dtype = _state_dtype(q)
    queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k * q.shape[-1] ** -0.5, v))
    log_f = logsigmoid(f.double()).transpose(1, 2)
    cumulated = log_f.flip(2).cumsum(2).flip(2) if reverse else log_f.cumsum(2)
    log_weights = cumulated[..., None] - cumulated[..., None, :] + i.double().transpose(1, 2)[..., None, :]
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    log_weights = log_weights.masked_fill(~(seen.triu() if reverse else seen.tril()), -torch.inf)
    m = log_weights.amax(-1, keepdim=True).detach()
    weights = (log_weights - m).to(dtype).exp() * (queries @ keys.mT)
    norm = torch.maximum(weights.sum(-1, keepdim=True).abs(), (-m).exp().to(dtype)) + EPS
    return (weights @ values / norm).transpose(1, 2).to(q.dtype)


def _parallel_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: MLSTMState | None,
    return_state: bool,
    reverse: bool,
) -> Tensor | tuple[Tensor, MLSTMState]:
    if initial_state is not None or return_state:
        raise BackendError("mlstm: the parallel form hands no states on; use another backend than 'parallel' for them")
    return _parallel(q, k, v, i, f, reverse=reverse)


@without_autocast
def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    initial_state: MLSTMState | None,
    return_state: bool,
    reverse: bool,
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Compute chunk by chunk, (B, chunks, H, tokens, ...), as explained in ``linvision.ops.backends.plain.mlstm``.

    What is exp(a_s - M_t) there is exp(a_s + F_t - m_t) here, so that the stabiliser m_t alone is held constant.
    """
    if reverse:
        q, k, v, i, f = (x.flip(1) for x in (q, k, v, i, f))
    dtype, (batch, num_tokens, num_heads, head_dim) = _state_dtype(q), q.shape
    length = chunk_length(num_tokens, head_dim)
    missing = -num_tokens % length
    queries, keys, values = (_chunks(x.to(dtype), length, missing, 0.0) for x in (q, k, v))
    keys = keys * head_dim**-0.5
    # Gates in float64: a, F - m, exp(-m) and the M before and after each chunk.
    cumulated = logsigmoid(f.double()).cumsum(1)
    a = i.double() - cumulated
    M = running_maximum(a.detach())
    start = a.new_full((batch, num_heads), -torch.inf) if initial_state is None else initial_state.m.detach().double()
    M = torch.maximum(M, start[:, None])
    m = cumulated.detach() + M
    from_queries, floor = (
        _chunks(x, length, missing, fill) for x, fill in ((cumulated - m, -torch.inf), ((-m).exp(), 1.0))
    )
    a, after = _chunks(a, length, missing, -torch.inf), _chunks(M, length, missing, -torch.inf).amax(-1)
    before = torch.cat([start[:, None], after[:, :-1]], 1)
    # States before each chunk, C^T and n side by side: (B, chunks, H, D, D + 1).
    decay_out = (a - after[..., None]).to(dtype).exp()
    with_ones = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    sums = (keys * decay_out[..., None]).mT @ with_ones
    first = None if initial_state is None else torch.cat([initial_state.C.mT, initial_state.n[..., None]], -1).to(dtype)
    states = linear_recurrence((before - after).to(dtype).exp()[..., None, None], sums, first)
    first = torch.zeros_like(states[:, 0]) if first is None else first
    entering = torch.cat([first[:, None], states[:, :-1]], 1)
    # Inside the chunks, and what comes in to them; the last column is n . q.
    seen = torch.arange(length, device=q.device)
    log_weights = (a[..., None, :] + from_queries[..., None]).masked_fill(seen[:, None] < seen, -torch.inf)
    decay_in = (before[..., None] + from_queries).to(dtype).exp()[..., None]
    results = (log_weights.to(dtype).exp() * (queries @ keys.mT)) @ with_ones + (queries * decay_in) @ entering
    norm = torch.maximum(results[..., -1].abs(), floor.to(dtype)) + EPS
    h = (results[..., :-1] / norm[..., None]).transpose(2, 3).flatten(1, 2)[:, :num_tokens].to(q.dtype)
    h = h.flip(1) if reverse else h
    if not return_state:
        return h
    final = states[:, -1] * (after[:, -1] + cumulated[:, -1] - m[:, -1]).to(dtype).exp()[..., None, None]
    return h, MLSTMState(final[..., :-1].mT.contiguous(), final[..., -1].contiguous(), m[:, -1].to(dtype))


def _chunks(x: Tensor, length: int, missing: int, fill: float) -> Tensor:
    """Cut (B, S, H, ...) into chunks (B, S / length, H, length, ...), filled up at the end."""
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=fill)
    return x.unflatten(1, (-1, length)).transpose(2, 3)


IMPLEMENTATIONS = Dispatcher("mlstm", reference=_reference, parallel=_parallel_form, sequential=mlstm_recurrent)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _check(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor | None, n: Tensor | None, m: Tensor | None
) -> None:
    check_axes("mlstm", "q", q, "BSHD", needed="SHD")
    shape = q.shape
    rows = (
        ("k", k, "(B, S, H, D)", shape, SAME),
        ("v", v, "(B, S, H, D)", shape, SAME),
        ("i", i, "(B, S, H)", shape[:3], ANY),
        ("f", f, "(B, S, H)", shape[:3], ANY),
    )
    if not (C is n is m is None):
        check_together("mlstm", C=C, n=n, m=m)
        batch, _, num_heads, head_dim = shape
        rows += (
            ("initial_state.C", C, "(B, H, D, D)", (batch, num_heads, head_dim, head_dim), ANY),
            ("initial_state.n", n, "(B, H, D)", (batch, num_heads, head_dim), ANY),
            ("initial_state.m", m, "(B, H)", (batch, num_heads), ANY),
        )
    check("mlstm", "q", q, *rows)


def _check_backward(dh: Tensor, dC: Tensor | None, dn: Tensor | None, h: Tensor, q: Tensor, *others: Any) -> None:
    _check(q, *others)
    if (dC is None) != (dn is None):
        check_together("mlstm", dC=dC, dn=dn)
    batch, _, num_heads, head_dim = q.shape
    check(
        "mlstm",
        "q",
        q,
        ("h", h, "(B, S, H, D)", q.shape, SAME),
        ("dh", dh, "(B, S, H, D)", q.shape, SAME),
        ("dC", dC, "(B, H, D, D)", (batch, num_heads, head_dim, head_dim), ANY | OPTIONAL),
        ("dn", dn, "(B, H, D)", (batch, num_heads, head_dim), ANY | OPTIONAL),
    )


# The op as torch sees it: opaque to compile and export, with a meta kernel, a gradient and a count of its operations.
# C^T rather than C travels inside, so that queries multiply it from the left.


@torch.library.custom_op("linvision::mlstm", mutates_args=())
def _mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_state: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, i, f, C, n, m)
    state, implementation = _transposed_state(C, n, m), IMPLEMENTATIONS.choose(q)
    with torch.autocast(q.device.type, enabled=False):
        h, final = implementation.forward(q, k, v, i, f, state, return_state=return_state, reverse=reverse)
    return h, final[0].mT.contiguous() if return_state else final[0], *final[1:]


@_mlstm.register_fake
def _(q, k, v, i, f, C, n, m, return_state, reverse):
    _check(q, k, v, i, f, C, n, m)
    batch, _, num_heads, head_dim = q.shape
    dtype = _state_dtype(q)
    if not return_state:
        return (q.new_empty(q.shape), *(q.new_empty(0, dtype=dtype) for _ in range(3)))
    return (
        q.new_empty(q.shape),
        q.new_empty(batch, num_heads, head_dim, head_dim, dtype=dtype),
        q.new_empty(batch, num_heads, head_dim, dtype=dtype),
        q.new_empty(batch, num_heads, dtype=dtype),
    )


@torch.library.custom_op("linvision::mlstm_backward", mutates_args=())
def _mlstm_backward(
    dh: Tensor,
    dC: Tensor | None,
    dn: Tensor | None,
    h: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_backward(dh, dC, dn, h, q, k, v, i, f, C, n, m)
    state, implementation = _transposed_state(C, n, m), IMPLEMENTATIONS.choose(q)
    d_final = None if dC is None or dn is None else (dC.mT, dn)
    with torch.autocast(q.device.type, enabled=False):
        *gradients, dC_t, d_initial_n = implementation.backward(dh, d_final, h, (q, k, v, i, f), state, reverse=reverse)
    return *gradients, dC_t if state is None else dC_t.mT.contiguous(), d_initial_n


@_mlstm_backward.register_fake
def _(dh, dC, dn, h, q, k, v, i, f, C, n, m, reverse):
    _check_backward(dh, dC, dn, h, q, k, v, i, f, C, n, m)
    d_initial = (0,) if C is None else C.shape, (0,) if n is None else n.shape
    dtype = _state_dtype(q)
    return *(x.new_empty(x.shape) for x in (q, k, v, i, f)), *(q.new_empty(shape, dtype=dtype) for shape in d_initial)


def _transposed_state(C: Tensor | None, n: Tensor | None, m: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    return None if C is None or n is None or m is None else (C.mT, n, m)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.return_state, ctx.reverse = inputs
    ctx.save_for_backward(output[0], *tensors)


def _gradient(ctx, dh, dC, dn, dm):
    h, *inputs = ctx.saved_tensors
    if not ctx.return_state:
        dC = dn = None
    *gradients, dC, dn = torch.ops.linvision.mlstm_backward(dh, dC, dn, h, *inputs, ctx.reverse)
    d_initial = (None, None) if inputs[5] is None else (dC, dn)
    return *gradients, *d_initial, None, None, None


_mlstm.register_autograd(_gradient, setup_context=_setup_context)


@register_flop_formula(torch.ops.linvision.mlstm)
def mlstm_flops(q_shape, *args, out_shape=None, **options) -> int:
    """Count the multiplications and additions of the matrix products of one chunkwise forward pass."""
    batch, num_tokens, num_heads, head_dim = q_shape
    chunk = chunk_length(num_tokens, head_dim)
    return batch * num_tokens * num_heads * 4 * head_dim * (chunk + head_dim)
