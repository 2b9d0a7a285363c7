"""Chunkwise mLSTM in Triton: ``linvision.ops.mlstm`` on a GPU, for float32, bfloat16 and float16.

The mathematics stands in ``linvision.ops.backends.plain.mlstm``. Forward: gates (``mlstm_gates``), states before all
chunks (``mlstm_states``; none where one chunk holds the sequence), then all chunks at once (``mlstm_chunks``).
Backward: gates and states again, norms, the states' gradients, then dq, dk and dv chunk by chunk, and the gates'
gradients.

Gates are float64 where they are cumulated, states and sums float32. Kernels take strides, so that no input is copied
whose channels lie together; offsets are 64 bits wide. Tiles are sized by registers and shared memory; no result depends
on the number of threads in a warp, but ``num_warps`` is chosen for warps of 32 (NVIDIA; AMD's have 64).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linvision.ops.backends.strides import leading_strides, with_unit_stride
from linvision.ops.backends.triton.device import (
    launch,
    operand_dtype,
    operand_type,
    power_of_two,
    product_precision,
    registers,
    unusable,
)

MAX_HEAD_DIM = 512
EPS = 1e-6

CHUNK = 256  # tokens between kept states: long enough that states cause less traffic than the inputs
GATE_BLOCK = 1024  # tokens that a program takes of the gates at once
# Tokens of a tile, channels of a program's result, channels of a step towards it, rows and columns of the part of a
# state that one program holds: as large as registers and 64 KiB of shared memory allow.
TILES = {torch.bfloat16: (64, 128, 128, 64), torch.float16: (64, 64, 64, 64), torch.float32: (32, 64, 32, 32)}
REGISTERS = 128  # of a thread, in kernels that wait for memory more than they multiply; their loops spill nothing

State = tuple[Tensor, Tensor, Tensor]


def unsupported(q: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    reason = unusable(q)
    if reason is None and q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]} channels, above {MAX_HEAD_DIM}"
    return reason


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: State | None, *, return_state: bool, reverse: bool
) -> tuple[Tensor, State]:
    """Compute h (B, S, H, D) and the final state (C^T, n, m); see ``linvision.ops.mlstm`` for shapes and equations.

    Without ``return_state`` the final state is left out: three empty tensors.
    """
    q, k, v = (with_unit_stride(x) for x in (q, k, v))
    plan = _Plan.of(q, initial=state is not None, final=return_state, reverse=reverse)
    gates = _Gates.prepare(i, f, state, plan)
    states = _States.run(k, v, gates, None if state is None else state[:2], plan)
    h = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _gather_to_queries(q, k, v, h, gates, states, plan)
    return h, (states.final, states.final_vector, gates.final_m if return_state else plan.room(0))


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
    q, k, v, h, dh = (with_unit_stride(x) for x in (*inputs[:3], h, dh))
    plan = _Plan.of(q, initial=state is not None, final=d_final is not None, reverse=reverse)
    gates = _Gates.prepare(i, f, state, plan)
    states = _States.run(k, v, gates, None if state is None else state[:2], plan)
    norms = _Norms.compute(q, k, h, dh, gates, states, plan)
    d_states = _States.run(q, dh, gates, d_final, plan, norms=norms)

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    of_queries, of_keys = (plan.room(plan.num_parts, plan.num_heads_in_all, plan.num_tokens) for _ in range(2))
    _gather_to_queries(dh, v, k, dq, gates, states, plan, norms=norms, own=q, products=of_queries)
    _gather_to_keys(k, q, dh, dv, gates, d_states, norms, plan)
    _gather_to_keys(v, dh, q, dk, gates, d_states, norms, plan, own=k, products=of_keys)
    di, df = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (i, f))
    of_final = plan.room(0)
    if d_final is not None:
        pairs = zip(d_final, (states.final, states.final_vector), strict=True)
        of_final = sum((gradient * s).double().flatten(2).sum(-1) for gradient, s in pairs)
    _gate_gradients(f, di, df, of_queries, of_keys, of_final, plan)
    return dq, dk, dv, di, df, d_states.final, d_states.final_vector


@dataclass(frozen=True)
class _Plan:
    """How a sequence is cut into chunks and tiles, and heads into blocks of channels."""

    like: Tensor
    num_tokens: int
    num_heads: int
    num_heads_in_all: int
    head_dim: int
    chunk: int
    num_chunks: int
    tokens: int
    block: int  # channels of a step of the first product
    columns: int  # channels of a program's result
    state_tile: int  # rows and columns of a program's part of a state
    initial: bool
    final: bool
    reverse: bool

    @classmethod
    def of(cls, q: Tensor, *, initial: bool, final: bool, reverse: bool) -> "_Plan":
        batch, num_tokens, num_heads, head_dim = q.shape
        chunk = min(CHUNK, power_of_two(num_tokens, least=16))
        whole = power_of_two(head_dim, least=16)
        tokens, columns, block, state_tile = TILES[q.dtype]
        return cls(
            like=q,
            num_tokens=num_tokens,
            num_heads=num_heads,
            num_heads_in_all=batch * num_heads,
            head_dim=head_dim,
            chunk=chunk,
            num_chunks=-(-num_tokens // chunk),
            tokens=min(tokens, chunk),
            block=min(whole, block) if whole <= 128 else min(64, block),
            columns=min(whole, columns),
            state_tile=min(whole, state_tile),
            initial=initial,
            final=final,
            reverse=reverse,
        )

    @property
    def num_parts(self) -> int:
        """Count the programs that share the channels of one tile's result."""
        return -(-self.head_dim // self.columns)

    @property
    def num_tiles(self) -> int:
        return self.num_heads_in_all * -(-self.num_tokens // self.tokens)

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.num_tokens, self.num_heads, self.num_chunks

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def room(self, *shape: int) -> Tensor:
        """Make room in float32; a shape of 0 stands for an argument that is not used."""
        return torch.empty(shape, dtype=torch.float32, device=self.like.device)

    def gate_room(self) -> Tensor:
        """Make room for a number a token, padded to whole chunks."""
        return self.room(self.num_heads_in_all, self.num_chunks * self.chunk)

    def products(self) -> dict[str, Any]:
        """The options of kernels that multiply matrices."""
        return {
            "CHUNK": self.chunk,
            "TOKENS": self.tokens,
            "OPERAND": operand_type(self.like.dtype),
            "PRECISION": product_precision(self.like.dtype),
            "REVERSE": self.reverse,
            "num_warps": 4,
            "num_stages": 2,
        }


@dataclass(frozen=True)
class _Gates:
    """What the gates say, in scan order; see ``mlstm_gates.gates_kernel``."""

    keys: Tensor  # (B H, padded S), as are queries, decay_in and floor
    queries: Tensor
    decay_in: Tensor
    floor: Tensor
    carry: Tensor  # (B H, chunks)
    final_m: Tensor  # (B, H)

    @classmethod
    def prepare(cls, i: Tensor, f: Tensor, state: State | None, plan: _Plan) -> "_Gates":
        from linvision.ops.backends.triton.mlstm_gates import gates_kernel

        keys, queries, decay_in, floor = (plan.gate_room() for _ in range(4))
        carry = plan.room(plan.num_heads_in_all, plan.num_chunks)
        final_m = plan.room(plan.num_heads_in_all // plan.num_heads, plan.num_heads)
        launch(
            gates_kernel,
            plan.num_heads_in_all,
            *(i, f, keys if state is None else state[2].float().contiguous()),
            *(keys, queries, decay_in, floor, carry, final_m),
            *plan.counts,
            *i.stride(),
            *f.stride(),
            CHUNK=plan.chunk,
            CHUNKS=min(power_of_two(plan.num_chunks), max(1, GATE_BLOCK // plan.chunk)),
            REVERSE=plan.reverse,
            INITIAL=state is not None,
            like=plan.like,
        )
        return cls(keys, queries, decay_in, floor, carry, final_m)


@dataclass(frozen=True)
class _Norms:
    """The inverse of each query's norm and the gradient of its n . q: (B H, padded S)."""

    inverse: Tensor
    gradient: Tensor

    @classmethod
    def compute(
        cls, q: Tensor, k: Tensor, h: Tensor, dh: Tensor, gates: _Gates, states: "_States", plan: _Plan
    ) -> "_Norms":
        from linvision.ops.backends.triton.mlstm_chunks import norms_kernel

        inverse, gradient = plan.gate_room(), plan.gate_room()
        options = plan.products()
        del options["OPERAND"]
        launch(
            norms_kernel,
            plan.num_tiles,
            *(q, k, h, dh, inverse, gradient),
            *(gates.keys, gates.queries, gates.decay_in, gates.floor, states.vectors),
            *plan.counts,
            plan.scale,
            *leading_strides(q, k, h, dh),
            WIDTH=plan.head_dim,
            BLOCK=plan.block,
            EPS=EPS,
            START=plan.initial,
            like=plan.like,
            **options,
            **registers(REGISTERS),
        )
        return cls(inverse, gradient)


@dataclass(frozen=True)
class _States:
    """States before the chunks, or gradients of those after them; and what the walk over the chunks ended with."""

    matrices: Tensor  # (chunks, B H, D, D), in the operands' type
    vectors: Tensor  # (chunks, B H, D)
    final: Tensor  # (B, H, D, D), or empty
    final_vector: Tensor  # (B, H, D), or empty

    @classmethod
    def run(
        cls,
        x: Tensor,
        y: Tensor,
        gates: _Gates,
        start: tuple[Tensor, Tensor] | None,
        plan: _Plan,
        *,
        norms: _Norms | None = None,
    ) -> "_States":
        """Walk forward with x, y = k, v, or with norms, backward with q, dh."""
        from linvision.ops.backends.triton.mlstm_states import states_kernel

        heads, dim = plan.num_heads_in_all, plan.head_dim
        ends = plan.final if norms is None else plan.initial
        shape = (heads // plan.num_heads, plan.num_heads, dim, dim)
        final, final_vector = (plan.room(*(s if ends else (0,))) for s in (shape, shape[:3]))
        if plan.num_chunks == 1 and not (plan.initial or plan.final):
            return cls(final, final, final, final_vector)
        matrices = x.new_empty(plan.num_chunks, heads, dim, dim, dtype=operand_dtype(x.dtype))
        vectors = plan.room(plan.num_chunks, heads, dim)
        side = plan.state_tile
        launch(
            states_kernel,
            heads * (-(-dim // side)) ** 2,
            *(x, y, gates.keys, gates.decay_in, gates.carry),
            *((gates.keys, gates.keys) if norms is None else (norms.inverse, norms.gradient)),
            *((vectors, vectors) if start is None else (s.float().contiguous() for s in start)),
            *(matrices, vectors, final, final_vector),
            *plan.counts,
            plan.scale,
            *leading_strides(x, y),
            HEAD_DIM=dim,
            ROWS=side,
            COLUMNS=side,
            BACKWARD=norms is not None,
            START=start is not None,
            FINAL=ends,
            like=plan.like,
            **plan.products(),
            **registers(REGISTERS),
        )
        return cls(matrices, vectors, final, final_vector)


def _gather_to_queries(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    out: Tensor,
    gates: _Gates,
    states: _States,
    plan: _Plan,
    *,
    norms: _Norms | None = None,
    own: Tensor | None = None,
    products: Tensor | None = None,
) -> None:
    """Write h (x, y, z = q, k, v), or with norms, dq (dh, v, k) and its products with ``own`` = q."""
    from linvision.ops.backends.triton.mlstm_chunks import queries_kernel

    own = x if own is None else own
    launch(
        queries_kernel,
        plan.num_tiles * plan.num_parts,
        *(x, y, z, out, own, gates.keys if products is None else products),
        *(gates.keys, gates.queries, gates.decay_in, gates.floor),
        *((gates.keys, gates.keys) if norms is None else (norms.inverse, norms.gradient)),
        *(states.matrices, states.vectors),
        *plan.counts,
        plan.scale,
        *leading_strides(x, y, z, out, own),
        WIDTH=plan.head_dim,
        BLOCK=plan.block,
        COLUMNS=plan.columns,
        EPS=EPS,
        BACKWARD=norms is not None,
        START=plan.initial,
        like=plan.like,
        **plan.products(),
    )


def _gather_to_keys(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    out: Tensor,
    gates: _Gates,
    d_states: _States,
    norms: _Norms,
    plan: _Plan,
    *,
    own: Tensor | None = None,
    products: Tensor | None = None,
) -> None:
    """Write dv (x, y, z = k, q, dh), or with ``own`` = k, dk (v, dh, q) and its products with k."""
    from linvision.ops.backends.triton.mlstm_chunks import keys_kernel

    of_keys = own is not None
    own = x if own is None else own
    launch(
        keys_kernel,
        plan.num_tiles * plan.num_parts,
        *(x, y, z, out, own, gates.keys if products is None else products),
        *(gates.keys, gates.queries, norms.inverse, norms.gradient, d_states.matrices, d_states.vectors),
        *plan.counts,
        plan.scale,
        *leading_strides(x, y, z, out, own),
        WIDTH=plan.head_dim,
        BLOCK=plan.block,
        COLUMNS=plan.columns,
        OF_KEYS=of_keys,
        FINAL=plan.final,
        like=plan.like,
        **plan.products(),
    )


def _gate_gradients(
    f: Tensor, di: Tensor, df: Tensor, of_queries: Tensor, of_keys: Tensor, of_final: Any, plan: _Plan
) -> None:
    from linvision.ops.backends.triton.mlstm_gates import gate_gradients_kernel

    launch(
        gate_gradients_kernel,
        plan.num_heads_in_all,
        *(f, of_queries, of_keys, of_final, di, df),
        *(plan.num_tokens, plan.num_heads, plan.num_parts, of_queries.stride(0)),
        *f.stride(),
        *di.stride(),
        BLOCK=min(GATE_BLOCK, power_of_two(plan.num_tokens, least=16)),
        REVERSE=plan.reverse,
        FINAL=plan.final,
        like=plan.like,
    )
