"""Selective scan, forward and backward, in plain PyTorch: tiles of tokens that stay in cache.

A tile holds some sequences of the batch and some consecutive tokens of them. Its decays exp(delta A) and its updates
delta u B are laid out (rows, tokens, N, E), channels last, so that every product runs along contiguous channels:

1. decays and updates of all tokens of the tile at once (these are most of the arithmetic, the exponentials above all);
2. one fused multiply-add a token, in place: the updates become the states;
3. the outputs of all its tokens by one batched product with C.

A step of one short batch is too small to be shared by threads, and the one that takes it would read half of it from
another core's cache. There the forward pass scans the segments of a tile side by side, each from a state of zero, and
then adds to every state what the segment began with, times the product of the decays up to it.

Nothing of size (B, S, E, N) ever exists. The forward pass keeps the states at every ``interval(N)``-th token, together
no larger than u in float32; the backward pass walks the tiles the other way, computes the states of a tile again from
the one at its start, and runs the same multiply-adds against the scan for the gradients of the states:

    G_t = C_t dy_t + decay_{t+1} G_{t+1}     the gradient of s_t

Exponentials are taken to base 2, with A times log2(e): PyTorch's exp2 is about three times as fast as its exp on a CPU,
and much more where results underflow, as they do for large steps delta.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from linvision.ops.backends.scan_inputs import Inputs, interval

# Sizes of a tile on a CPU, in elements of (rows, tokens, N, E) per thread: one step of the recurrence is large enough
# to be shared by the threads where the batch allows it, a tile's two or three buffers fit into the caches. Elsewhere
# launching kernels is what costs, so tiles are larger.
STEP_PER_THREAD = 24 * 1024
TILE_PER_THREAD = 512 * 1024
DEVICE_TILE = 16 * 1024 * 1024


def unsupported(u: Tensor, A: Tensor) -> str | None:
    """Say why these inputs cannot be computed: never."""
    return None


def forward(inputs: Inputs, initial_state: Tensor | None, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, S, E), the final state (B, E, N) and the kept states (S / interval, B, N, E), or none of these."""
    u, (num_states, width) = inputs.u, inputs.A.shape
    batch, num_tokens, _ = u.shape
    every = interval(num_states)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    kept = inputs.A.new_empty(-(-num_tokens // every) if keep_states else 0, batch, num_states, width)
    final = inputs.A.new_empty(batch, width, num_states)
    tiling = _Tiling.plan(inputs, threads=torch.get_num_threads())
    decays, updates = tiling.buffers(2)
    for rows in tiling.rows():
        state = inputs.A.new_zeros(final[rows].mT.shape) if initial_state is None else initial_state[rows].mT
        for tokens in tiling.tokens(inputs.reverse):
            num_segments = tiling.num_segments(tokens)
            tile = _Tile.compute(inputs, rows, tokens, state, decays, updates, num_segments)
            for first in range(tokens.start, tokens.stop, every) if keep_states else ():
                last = min(first + every, tokens.stop) - 1
                kept[first // every, rows] = tile.state_before(last if inputs.reverse else first, inputs.reverse)
            state = tile.states.steps[0 if inputs.reverse else -1].clone()
            y_tile = tile.output(inputs)
            if inputs.z is not None:
                y_tile *= silu(inputs.z[rows, tokens].to(y_tile.dtype))
            y[rows, tokens] = y_tile
        final[rows] = state.mT
    return y, final, kept


def backward(inputs: Inputs, kept: Tensor, dy: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the inputs by name (A's is (N, E) again), and of ``initial_state`` (B, E, N)."""
    given = {name: x for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    gradients = {name: torch.zeros(x.shape, dtype=x.dtype, device=x.device) for name, x in given.items()}
    gradients["initial_state"] = torch.empty(d_final.shape, dtype=kept.dtype, device=kept.device)
    every = interval(kept.shape[2])
    tiling = _Tiling.plan(inputs, threads=torch.get_num_threads())
    decays, updates, buffer = tiling.buffers(3)
    for rows in tiling.rows():
        d_state = d_final[rows].mT
        for tokens in tiling.tokens(not inputs.reverse):
            start = kept[((tokens.stop - 1) if inputs.reverse else tokens.start) // every, rows]
            tile = _Tile.compute(inputs, rows, tokens, start, decays, updates)
            d_state = _tile_backward(inputs, tile, dy, d_state, gradients, buffer)
        gradients["initial_state"][rows] = d_state.mT
    return gradients


def _tile_backward(
    inputs: Inputs, tile: "_Tile", dy: Tensor, d_state: Tensor, gradients: dict[str, Tensor], buffer: "_Buffer"
) -> Tensor:
    """Write the gradients of one tile and add to those of the parameters; returns the gradient of its start state.

    ``d_state`` is the gradient that reaches the tile's last state from the tokens after it. The tile's buffers are
    used up: its decays become the gradients of delta A, its states a scratch.
    """
    rows, tokens, u, delta = tile.rows, tile.tokens, tile.u, tile.delta
    dy = dy[rows, tokens].to(u.dtype)
    if inputs.z is not None:
        z = inputs.z[rows, tokens].to(u.dtype)
        gate = torch.sigmoid(z)
        gradients["z"][rows, tokens] = dy * tile.output(inputs) * gate * (1 + z * (1 - gate))
        dy = dy * z * gate
    if inputs.residual is not None:
        gradients["residual"][rows, tokens] = dy
    states, decay = tile.states.tokens, tile.decays.tokens
    gradients["C"][rows, tokens] = _dot_channels(dy, states)

    G_view = buffer.view(states.shape)
    G = torch.mul(tile.C[..., None], dy[..., None, :], out=G_view.tokens)
    against = not inputs.reverse
    G_view.in_order(against)[0].add_(d_state)
    _recur(G_view.in_order(against), tile.decays.in_order(against)[:-1])
    first = -1 if inputs.reverse else 0
    d_state = decay[:, first] * G[:, first]

    d_exponent = decay.mul_(G)
    if inputs.reverse:
        d_exponent[:, :-1] *= states[:, 1:]
    else:
        d_exponent[:, 1:] *= states[:, :-1]
    d_exponent[:, first] *= tile.start
    d_delta = torch.mul(d_exponent, inputs.A, out=states).sum(2)
    gradients["A"] += d_exponent.mul_(delta[..., None, :]).flatten(0, 1).sum(0)
    d_update = _dot_states(tile.B, G)
    gradients["B"][rows, tokens] = _dot_channels(delta * u, G)

    d_delta.addcmul_(d_update, u)
    d_u = d_update.mul_(delta)
    if inputs.D is not None:
        d_u.addcmul_(dy, inputs.D)
        gradients["D"] += (dy * u).sum((0, 1))
    if inputs.delta_softplus:
        d_delta *= torch.sigmoid(_step_size(inputs, rows, tokens))
    if inputs.delta_bias is not None:
        gradients["delta_bias"] += d_delta.sum((0, 1))
    gradients["u"][rows, tokens] = d_u
    gradients["delta"][rows, tokens] = d_delta
    return d_state


class _View(NamedTuple):
    """A buffer shaped (rows, tokens, N, E), whole and cut into its tokens."""

    tokens: Tensor
    steps: tuple[Tensor, ...]

    def in_order(self, reverse: bool) -> tuple[Tensor, ...]:
        return self.steps[::-1] if reverse else self.steps


class _Buffer:
    """Memory that all tiles use in turn; its views are kept, as making them costs almost as much as a step."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.views: dict[tuple[int, ...], _View] = {}

    def view(self, shape: tuple[int, ...]) -> _View:
        if shape not in self.views:
            tokens = self.flat[: math.prod(shape)].view(shape)
            self.views[shape] = _View(tokens, tokens.unbind(1))
        return self.views[shape]


@dataclass(frozen=True)
class _Tile:
    """Some tokens of some sequences, with all their states."""

    rows: slice
    tokens: slice
    u: Tensor  # (rows, tokens, E), as is delta, bias and softplus applied
    delta: Tensor
    B: Tensor  # (rows, tokens, N), as is C
    C: Tensor
    start: Tensor  # (rows, N, E): the state before the tile
    decays: _View  # (rows, tokens, N, E): exp(delta A); with segments, their product from the start of each
    states: _View  # (rows, tokens, N, E): the state after each token

    @classmethod
    def compute(
        cls,
        inputs: Inputs,
        rows: slice,
        tokens: slice,
        start: Tensor,
        decays: _Buffer,
        updates: _Buffer,
        num_segments: int = 1,
    ) -> "_Tile":
        u, B, C = (x[rows, tokens].to(inputs.state_dtype) for x in (inputs.u, inputs.B, inputs.C))
        delta = _step_size(inputs, rows, tokens)
        if inputs.delta_softplus:
            delta = softplus(delta)
        shape = (*B.shape, u.shape[-1])
        decay, states = decays.view(shape), updates.view(shape)
        torch.mul(delta[..., None, :], inputs.A * math.log2(math.e), out=decay.tokens)
        decay.tokens.exp2_()
        torch.mul((delta * u)[..., None, :], B[..., None], out=states.tokens)
        if num_segments > 1:
            cut = (shape[0] * num_segments, shape[1] // num_segments, *shape[2:])
            _recur_in_segments(updates.view(cut), decays.view(cut), start, inputs.reverse)
        else:
            factors, values = decay.in_order(inputs.reverse), states.in_order(inputs.reverse)
            values[0].addcmul_(factors[0], start)
            _recur(values, factors[1:])
        return cls(rows, tokens, u, delta, B, C, start, decay, states)

    def state_before(self, token: int, reverse: bool) -> Tensor:
        """Return the state (rows, N, E) that the scan brings to a token, counted as in the whole sequence."""
        before = token - self.tokens.start + (1 if reverse else -1)
        return self.states.steps[before] if 0 <= before < len(self.states.steps) else self.start

    def output(self, inputs: Inputs) -> Tensor:
        """Return C . s + D u of each token, and the residual, before the gate: (rows, tokens, E)."""
        y = _dot_states(self.C, self.states.tokens)
        if inputs.D is not None:
            y.addcmul_(self.u, inputs.D)
        return y if inputs.residual is None else y.add_(inputs.residual[self.rows, self.tokens])


@dataclass(frozen=True)
class _Tiling:
    """How a scan is cut: sequences per tile, tokens per tile, and whether these are scanned in segments."""

    inputs: Inputs
    num_rows: int
    num_tokens: int
    in_segments: bool

    @classmethod
    def plan(cls, inputs: Inputs, *, threads: int) -> "_Tiling":
        batch, (num_states, width) = max(1, inputs.u.shape[0]), inputs.A.shape
        step, tile = batch * num_states * width, DEVICE_TILE
        num_rows, in_segments = batch, False
        if inputs.u.device.type == "cpu":
            groups = max(1, min(batch, step // (threads * STEP_PER_THREAD)))
            num_rows, tile = -(-batch // groups), threads * TILE_PER_THREAD
            in_segments = threads > 1 and step < threads * STEP_PER_THREAD
        every = interval(num_states)
        num_kept = tile // (num_rows * num_states * width * every)
        return cls(inputs, num_rows, every * max(1, num_kept), in_segments)

    def buffers(self, count: int) -> list[_Buffer]:
        size = self.num_rows * min(self.num_tokens, self.inputs.u.shape[1]) * self.inputs.A.numel()
        return [_Buffer(self.inputs.A.new_empty(size)) for _ in range(count)]

    def rows(self) -> list[slice]:
        return _slices(self.inputs.u.shape[0], self.num_rows)

    def tokens(self, from_the_end: bool) -> list[slice]:
        total = self.inputs.u.shape[1]
        in_tiles = total - total % interval(self.inputs.A.shape[0]) if self.in_segments else total
        slices = _slices(in_tiles, self.num_tokens) + ([slice(in_tiles, total)] if in_tiles < total else [])
        return slices[::-1] if from_the_end else slices

    def num_segments(self, tokens: slice) -> int:
        num_tokens = tokens.stop - tokens.start
        return max(1, num_tokens // interval(self.inputs.A.shape[0])) if self.in_segments else 1


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _step_size(inputs: Inputs, rows: slice, tokens: slice) -> Tensor:
    """Return delta of a tile with its bias, before the softplus."""
    delta = inputs.delta[rows, tokens].to(inputs.state_dtype)
    return delta if inputs.delta_bias is None else delta + inputs.delta_bias


def _recur(values: tuple[Tensor, ...], decays: tuple[Tensor, ...]) -> None:
    """Add to each value but the first its decay times the value before it, in place."""
    carried = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        carried = value.addcmul_(decay, carried)


def _recur_in_segments(values: _View, decays: _View, start: Tensor, reverse: bool) -> None:
    """Recur in (rows segments, tokens, N, E) at once, then from ``start`` (rows, N, E); decays become products."""
    carried, *following = values.in_order(reverse)
    product, *factors = decays.in_order(reverse)
    for value, decay in zip(following, factors, strict=True):
        carried = value.addcmul_(decay, carried)
        product = decay.mul_(product)
    last, decayed = (x.unflatten(0, (len(start), -1)).unbind(1) for x in (carried, product))
    starts = [start]
    for segment in range(len(last))[:: -1 if reverse else 1]:
        starts.append(torch.addcmul(last[segment], decayed[segment], starts[-1]))
    starts = torch.stack(starts[-2::-1] if reverse else starts[:-1], 1)
    values.tokens.addcmul_(decays.tokens, starts.flatten(0, 1)[:, None])


def _dot_states(weights: Tensor, x: Tensor) -> Tensor:
    """Sum (rows, tokens, N, E) over N with weights (rows, tokens, N)."""
    return torch.bmm(weights.flatten(0, 1)[:, None], x.flatten(0, 1)).view(*x.shape[:2], -1)


def _dot_channels(weights: Tensor, x: Tensor) -> Tensor:
    """Sum (rows, tokens, N, E) over E with weights (rows, tokens, E); x stands right, which runs ten times as fast."""
    return torch.bmm(weights.flatten(0, 1)[:, None], x.flatten(0, 1).mT).view(*x.shape[:2], -1)
