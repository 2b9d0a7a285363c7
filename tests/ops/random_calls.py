"""Calls of every operator with tensors that fit, of random sizes and types: what ``tests.ops.fuzz`` starts from."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linvision import ops
from linvision.ops import fused
from linvision.ops.backends.scan_inputs import interval

SIZES = (1, 1, 2, 3, 4, 4, 5, 7, 8, 12, 16, 17, 32, 33, 64)
HUGE = (1 << 31, 1 << 40, (1 << 62) + 1)

Arguments = list[Any]  # in the order of the operator's schema
Public = Callable[..., Any] | None  # the function above the operator, which takes the same arguments


class Draw(random.Random):
    """Draws sizes and tensors."""

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Draw normal numbers."""
        if math.prod(shape) > 1 << 22:
            return torch.zeros(1, dtype=dtype).expand(shape)
        return (torch.randn(shape) * scale).to(dtype)

    def perhaps(self, x: Any) -> Any:
        """Return x or None."""
        return x if self.random() < 0.5 else None

    def flag(self) -> bool:
        """Return either."""
        return self.random() < 0.5

    def tokens(self) -> tuple[int, int]:
        """Draw a batch and a number of tokens; rarely with one of them zero and the other huge."""
        if self.random() < 0.02:
            return self.choice([(0, self.choice(HUGE)), (self.choice(HUGE), 0)])
        return self.choice([0, 1, 1, 2, 3]), self.choice([0, 1, 2, 3, 5, 16, 33, 64, 65, 130])


