"""Selective scan in Triton: ``linvision.ops.selective_scan`` on a GPU, for float32, bfloat16 and float16.

Bias, softplus, D, the residual and the gate z are part of the one kernel of each direction
(``selective_scan_kernels``). The backward pass computes states again from those kept at every ``interval(N)``-th token,
as ``linvision.ops.backends.plain.selective_scan`` lays them out. Sums over channels or sequences come in parts, added
by PyTorch in a fixed order: results do not change from run to run. States and sums are float32; offsets are 64 bits
wide.
"""

import torch
from torch import Tensor

from linvision.ops.backends.scan_inputs import Inputs, interval
from linvision.ops.backends.strides import with_unit_stride
from linvision.ops.backends.triton.device import launch, power_of_two, unusable

MAX_STATES = 256
CHANNELS = 32  # of a program: a warp's threads. Where a warp has 64, as on AMD, 64: either is right, this is fast
STATES_OF_WARP = 16  # above these, warps share the states
TILE = 2  # tokens; two tiles divide an interval
PER_TOKEN = ("u", "delta", "z", "residual")
GRADIENTS = (
    "u",
    "delta",
    "A",
    "BC",
    "D",
    "z",
    "delta_bias",
    "residual",
    "initial_state",
)  # as the kernel's arguments


def unsupported(u: Tensor, A: Tensor) -> str | None:
    """Say why no kernel can compute this, or return None if one can."""
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
    final = inputs.A.new_empty(batch, num_states, width)
    kept = inputs.A.new_empty(num_intervals if keep_states else 0, batch, num_states, width)
    tensors, strides, of_tokens = _arguments(inputs)
    start = final if initial_state is None else initial_state.mT.contiguous()
    launch(
        forward_kernel,
        batch * _num_blocks(width),
        *tensors,
        *(start, y, final, kept),
        *(num_tokens, num_intervals, *strides),
        START=initial_state is not None,
        KEEP=keep_states,
        like=inputs.u,
        **_options(inputs),
        **of_tokens,
    )
    return y, final.mT.contiguous(), kept


def backward(inputs: Inputs, kept: Tensor, dy: Tensor, d_final: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the inputs by name (A's is (N, E) again), and of ``initial_state`` (B, E, N)."""
    from linvision.ops.backends.triton.selective_scan_kernels import backward_kernel

    (batch, num_tokens, width), num_states = inputs.u.shape, inputs.A.shape[0]
    num_blocks = _num_blocks(width)
    given = {name: x for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("D", "delta_bias"), (batch, width)),
        "A": (batch, num_states, width),
        "BC": (num_blocks, batch, num_tokens, 2, num_states),
    }
    parts = {
        name: torch.empty_like(x, memory_format=torch.contiguous_format)
        for name, x in given.items()
        if name in PER_TOKEN
    }
    parts |= {name: inputs.A.new_empty(shape) for name, shape in shapes.items() if name in given or name == "BC"}
    parts["initial_state"] = inputs.A.new_empty(batch, num_states, width)
    tensors, strides, of_tokens = _arguments(inputs)
    dy = with_unit_stride(dy)
    unused = parts["u"]
    launch(
        backward_kernel,
        batch * num_blocks,
        *tensors,
        *(kept, dy, d_final.mT.contiguous()),
        *(parts.get(name, unused) for name in GRADIENTS),
        inputs.A.new_empty(interval(num_states) // TILE, batch, num_states, width),
        *(num_tokens, len(kept), *strides, dy.stride(0)),
        DY_TOKEN=dy.stride(1),
        like=inputs.u,
        **_options(inputs),
        **of_tokens,
    )
    parts["B"], parts["C"] = parts.pop("BC").unbind(3)
    parts["initial_state"] = parts["initial_state"].mT.contiguous()
    for name in ("A", "B", "C", "D", "delta_bias"):
        if name in parts:
            parts[name] = parts[name].sum(0)
    return {name: gradient.to(given.get(name, gradient).dtype) for name, gradient in parts.items()}


def _num_blocks(width: int) -> int:
    """Count the programs that share the channels of a sequence."""
    return -(-width // _channels(width))


def _channels(width: int) -> int:
    return min(64 if torch.version.hip is not None else CHANNELS, power_of_two(width))


def _arguments(inputs: Inputs) -> tuple[list[Tensor], list[int], dict[str, int]]:
    """Return the tensors that both kernels read, something harmless for those not given, and the strides of some.

    Those from token to token are constants of a compilation: their arithmetic, in 64 bits, would be a fifth of it all.
    """
    z, residual = (_given(x, inputs.u) for x in (inputs.z, inputs.residual))
    u, delta, z, residual = tokens = [with_unit_stride(x) for x in (inputs.u, inputs.delta, z, residual)]
    # B and C are small, but every thread reads them: side by side, and in the type that they are used in.
    BC = torch.stack((inputs.B, inputs.C), 2).float()
    D, bias = (_given(x, inputs.A).contiguous() for x in (inputs.D, inputs.delta_bias))
    of_tokens = {f"{name.upper()}_TOKEN": x.stride(1) for name, x in zip(PER_TOKEN, tokens, strict=True)}
    return [u, delta, inputs.A, BC, D, z, bias, residual], [x.stride(0) for x in tokens], of_tokens


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def _options(inputs: Inputs) -> dict[str, int | bool]:
    num_states, width = inputs.A.shape
    rows = power_of_two(num_states)
    return {
        "WIDTH": width,
        "STATES": num_states,
        "ROWS": rows,
        "CHANNELS": _channels(width),
        "EVERY": interval(num_states),
        "UNROLL": TILE,
        "SOFTPLUS": inputs.delta_softplus,
        "REVERSE": inputs.reverse,
        "SKIP": inputs.D is not None,
        "GATED": inputs.z is not None,
        "BIASED": inputs.delta_bias is not None,
        "ADDED": inputs.residual is not None,
        "num_warps": max(1, rows // STATES_OF_WARP),
    }
