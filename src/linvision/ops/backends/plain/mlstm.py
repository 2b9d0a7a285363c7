"""Chunkwise mLSTM, forward and backward, in plain PyTorch: parallel inside chunks, recurrent between them.

With F_t the cumulated log forget gates, a_s = i_s - F_s and M_t = max(m_0, a_1, ..., a_t), the stabiliser of the
recurrence is m_t = F_t + M_t and token s enters token t with the weight

    exp(F_t - F_s + i_s - m_t) = exp(a_s - M_t)  <= 1.

So a cumulated sum and a cumulated maximum over the gates, one number per token and head and therefore cheap to keep in
float64, turn every decay into a difference of two of these numbers. What is left is matrix products: inside a chunk the
masked product of the parallel form, between chunks a (D, D) state per head scaled to the M of the chunk's last token.

The backward pass keeps the inputs and h alone; it computes the states again, then walks back over the chunks. The
gradients of the gates need no (chunk, chunk) sums: a log weight of key s scales k_s, one of query t scales q_t, so that
they are k_s . dk_s and q_t . dq_t (the stabiliser m_t is held constant).

Tensors are laid out (chunks, B, H, tokens of a chunk, ...) and states hold C^T, so that queries multiply them from the
left. ``reverse`` scans from the last token to the first: the chunks are walked the other way and the mask is
transposed; nothing but the gates is ever flipped.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EPS = 1e-6

# Cost of one entry of a chunk's (L, L) matrix and of a (D, D) state, in multiplications of a matrix product, beside the
# products themselves: measured on a CPU, where elementwise passes and exponentials weigh in.
ENTRY_COST = 50
STATE_COST = 25

State = tuple[Tensor, Tensor, Tensor]


def chunk_length(num_tokens: int, head_dim: int) -> int:
    """Choose the tokens of a chunk: the cheapest number that cuts the sequence into equal parts.

    Long chunks pay for their (L, L) matrices, short ones for a (D, D) state each, in time and in memory; L >= D / 2
    keeps the states below twice the size of the keys. Without a second chunk there is no state to pay for.
    """

    def cost(length: int) -> float:
        share = 1 - length / num_tokens
        return length * (2 * head_dim + ENTRY_COST) + share * head_dim**2 * (2 + STATE_COST / length)

    candidates = {min(num_tokens, max(length, head_dim // 2)) for length in (64, 128, 256, 512)}
    candidates = {-(-num_tokens // -(-num_tokens // length)) for length in candidates}
    return min(candidates, key=cost)


def unsupported(q: Tensor) -> str | None:
    """Say why these inputs cannot be computed: never."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, *, return_state: bool, reverse: bool
) -> tuple[Tensor, State]:
    """Compute h (B, S, H, D) and the final state (C^T, n, m); see ``linvision.ops.mlstm`` for shapes and equations.

    Without ``return_state`` the final state is left out: three empty tensors.
    """
    if not len(q) and q.shape[1] > 1:  # no sequence, however long
        h, (q, k, v, i, f) = q.new_empty(q.shape), (x[:, :1] for x in (q, k, v, i, f))
        return h, forward(q, k, v, i, f, state, return_state=return_state, reverse=reverse)[1]
    walk = _Walk.plan(q, initial=state is not None, final=return_state, reverse=reverse)
    q, k, v, out = *(walk.split(x) for x in (q, k, v)), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    gates = _Gates.prepare(i, f, state, walk)
    C, n, final = _states(k.mul_(walk.scale), v, gates, state, walk)
    weighted = gates.weights(reverse).mul_(q @ k.mT)
    numerator, norm = weighted @ v, weighted.sum(-1)
    queries = q[walk.fed] * gates.decay_in[walk.fed, ..., None]
    numerator[walk.fed].flatten(0, 2).baddbmm_(queries.flatten(0, 2), C.flatten(0, 2))
    norm[walk.fed] += (queries @ n[..., None])[..., 0]
    denominator = torch.maximum(norm.abs_(), gates.floor).add_(EPS)
    return _join(numerator.div_(denominator[..., None]), out), final