def mlstm(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of mlstm."""
    shape = *draw.tokens(), draw.choice([1, 2, 3, 4]), draw.choice(SIZES)
    batch, _, heads, width = shape
    scale = draw.choice([1, 10, 100])
    given = [draw.tensor(*shape, dtype=dtype) for _ in "qkv"] + [draw.tensor(*shape[:3], scale=scale) for _ in "if"]
    states = [draw.tensor(batch, heads, width, width), draw.tensor(batch, heads, width), draw.tensor(batch, heads)]

    def public(q: Any, k: Any, v: Any, i: Any, f: Any, C: Any, n: Any, m: Any, with_state: Any, reverse: Any) -> Any:
        state = None if C is None else ops.MLSTMState(C, n, m)
        return ops.mlstm(q, k, v, i, f, initial_state=state, return_state=with_state, reverse=reverse)

    return [*given, *(draw.perhaps(states) or [None] * 3), draw.flag(), draw.flag()], public


def mlstm_backward(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of mlstm's gradient."""
    (*inputs, C, n, m, _, reverse), _ = mlstm(draw, dtype)
    batch, _, heads, width = inputs[0].shape
    d_final = draw.perhaps([draw.tensor(batch, heads, width, width), draw.tensor(batch, heads, width)]) or [None] * 2
    dh, h = torch.randn_like(inputs[0]), torch.randn_like(inputs[0])
    return [dh, *d_final, h, *inputs, C, n, m, reverse], None


def selective_scan(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of selective_scan."""
    batch, tokens = draw.tokens()
    width, states = draw.choice(SIZES), draw.choice([1, 2, 4, 8, 16, 17])
    state_dtype = torch.promote_types(dtype, torch.float32)
    u, delta, z, residual = (draw.tensor(batch, tokens, width, dtype=dtype) for _ in range(4))
    B, C = (draw.tensor(batch, tokens, states, dtype=dtype) for _ in range(2))
    A, D, bias = -draw.tensor(width, states).exp(), draw.tensor(width), draw.tensor(width)
    initial = draw.tensor(batch, width, states)
    A, D, bias, initial = (x.to(state_dtype) for x in (A, D, bias, initial))

    def public(*given: Any) -> Any:
        names = ("D", "z", "delta_bias", "residual", "initial_state", "delta_softplus", "reverse")
        return ops.selective_scan(*given[:5], **dict(zip(names, given[5:12], strict=True)))

    options = map(draw.perhaps, (D, z, bias, residual, initial))
    return [u, delta, A, B, C, *options, draw.flag(), draw.flag(), draw.flag()], public


def selective_scan_backward(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of selective_scan's gradient."""
    (*tensors, _, softplus, reverse, _), _ = selective_scan(draw, dtype)
    u, A = tensors[0], tensors[2]
    (batch, tokens, width), states = u.shape, A.shape[1]
    kept = draw.tensor(-(-tokens // interval(states)), batch, states, width).to(A.dtype)
    return [torch.randn_like(u), draw.tensor(batch, width, states).to(A), kept, *tensors, softplus, reverse], None


def depthwise_conv(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of a convolution."""
    channels, causal = draw.choice(SIZES), draw.flag()
    (batch, tokens), columns = draw.tokens(), draw.choice([0, 1, 3, 8])
    shape = (batch, 1, tokens, channels) if causal else (batch, tokens, columns, channels)
    kernel = (1, draw.choice([1, 2, 4, 15, 17])) if causal else (draw.choice([1, 3, 5, 7, 2]), draw.choice([1, 3, 15]))

    def public(x: Any, weight: Any, bias: Any, causal: Any, silu: Any, reverse: Any) -> Any:
        options = {"activation": "silu" if silu else None, "reverse": reverse}
        if causal and x.shape[1:2] == weight.shape[2:3] == (1,):
            return ops.causal_conv1d(x[:, 0], weight[:, :, 0], bias, **options)
        return ops.depthwise_conv2d(x, weight, bias, **options)

    x, weight, bias = draw.tensor(*shape, dtype=dtype), draw.tensor(channels, 1, *kernel), draw.tensor(channels)
    return [x, weight, draw.perhaps(bias), causal, draw.flag(), draw.flag()], public


def depthwise_conv_backward(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of a convolution's gradient."""
    arguments, _ = depthwise_conv(draw, dtype)
    return [torch.randn_like(arguments[0]), *arguments], None


def gated_head_norm(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of gated_head_norm."""
    (batch, tokens), heads, width = draw.tokens(), draw.choice([1, 2, 3]), draw.choice(SIZES)
    h = draw.tensor(batch, tokens, heads, width, dtype=dtype)
    c, z = (draw.tensor(batch, tokens, heads * width, dtype=dtype) for _ in range(2))
    weight, bias, skip = (draw.tensor(heads * width) for _ in range(3))

    def public(h: Any, c: Any, z: Any, weight: Any, bias: Any, skip: Any, eps: Any) -> Any:
        return ops.gated_head_norm(h, c, z, weight=weight, bias=bias, skip=skip, eps=eps)

    return [h, c, draw.perhaps(z), weight, draw.perhaps(bias), skip, 1e-5], public


def gated_head_norm_backward(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of gated_head_norm's gradient."""
    (h, c, _, *others), _ = gated_head_norm(draw, dtype)
    return [torch.randn_like(c), h, c, torch.randn_like(c), *others], None


def mlstm_inputs(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of mlstm_inputs."""
    (batch, tokens), heads = draw.tokens(), draw.choice([1, 2, 3, 4])
    width = 4 * heads * draw.choice([1, 2, 4, 5])
    c, x = (draw.tensor(batch, tokens, width, dtype=dtype) for _ in range(2))
    scale = width**-0.5
    weights = [draw.tensor(width // 4, 4, 4) for _ in "qkv"]
    biases = [draw.perhaps(draw.tensor(width)) for _ in "qkv"]
    gates = [draw.tensor(heads, 3 * width, scale=scale) for _ in "if"] + [draw.tensor(heads) for _ in "if"]

    def public(*given: Any) -> Any:
        return ops.mlstm_inputs(*given[:2], **_layers(*given[2:12]))

    return [c, x, *weights, *biases, *gates], public


def mlstm_inputs_backward(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of mlstm_inputs' gradient."""
    (c, x, *parameters), _ = mlstm_inputs(draw, dtype)
    heads = len(parameters[-1])
    gates = [draw.tensor(*c.shape[:2], heads).to(torch.promote_types(dtype, torch.float32)) for _ in "if"]
    gradients = [*(torch.randn_like(c) for _ in "qkv"), *gates]
    return [gradients, c, x, parameters[:3], *parameters[3:6], parameters[6:8], parameters[8:]], None


def projected_mlstm(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of projected_mlstm."""
    arguments, _ = mlstm_inputs(draw, dtype)

    def public(*given: Any) -> Any:
        return fused.projected_mlstm(*given[:2], **_layers(*given[2:12]), reverse=given[12])

    return [*arguments, draw.flag()], public


def linear(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of linear."""
    inputs, outputs = draw.choice(SIZES), draw.choice(SIZES)
    tokens = draw.choice([draw.tokens(), (draw.choice([0, 1, 65]),), (), (*draw.tokens(), 2)])
    x, gate = (draw.tensor(*tokens, inputs, dtype=dtype) for _ in range(2))
    residual, bias = draw.tensor(*tokens, outputs, dtype=dtype), draw.tensor(outputs)

    def public(x: Any, weight: Any, bias: Any, scale: Any, shift: Any, eps: Any, gate: Any, residual: Any) -> Any:
        layer = ops.LinearParameters(weight, bias)
        return fused.linear(x, layer, norm=_norm(scale, shift, eps), gate=gate, residual=residual)

    weight = draw.tensor(outputs, inputs, dtype=dtype)
    return [x, weight, draw.perhaps(bias), *_drawn_norm(draw, inputs), *map(draw.perhaps, (gate, residual))], public


def mlp(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of mlp."""
    (x, weight, bias, scale, shift, eps, *_), _ = linear(draw, dtype)
    outputs, hidden = draw.choice(SIZES), len(weight)
    second, bias2 = draw.tensor(outputs, hidden, dtype=dtype), draw.perhaps(draw.tensor(outputs))
    residual = draw.perhaps(draw.tensor(*x.shape[:-1], outputs, dtype=dtype))

    def public(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, scale: Any, shift: Any, eps: Any, residual: Any) -> Any:
        layers = ops.LinearParameters(w1, b1), ops.LinearParameters(w2, b2)
        return fused.mlp(x, *layers, norm=_norm(scale, shift, eps), residual=residual)

    return [x, weight, bias, second, bias2, scale, shift, eps, residual], public


def window_attention(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of window_attention."""
    heads, (batch, rows) = draw.choice([1, 2, 3]), draw.tokens()
    width = heads * draw.choice(SIZES)
    x = draw.tensor(batch, min(rows, 16) if batch else rows, draw.choice([0, 1, 5, 7]), width, dtype=dtype)
    qkv, proj = draw.tensor(3 * width, width, dtype=dtype), draw.tensor(width, width, dtype=dtype)
    scale, shift = draw.tensor(width), draw.perhaps(draw.tensor(width))

    def public(x: Any, qkv: Any, b1: Any, proj: Any, b2: Any, scale: Any, shift: Any, eps: Any, h: Any, w: Any) -> Any:
        layers = ops.LinearParameters(qkv, b1), ops.LinearParameters(proj, b2)
        norm = ops.LayerNormParameters(scale, shift, eps)
        return fused.window_attention(x, *layers, norm=norm, num_heads=h, window_size=w)

    biases = draw.perhaps(draw.tensor(3 * width)), draw.perhaps(draw.tensor(width))
    window = draw.choice([1, 2, 3, 4, 7, 8, 20])
    return [x, qkv, biases[0], proj, biases[1], scale, shift, 1e-5, heads, window], public


def to_windows(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of to_windows."""
    batch, rows = draw.tokens()
    x = draw.tensor(batch, min(rows, 16) if batch else rows, draw.choice([1, 5, 7]), draw.choice(SIZES), dtype=dtype)
    return [x, draw.choice([1, 2, 3, 7, 20])], None


def from_windows(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of from_windows."""
    w, batch, rows, columns = (
        draw.choice([1, 2, 3, 7]),
        draw.choice([1, 2]),
        draw.choice([1, 5, 8]),
        draw.choice([1, 6]),
    )
    windows = batch * -(-rows // w) * -(-columns // w)
    return [draw.tensor(windows, w * w, draw.choice(SIZES), dtype=dtype), w, batch, rows, columns], None


def linear_attention(draw: Draw, dtype: torch.dtype) -> tuple[Arguments, Public]:
    """Draw a call of linear_attention."""
    shape = *draw.tokens(), draw.choice([1, 2, 3, 4]), draw.choice(SIZES)
    return [*(draw.tensor(*shape, dtype=dtype) for _ in "qkv"), draw.tensor(shape[2], 1, 1)], ops.linear_attention


def _layers(*given: Any) -> dict[str, Any]:
    projections = zip("qkv", given[:3], given[3:6], strict=True)
    gates = zip("if", given[6:8], given[8:], strict=True)
    return {name: ops.BlockDiagonalParameters(*parameters) for name, *parameters in projections} | {
        name: ops.GateParameters(*parameters) for name, *parameters in gates
    }


def _norm(scale: Any, shift: Any, eps: float) -> ops.LayerNormParameters | None:
    return None if scale is shift is None else ops.LayerNormParameters(scale, shift, eps)


def _drawn_norm(draw: Draw, width: int) -> list[Any]:
    return draw.perhaps([draw.tensor(width), draw.perhaps(draw.tensor(width)), 1e-5]) or [None, None, 0.0]


FORWARD = (
    mlstm, selective_scan, depthwise_conv, gated_head_norm, mlstm_inputs, projected_mlstm, linear, mlp,
    window_attention, to_windows, from_windows, linear_attention,
)  # fmt: skip
BACKWARD = (
    mlstm_backward, selective_scan_backward, depthwise_conv_backward, gated_head_norm_backward, mlstm_inputs_backward
)  # fmt: skip
