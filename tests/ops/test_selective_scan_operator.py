"""The selective scan as torch sees it: what it keeps, its memory, compilers, export, the count of its operations."""

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from linvision.ops import selective_scan
from tests.ops.test_selective_scan import random_inputs


def test_nothing_as_large_as_all_states_is_kept_for_the_backward_pass():
    batch, num_tokens, width, num_states = 2, 512, 8, 16
    inputs = random_inputs(num_tokens, batch=batch, width=width, num_states=num_states, dtype=torch.float32)
    kept = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(**{name: x.requires_grad_() for name, x in inputs.items()}, delta_softplus=True)
    numbers_of_inputs = sum(x.numel() for x in inputs.values())
    assert sum(x.numel() for x in kept) <= numbers_of_inputs + batch * num_tokens * width
    assert max(x.numel() for x in kept) < batch * num_tokens * width * num_states


def test_memory_of_a_training_step_grows_linearly():
    def peak(num_tokens: int) -> tuple[int, int]:
        inputs = random_inputs(num_tokens, batch=1, width=64, num_states=16, dtype=torch.float32)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        with profile(profile_memory=True) as profiler:
            selective_scan(**leaves, delta_softplus=True).sum().backward()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest, sum(4 * x.numel() for x in inputs.values())

    # 78 x 78 patches (1248 x 1248 pixels), and four times as many.
    (short, _), (long, size_of_inputs) = peak(6084), peak(4 * 6084)
    assert 0 < short < long < 4 * short
    assert long < 4 * size_of_inputs  # all states together would be five times the inputs, more than once


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_torch_accepts_the_operator(backend, options, reverse):
    inputs = random_inputs(37, options=options, dtype=torch.float32)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "residual", "initial_state")
    tensors = [inputs[name].requires_grad_() if name in inputs else None for name in names]
    torch.library.opcheck(torch.ops.linvision.selective_scan, (*tensors, options, reverse, True))


def test_compile_and_export(backend):
    inputs = random_inputs(37, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **inputs: selective_scan(**inputs, delta_softplus=True, reverse=True),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(**inputs), selective_scan(**inputs, delta_softplus=True, reverse=True))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    ours = torch.autograd.grad(compiled(**leaves).square().sum(), list(leaves.values()))
    eager = selective_scan(**leaves, delta_softplus=True, reverse=True)
    for gradient, expected in zip(ours, torch.autograd.grad(eager.square().sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(gradient, expected)

    class Mixer(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    names = ("u", "delta", "A", "B", "C")
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=4096)
    dynamic = {0: batch} if backend == "reference" else {0: batch, 1: tokens}
    shapes = [None if name == "A" else dynamic for name in names]
    example = random_inputs(37, dtype=torch.float32)
    program = torch.export.export(Mixer(), tuple(example[name] for name in names), dynamic_shapes=shapes)
    other = random_inputs(37 if backend == "reference" else 90, batch=3, dtype=torch.float32)
    expected = selective_scan(*(other[name] for name in names), delta_softplus=True)
    torch.testing.assert_close(program.module()(*(other[name] for name in names)), expected)


def test_flops_are_nine_a_state_and_token_and_three_times_that_backward():
    inputs = random_inputs(50, batch=2, width=6, num_states=4, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**{name: x.requires_grad_() for name, x in inputs.items()})
        assert counter.get_total_flops() == 9 * 2 * 50 * 6 * 4
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 9 * 2 * 50 * 6 * 4
