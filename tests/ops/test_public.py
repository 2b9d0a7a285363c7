"""The public names of the ops: functions win over the modules that they live in, however those are imported."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linvision import ops
from linvision.ops import fused
from tests.ops import test_gated_norm, test_mlstm, test_mlstm_inputs, test_projected_mlstm, test_selective_scan
from tests.ops.test_convolution import grid_conv, grid_inputs

PROGRAM = """
import importlib, pkgutil, inspect
import linvision.ops.linear_attention
import linvision.ops.fused.linear
import linvision.ops as ops
for found in pkgutil.walk_packages(ops.__path__, "linvision.ops."):
    if "triton" not in found.name and not found.name.endswith("liblinvision"):
        importlib.import_module(found.name)
modules = [f"{room.__name__}.{name}" for room in (ops, ops.fused) for name in room.__all__
           if inspect.ismodule(getattr(room, name))]
print(modules)
"""


def test_functions_win_over_modules():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.strip() == "['linvision.ops.fused']", done.stderr


class Operators(TorchDispatchMode):
    """Notes operators of ours, and those that write into what they are given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "linvision" or func._schema.is_mutable:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def attend(q, k, v):
    return ops.linear_attention(q, k, v, torch.ones(2, 1, 1))


def scan(u, delta, B, C, A):
    return ops.selective_scan(u, delta, A, B, C, delta_softplus=True, reverse=True)


def scan_inputs():
    inputs = test_selective_scan.random_inputs(70, options=False, dtype=torch.float32)
    return [inputs[name] for name in ("u", "delta", "B", "C", "A")]


def mlp(x, w1, w2):
    return fused.mlp(x, ops.LinearParameters(w1), ops.LinearParameters(w2), norm=ops.LayerNormParameters(w1[0]))


def windows(x, w1, w2):
    layers, norm = (ops.LinearParameters(w1), ops.LinearParameters(w2)), ops.LayerNormParameters(w1[0])
    return fused.window_attention(x, *layers, norm=norm, num_heads=2, window_size=3)


# By name: a function of tensors, its inputs, and how many of these, the first ones, have a batch.
CASES = {
    "mlstm": (ops.mlstm, lambda: test_mlstm.random_inputs(70, 4, dtype=torch.float32), 5),
    "selective_scan": (scan, scan_inputs, 4),
    "linear_attention": (attend, lambda: test_mlstm.random_inputs(70, 4, dtype=torch.float32)[:3], 3),
    "depthwise_conv2d": (grid_conv("silu", reverse=True), lambda: grid_inputs((2, 5, 7, 8), (3, 3)), 1),
    "mlstm_inputs": (test_mlstm_inputs.project, lambda: test_mlstm_inputs.random_inputs(2, 5, 12, 2), 2),
    "projected_mlstm": (test_projected_mlstm.compute, lambda: test_projected_mlstm.random_inputs(2, 70, 2, 8), 2),
    "gated_head_norm": (test_gated_norm.gated, lambda: test_gated_norm.random_inputs(2, 5, 3, 8), 3),
    "mlp": (mlp, lambda: [torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(4, 12)], 1),
    "window_attention": (windows, lambda: [torch.randn(2, 5, 4, 8), torch.randn(24, 8), torch.randn(8, 8)], 1),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_reference_forms_are_functional_and_take_any_batch(name):
    function, make, num_batched = CASES[name]
    inputs = make()
    expected = function(*inputs)

    class Op(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = (tuple({0: batch} if place < num_batched else None for place in range(len(inputs))),)
    with ops.use_backend("reference"):
        with Operators() as operators:
            ours = function(*inputs)
        assert operators.found == []
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(Op(), tuple(inputs), dynamic_shapes=shapes)
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert not any("linvision" in call for call in calls)
        more = [torch.cat([x, x[:1]]) if place < num_batched else x for place, x in enumerate(inputs)]
        torch.testing.assert_close(program.module()(*more), function(*more), rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs), ours)


def test_reference_forms_have_second_derivatives():
    with ops.use_backend("reference"):
        scan = test_selective_scan.random_inputs(3, batch=1, width=1, num_states=2)
        tensors = [x.requires_grad_() for x in scan.values()]
        assert torch.autograd.gradgradcheck(lambda *x: ops.selective_scan(**dict(zip(scan, x, strict=True))), tensors)
        q, k, v, i, f = (x.requires_grad_() for x in test_mlstm.random_inputs(3, 2, batch=1, num_heads=1))
        assert torch.autograd.gradgradcheck(lambda *x: ops.mlstm(*x, i, f), (q, k, v))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 17, 300])
def test_the_mlstms_reference_form_is_its_definition(num_tokens, reverse):
    inputs = [x.requires_grad_() for x in test_mlstm.random_inputs(num_tokens, 4, batch=1)]
    state = ops.MLSTMState(
        torch.randn(1, 2, 4, 4).double().requires_grad_(), torch.randn(1, 2, 4).double(), torch.zeros(1, 2).double()
    )
    results = []
    for backend in ("reference", "sequential"):
        with ops.use_backend(backend):
            h, final = ops.mlstm(*inputs, initial_state=state, return_state=True, reverse=reverse)
        loss = (h * torch.linspace(-1, 1, h.numel()).view(h.shape)).sum() + final.C.sum() + final.n.square().sum()
        results.append([h, *final, *torch.autograd.grad(loss, [*inputs, state.C])])
    torch.testing.assert_close(*results)
