"""Selective scan in C++: ``linvision.ops.selective_scan`` on a CPU, for float32, bfloat16 and float16.

The equations stand in ``linvision.ops.selective_scan``, the kernels in ``kernels/selective_scan*.cpp``.
"""

import ctypes

import torch
from torch import Tensor

from linvision.ops.backends.cpp.library import DTYPES, Strided, call, pointer, unreadable
from linvision.ops.backends.scan_inputs import Inputs, interval
from linvision.ops.backends.strides import with_unit_stride

# Channels are grouped into pieces of work, as wide as possible for the sake of memory, as many as keep all threads busy
# for this share of the time. Their scratch memory, half a kilobyte for each token between kept states and vector of
# channels, is to fit into a core's cache. The widest vectors have 16 lanes.
LANES = 16
BUSY = 0.85
MAX_VECTOR_TOKENS = 1024


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, Strided) for name in ("u", "delta", "B", "C", "z", "residual")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "width", "states", "interval", "group")),
        *((name, ctypes.c_int32) for name in ("dtype", "delta_softplus", "reverse", "threads")),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("inputs", _Scan),
        ("y", Strided),
        *((name, ctypes.c_void_p) for name in ("initial", "final", "kept")),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        ("inputs", _Scan),
        *((name, Strided) for name in ("dy", "du", "d_delta", "dz", "d_residual")),
        *((name, ctypes.c_void_p) for name in ("kept", "d_final", "d_initial", "dA", "dB", "dC", "dD", "d_bias")),
    ]


def unsupported(u: Tensor, A: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
    return unreadable(u)


def forward(inputs: Inputs, initial_state: Tensor | None, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, S, E), the final state (B, E, N) and the kept states (S / interval, B, N, E), or none of these."""
    u, (num_states, width) = inputs.u, inputs.A.shape
    batch, num_tokens, _ = u.shape
    computed = _Computed(inputs)
    y = u.new_empty(u.shape, dtype=computed.dtype)
    final = inputs.A.new_empty(batch, width, num_states)
    kept = inputs.A.new_empty(-(-num_tokens // interval(num_states)) if keep_states else 0, batch, num_states, width)
    initial = None if initial_state is None else initial_state.contiguous()
    arguments = _Forward(
        computed.described(),
        Strided.of(y),
        pointer(initial),
        pointer(final),
        pointer(kept) if keep_states else None,
    )
    call("linvision_selective_scan_forward", arguments)
    return y.to(u.dtype), final, kept


def backward(inputs: Inputs, kept: Tensor, dy: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the inputs by name (A's is (N, E) again), and of ``initial_state`` (B, E, N)."""
    u, (num_states, width) = inputs.u, inputs.A.shape
    batch, num_tokens, _ = u.shape
    computed = _Computed(inputs)
    dy, d_final = with_unit_stride(dy.to(computed.dtype)), d_final.contiguous()
    per_token = {
        name: u.new_empty(u.shape, dtype=computed.dtype)
        for name in ("u", "delta", "z", "residual")
        if getattr(inputs, name) is not None
    }
    pieces = -(-width // computed.group)
    of_states = [inputs.A.new_empty(pieces, batch, num_tokens, num_states) for _ in range(2)]
    per_channel = {
        name: inputs.A.new_empty(batch, *x.shape)
        for name, x in (("A", inputs.A), ("D", inputs.D), ("delta_bias", inputs.delta_bias))
        if x is not None
    }
    d_initial = torch.empty_like(d_final)
    arguments = _Backward(
        computed.described(),
        *(Strided.of(x) for x in (dy, *map(per_token.get, ("u", "delta", "z", "residual")))),
        *(pointer(x) for x in (kept, d_final, d_initial, per_channel["A"], *of_states)),
        *(pointer(per_channel.get(name)) for name in ("D", "delta_bias")),
    )
    call("linvision_selective_scan_backward", arguments)
    gradients = {name: x.to(u.dtype) for name, x in per_token.items()}
    gradients |= {name: x.sum(0) for name, x in per_channel.items()}
    gradients |= {name: (x.sum(0) if pieces > 1 else x[0]).to(u.dtype) for name, x in zip("BC", of_states, strict=True)}
    return gradients | {"initial_state": d_initial}


class _Computed:
    """Inputs in types and strides that the kernels read; holds the tensors that the description points to."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.dtype = inputs.u.dtype if inputs.u.dtype in DTYPES else torch.float32
        tokens = (inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, inputs.residual)
        self.tokens = [None if x is None else with_unit_stride(x.to(self.dtype)) for x in tokens]
        self.vectors = [None if x is None else x.contiguous() for x in (inputs.D, inputs.delta_bias)]
        self.threads = torch.get_num_threads()
        self.group = _channels_of_a_piece(inputs, self.threads)

    def described(self) -> _Scan:
        """Describe the inputs to a kernel; they must outlive its call."""
        inputs, (num_states, width) = self.inputs, self.inputs.A.shape
        return _Scan(
            *map(Strided.of, self.tokens),
            pointer(inputs.A),
            *map(pointer, self.vectors),
            inputs.u.shape[0],
            inputs.u.shape[1],
            width,
            num_states,
            interval(num_states),
            self.group,
            DTYPES[self.dtype],
            inputs.delta_softplus,
            inputs.reverse,
            self.threads,
        )


def _channels_of_a_piece(inputs: Inputs, threads: int) -> int:
    (num_states, width), batch = inputs.A.shape, inputs.u.shape[0]
    blocks = -(-width // LANES)
    groups = -(-blocks // max(1, MAX_VECTOR_TOKENS // interval(num_states)))
    while groups < blocks and batch * groups < BUSY * threads * -(-batch * groups // threads):
        groups += 1
    return LANES * -(-blocks // groups)