def backward(
    dh: Tensor,
    d_final: tuple[Tensor, Tensor] | None,
    h: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    state: State | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of (q, k, v, i, f) and of the initial (C^T, n) from those of h and of the final (C^T, n)."""
    i, f = inputs[3:]
    if not len(dh) and dh.shape[1] > 1:
        q, k, v, i, f = (x[:, :1] for x in inputs)
        d_initial = backward(dh[:, :1], d_final, h[:, :1], (q, k, v, i, f), state, reverse=reverse)[5:]
        dq, dk, dv, di, df = (x.new_empty(x.shape) for x in inputs)
        return dq, dk, dv, di, df, *d_initial
    walk = _Walk.plan(inputs[0], initial=state is not None, final=d_final is not None, reverse=reverse)
    q, k, v, dh, h = (walk.split(x) for x in (*inputs[:3], dh, h))
    gates = _Gates.prepare(i, f, state, walk)
    C, n, final = _states(k.mul_(walk.scale), v, gates, state, walk)
    weights = gates.weights(reverse)
    weighted = weights * (q @ k.mT)
    norm = weighted.sum(-1)
    decay_in = gates.decay_in[walk.fed, ..., None]
    queries = q[walk.fed] * decay_in
    norm[walk.fed] += (queries @ n[..., None])[..., 0]
    denominator = torch.maximum(norm.abs(), gates.floor).add_(EPS)

    d_norm = -(dh * h).sum(-1).div_(denominator) * norm.sign() * (norm.abs() > gates.floor)
    d_numerator = dh.div_(denominator[..., None])
    dC, dn, d_initial = _state_gradients(queries, d_numerator[walk.fed], d_norm[walk.fed], d_final, gates, walk)

    dv = weighted.mT @ d_numerator
    d_scores = (d_numerator @ v.mT).add_(d_norm[..., None]).mul_(weights)
    dq, dk = d_scores @ k, d_scores.mT @ q
    from_state = d_numerator[walk.fed] @ C.mT + d_norm[walk.fed, ..., None] * n[..., None, :]
    dq[walk.fed] += from_state.mul_(decay_in)
    decay_out = gates.decay_out[walk.feeding, ..., None]
    dv[walk.feeding] += (k[walk.feeding] * decay_out) @ dC
    dk[walk.feeding] += (v[walk.feeding] @ dC.mT).add_(dn[..., None, :]).mul_(decay_out)

    di = walk.join_gates((dk * k).sum(-1).double())
    d_cumulated = walk.join_gates((dq * q).sum(-1).double()) - di
    if d_final is not None:
        products = ((gradient * s).double().flatten(2).sum(-1) for gradient, s in zip(d_final, final[:2], strict=True))
        d_cumulated[..., 0 if reverse else -1] += sum(products)
    df = _cumulate(d_cumulated, torch.cumsum, not reverse) * torch.sigmoid(-f.double().transpose(1, 2))
    dq, dk, dv = (
        _join(gradient, torch.empty(x.shape, dtype=x.dtype, device=x.device))
        for gradient, x in zip((dq, dk.mul_(walk.scale), dv), inputs[:3], strict=True)
    )
    return dq, dk, dv, _like_gate(di, i), _like_gate(df, f), *d_initial


@dataclass(frozen=True)
class _Walk:
    """How a sequence is cut into chunks, and which of them receive and which must hand on a state."""

    num_tokens: int
    length: int
    num_chunks: int
    initial: bool
    final: bool
    reverse: bool
    fed: slice  # chunks that a state comes in to: all but the first in scan order, which needs an initial state
    feeding: slice  # chunks whose state is asked for: all but the last in scan order, which the caller may want
    scale: float  # of the keys
    dtype: torch.dtype

    @classmethod
    def plan(cls, q: Tensor, *, initial: bool, final: bool, reverse: bool) -> "_Walk":
        _, num_tokens, _, head_dim = q.shape
        length = chunk_length(num_tokens, head_dim)
        num_chunks = -(-num_tokens // length)
        all_but_first, all_but_last = slice(0 if initial else 1, num_chunks), slice(0, num_chunks - (not final))
        if reverse:
            all_but_first, all_but_last = slice(0, num_chunks - (not initial)), slice(0 if final else 1, num_chunks)
        return cls(
            num_tokens=num_tokens,
            length=length,
            num_chunks=num_chunks,
            initial=initial,
            final=final,
            reverse=reverse,
            fed=all_but_first,
            feeding=all_but_last,
            scale=head_dim**-0.5,
            dtype=torch.float64 if q.dtype == torch.float64 else torch.float32,
        )

    def steps(self, *, backwards: bool) -> range:
        """Chunks in scan order, or the other way round."""
        return range(self.num_chunks - 1, -1, -1) if self.reverse != backwards else range(self.num_chunks)

    def split(self, x: Tensor) -> Tensor:
        """Cut tokens (B, S, H, D) into zero-padded chunks (N, B, H, L, D) of the working type: always a copy."""
        batch, _, num_heads, head_dim = x.shape
        full, rest = divmod(self.num_tokens, self.length)
        chunks = x.new_empty(self.num_chunks, batch, num_heads, self.length, head_dim, dtype=self.dtype)
        chunks[:full].copy_(x[:, : full * self.length].unflatten(1, (full, self.length)).permute(1, 0, 3, 2, 4))
        if rest:
            chunks[full, :, :, :rest].copy_(x[:, full * self.length :].transpose(1, 2))
            chunks[full, :, :, rest:].zero_()
        return chunks

    def split_gates(self, x: Tensor, padding: float | None) -> Tensor:
        """Cut gates (B, H, S) into chunks (N, B, H, L), padded with a number or, for None, the last token's value."""
        missing = self.num_chunks * self.length - self.num_tokens
        if missing:
            tail = x[..., -1:].expand(-1, -1, missing)
            x = torch.cat([x, tail if padding is None else torch.full_like(tail, padding)], dim=2)
        return x.unflatten(2, (-1, self.length)).permute(2, 0, 1, 3).contiguous()

    def join_gates(self, chunks: Tensor) -> Tensor:
        """Lay (N, B, H, L) out as (B, H, S), padding dropped."""
        return chunks.permute(1, 2, 0, 3).flatten(2)[..., : self.num_tokens]


@dataclass(frozen=True)
class _Gates:
    """The decays of every chunk: (N, B, H, L), in the working type."""

    keys: Tensor  # a_s relative to the chunk's last M, in units of log 2
    queries: Tensor  # M_t relative to the chunk's last M, in units of log 2
    decay_in: Tensor  # from the state before the chunk to token t
    decay_out: Tensor  # from token s to the state after the chunk
    carry: Tensor  # (N, B, H): from the state before the chunk to the one after it
    floor: Tensor  # exp(-m_t)
    final_m: Tensor  # (B, H)

    @classmethod
    def prepare(cls, i: Tensor, f: Tensor, state: State | None, walk: _Walk) -> "_Gates":
        cumulated = _cumulate(logsigmoid(f.double().transpose(1, 2)), torch.cumsum, walk.reverse)
        a = i.double().transpose(1, 2) - cumulated
        M = _cumulate(a, _cummax, walk.reverse)
        m = torch.full_like(M[..., 0], -torch.inf) if state is None else state[2].double()
        M = torch.maximum(M, m[..., None])
        last = 0 if walk.reverse else -1
        final_m = cumulated[..., last] + M[..., last]
        floor = walk.split_gates((-cumulated - M).exp(), 1.0)
        a, M = walk.split_gates(a, -torch.inf), walk.split_gates(M, None)
        after = M[..., last]
        before = torch.cat([after[1:], m[None]]) if walk.reverse else torch.cat([m[None], after[:-1]])
        keys = _log2(a - after[..., None], walk.dtype)
        return cls(
            keys=keys,
            queries=_log2(M - after[..., None], walk.dtype),
            decay_in=_log2(before[..., None] - M, walk.dtype).exp2_(),
            decay_out=keys.exp2(),
            carry=_log2(before - after, walk.dtype).exp2_(),
            floor=floor.to(walk.dtype),
            final_m=final_m.to(walk.dtype),
        )

    def weights(self, reverse: bool) -> Tensor:
        """Weigh each pair of tokens of a chunk, exp(a_s - M_t) where s comes before t or is t: (N, B, H, L, L)."""
        weights = (self.keys[..., None, :] - self.queries[..., None]).exp2_()
        return weights.triu_() if reverse else weights.tril_()


def _states(k: Tensor, v: Tensor, gates: _Gates, state: State | None, walk: _Walk) -> tuple[Tensor, Tensor, State]:
    """Return C^T and n before each chunk that is fed one, and the final state (empty tensors where nobody asks)."""
    keys = k[walk.feeding] * gates.decay_out[walk.feeding, ..., None]
    first_C, first_n = (None, None) if state is None else (state[0].to(walk.dtype), state[1].to(walk.dtype))
    steps = walk.steps(backwards=False)
    C, last_C = _recur(keys.mT @ v[walk.feeding], gates.carry, first_C, steps, takes=walk.fed, adds=walk.feeding)
    n, last_n = _recur(keys.sum(-2), gates.carry, first_n, steps, takes=walk.fed, adds=walk.feeding)
    if not walk.final:
        return C, n, (k.new_empty(0), k.new_empty(0), k.new_empty(0))
    return C, n, (last_C, last_n, gates.final_m)


def _state_gradients(
    queries: Tensor,
    d_numerator: Tensor,
    d_norm: Tensor,
    d_final: tuple[Tensor, Tensor] | None,
    gates: _Gates,
    walk: _Walk,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients of C^T and n after each chunk that hands them on, and those of the initial state."""
    last_C, last_n = (None, None) if d_final is None else (d_final[0].to(walk.dtype), d_final[1].to(walk.dtype))
    steps, sums_n = walk.steps(backwards=True), (queries * d_norm[..., None]).sum(-2)
    dC, d_first_C = _recur(queries.mT @ d_numerator, gates.carry, last_C, steps, takes=walk.feeding, adds=walk.fed)
    dn, d_first_n = _recur(sums_n, gates.carry, last_n, steps, takes=walk.feeding, adds=walk.fed)
    d_initial = (d_first_C, d_first_n) if walk.initial else (queries.new_empty(0), queries.new_empty(0))
    return dC, dn, d_initial


def _recur(
    sums: Tensor, carry: Tensor, x: Tensor | None, steps: range, *, takes: slice, adds: slice
) -> tuple[Tensor, Tensor]:
    """Run x <- carry[c] x + sums[c] over the chunks; return x as found by the chunks of ``takes``, and the last x."""
    taken = sums.new_empty(takes.stop - takes.start, *sums.shape[1:])
    carry = carry.reshape(carry.shape + (1,) * (sums.ndim - carry.ndim))
    if x is not None:
        taken[steps[0] - takes.start] = x
    for c in steps:
        if not adds.start <= c < adds.stop:
            continue
        following = c + steps.step
        takes_it = takes.start <= following < takes.stop
        slot = taken[following - takes.start] if takes_it else torch.empty_like(sums[0])
        added = sums[c - adds.start]
        x = slot.copy_(added) if x is None else torch.addcmul(added, carry[c], x, out=slot)
    return taken, sums.new_empty(0) if x is None else x


def _join(chunks: Tensor, out: Tensor) -> Tensor:
    """Write chunks (N, B, H, L, D) back as tokens into ``out`` (B, S, H, D), padding dropped; returns ``out``."""
    length = chunks.shape[3]
    full, rest = divmod(out.shape[1], length)
    out[:, : full * length].unflatten(1, (full, length)).permute(1, 0, 3, 2, 4).copy_(chunks[:full])
    if rest:
        out[:, full * length :].transpose(1, 2).copy_(chunks[full, :, :, :rest])
    return out


def _log2(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a natural logarithm into one to base 2: on a CPU PyTorch's exp2 runs three times as fast as its exp."""
    return (x * math.log2(math.e)).to(dtype)


def _like_gate(x: Tensor, gate: Tensor) -> Tensor:
    return x.transpose(1, 2).to(gate.dtype).contiguous()


def _cumulate(x: Tensor, operation: Callable[[Tensor, int], Tensor], reverse: bool) -> Tensor:
    """Cumulate gates (B, H, S) along the tokens in scan order."""
    return operation(x.flip(2), 2).flip(2) if reverse else operation(x, 2)


def _cummax(x: Tensor, dim: int) -> Tensor:
    return torch.cummax(x, dim).values
