"""Ops as contenders, at the shapes that the tiny models give them: by sequence length."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from linvision.bench.contenders import Lineup, Setting, Step
from linvision.ops import (
    mlstm,
    mlstm_parallel,
    mlstm_recurrent,
    selective_scan,
    selective_scan_sequential,
    use_backend,
)

NUM_HEADS = 4  # of vil2_tiny, at 384 channels
NUM_STATES = 16  # of vim_tiny, at 384 channels
Tensors = dict[str, Tensor]


def _noise(setting: Setting, *shape: int) -> Tensor:
    return torch.randn(setting.batch_size, setting.size, *shape, device=setting.device).to(setting.torch_dtype)


def _mlstm_inputs(setting: Setting, width: int) -> Tensors:
    heads = (NUM_HEADS, width // NUM_HEADS)
    q, k, v = (_noise(setting, *heads) for _ in range(3))
    return {"q": q, "k": k, "v": v, "i": _noise(setting, NUM_HEADS), "f": _noise(setting, NUM_HEADS) + 4}


def _scan_inputs(setting: Setting, width: int) -> Tensors:
    u, delta, z = (_noise(setting, width) for _ in range(3))
    A = -torch.arange(1.0, NUM_STATES + 1, device=setting.device).repeat(width, 1)
    D, delta_bias = (torch.full((width,), value, device=setting.device) for value in (1.0, -4.0))
    B, C = (_noise(setting, NUM_STATES) for _ in range(2))
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}


def _attention_inputs(setting: Setting, width: int) -> Tensors:
    return {name: _noise(setting, NUM_HEADS, width // NUM_HEADS) for name in ("query", "key", "value")}


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2)


OPS: dict[str, dict[str, tuple[Callable, Callable[[Setting, int], Tensors]]]] = {
    "mlstm": {
        "": (mlstm, _mlstm_inputs),
        "plain": (mlstm, _mlstm_inputs),
        "parallel": (mlstm_parallel, _mlstm_inputs),
        "sequential": (mlstm_recurrent, _mlstm_inputs),
        "attention": (_attention, _attention_inputs),
    },
    "selective_scan": {
        "": (partial(selective_scan, delta_softplus=True), _scan_inputs),
        "plain": (partial(selective_scan, delta_softplus=True), _scan_inputs),
        "sequential": (partial(selective_scan_sequential, delta_softplus=True), _scan_inputs),
        "attention": (_attention, _attention_inputs),
    },
}


@dataclass(frozen=True)
class OpContender:
    """An op as models run it (peer ""), in plain PyTorch, in another form, or fused attention over as many channels."""

    op: str
    peer: str = ""
    width: int = 384

    @property
    def label(self) -> str:
        """Name and form."""
        if self.peer == "attention":
            return "fused attention"
        return f"{self.op} ({self.peer})" if self.peer else self.op

    @property
    def token_by_token(self) -> bool:
        """Whether the scan is a loop over tokens."""
        return self.peer == "sequential"

    def countable(self) -> "OpContender":
        """Count a loop over tokens as the scan that it is."""
        return replace(self, peer="") if self.token_by_token else self

    def prepare(self, setting: Setting) -> Step:
        """Make noise; a step is the op's forward pass, in training the backward pass too."""
        torch.manual_seed(setting.seed)
        op, make_inputs = OPS[self.op][self.peer]
        backend = "plain" if self.peer == "plain" else setting.backend
        inputs = make_inputs(setting, self.width)
        if setting.mode == "inference":

            def forward() -> None:
                with torch.inference_mode(), use_backend(backend):
                    op(**inputs)

            return forward
        for tensor in inputs.values():
            tensor.requires_grad_()

        def forward_and_backward() -> None:
            with use_backend(backend):
                y = op(**inputs)
                torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))

        return forward_and_backward


def op_lineup(op: str, peers: list[str], width: int) -> Lineup:
    """List the op and those of its peers that are asked for."""
    contenders = tuple(OpContender(op, peer, width) for peer in OPS[op] if peer in ("", *peers))
    references = {
        one.label: {other.peer: other.label for other in contenders if other.peer and other != one}
        for one in contenders
    }
    return Lineup(contenders, references)
