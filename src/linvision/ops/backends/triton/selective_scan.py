"""Selective scan in Triton: the body of ``linvision.ops.selective_scan`` on a GPU, for float32, bfloat16 and float16.

Bias, softplus, D, the residual and the gate z are part of the one kernel of each direction
(``selective_scan_kernels``). The backward pass computes states again from those kept at every ``interval(N)``-th token,
as ``linvision.ops._selective_scan_tiled`` lays them out. Sums over channels or sequences come in parts, added by
PyTorch in a fixed order: results do not change from run to run. States and sums are float32; offsets are 64 bits wide.
"""

import torch
from torch import Tensor

from linvision.ops._selective_scan_tiled import Inputs, interval
from linvision.ops.backends.strides import with_unit_stride
from linvision.ops.backends.triton.device import launch, power_of_two, unusable

DEVICE = "cuda"
MAX_STATES = 256
CHANNELS = 32  # of a program: a warp's threads. Where a warp has 64, as on AMD, 64: either is right, this is fast
STATES_OF_WARP = 16  # above these, warps share the states
UNROLL = 4  # tokens of a tile
PER_TOKEN = ("u", "delta", "z", "residual")
GRADIENTS = (
    "u",
    "delta",
    "A",
    "B",
    "C",
    "D",
    "z",
    "delta_bias",
    "residual",
    "initial_state",
)  # as the kernel's arguments


def refuses(*tensors: Tensor | None) -> str | None:
    """Say why these inputs (u, delta, A, ...) cannot be computed, or return None if they can."""
    u, A = tensors[0], tensors[2]
    assert u is not None
    assert A is not None
    reason = unusable(u)
    if reason is None and A.shape[1] > MAX_STATES:
        return f"{A.shape[1]} states a channel, above {MAX_STATES}"
    return reason


def forward(inputs: Inputs, initial_state: Tensor | None, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, S, E), the final state (B, E, N) and the kept states (S / interval, B, N, E), or none of these."""
    from linvision.ops.backends.triton.selective_scan_kernels import forward_kernel

    (batch, num_tokens, width), num_states = inputs.u.shape, inputs.A.shape[0]
    num_intervals = -(-num_tokens // interval(num_states))
    y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
    final = inputs.A.new_empty(batch, width, num_states)
    kept = inputs.A.new_empty(num_intervals if keep_states else 0, batch, num_states, width)
    tensors, strides = _arguments(inputs)
    start = final if initial_state is None else initial_state.contiguous()
    launch(
        forward_kernel,
        batch * num_blocks(inputs),
        *tensors,
        *(start, y, final, kept),
        *(num_tokens, num_intervals, width),
        *strides,
        START=initial_state is not None,
        KEEP=keep_states,
        like=inputs.u,
        **_options(inputs),
    )
    return y, final, kept


def backward(inputs: Inputs, kept: Tensor, dy: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the inputs by name (A's is (N, E) again), and of ``initial_state`` (B, E, N)."""
    from linvision.ops.backends.triton.selective_scan_kernels import backward_kernel

    (batch, num_tokens, width), num_states = inputs.u.shape, inputs.A.shape[0]
    given = {name: x for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(PER_TOKEN, (batch, num_tokens, width)),
        **{name: (num_blocks(inputs), batch, num_tokens, num_states) for name in ("B", "C")},
        **dict.fromkeys(("D", "delta_bias"), (batch, width)),
        "A": (batch, num_states, width),
    }
    parts = {
        name: x.new_empty(shapes[name], dtype=x.dtype if name in PER_TOKEN else torch.float32)
        for name, x in given.items()
    }
    parts["initial_state"] = torch.empty(d_final.shape, dtype=torch.float32, device=d_final.device)
    tensors, strides = _arguments(inputs)
    dy = with_unit_stride(dy)
    tiles = -(-interval(num_states) // UNROLL)
    unused = parts["u"]
    launch(
        backward_kernel,
        batch * num_blocks(inputs),
        *tensors,
        *(kept, dy, d_final.contiguous()),
        *(parts.get(name, unused) for name in GRADIENTS),
        inputs.A.new_empty(tiles, batch, num_states, width),
        *(num_tokens, len(kept), width),
        *strides,
        *dy.stride()[:2],
        like=inputs.u,
        **_options(inputs),
    )
    for name in ("A", "B", "C", "D", "delta_bias"):
        if name in parts:
            parts[name] = parts[name].sum(0).to(given[name].dtype)
    return parts


def num_blocks(inputs: Inputs) -> int:
    """Count the programs that share the channels of a sequence."""
    width = inputs.u.shape[2]
    return -(-width // _channels(width))


def _channels(width: int) -> int:
    return min(64 if torch.version.hip is not None else CHANNELS, power_of_two(width))


def _arguments(inputs: Inputs) -> tuple[list[Tensor], list[int]]:
    """Return the tensors that both kernels read, something harmless for those not given, and the tokens' strides."""
    z, residual = (_given(x, inputs.u) for x in (inputs.z, inputs.residual))
    u, delta, B, C, z, residual = (
        with_unit_stride(x) for x in (inputs.u, inputs.delta, inputs.B, inputs.C, z, residual)
    )
    D, bias = (_given(x, inputs.A).contiguous() for x in (inputs.D, inputs.delta_bias))
    strides = [stride for x in (u, delta, B, C, z, residual) for stride in x.stride()[:2]]
    return [u, delta, inputs.A, B, C, D, z, bias, residual], strides


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _options(inputs: Inputs) -> dict[str, int | bool]:
    num_states = inputs.A.shape[0]
    rows = power_of_two(num_states)
    return {
        "STATES": num_states,
        "ROWS": rows,
        "CHANNELS": _channels(inputs.u.shape[2]),
        "EVERY": interval(num_states),
        "UNROLL": UNROLL,
        "SOFTPLUS": inputs.delta_softplus,
        "REVERSE": inputs.reverse,
        "SKIP": inputs.D is not None,
        "GATED": inputs.z is not None,
        "BIASED": inputs.delta_bias is not None,
        "ADDED": inputs.residual is not None,
        "num_warps": max(1, rows // STATES_OF_WARP),
    }
