"""Models as compilers see them on a GPU that need not be there: one graph, in which the GPU's kernels stand."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from linvision import create_model
from linvision.ops.backends.triton import device

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

SIZES = {"img_size": 32, "depth": 1, "num_classes": 3}
OPS = {
    "vil2_mini_patch4_32": {"depthwise_conv": 2, "mlstm_inputs": 2, "mlstm": 2, "gated_head_norm": 2},
    "vil_tiny_patch16_224": {"depthwise_conv": 1, "mlstm_inputs": 1, "mlstm": 1, "gated_head_norm": 1},
    "vim_mini_patch4_32": {"depthwise_conv": 2, "selective_scan": 2},
    "test_l2vit": {"depthwise_conv": 14},
}


@pytest.fixture(autouse=True)
def modern_gpu(monkeypatch):
    """Let torch believe in a GPU of compute capability 9.0, and Triton that it compiles for it."""
    monkeypatch.setattr(device, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    torch._dynamo.reset()


def put_on_gpu(model: nn.Module) -> None:
    """Replace parameters and buffers by ones without data, there."""
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(x.shape, device="cuda")))
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(x.shape, device="cuda"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_models_are_one_graph_with_the_kernels_of_a_gpu(name, training, precision):
    side, sizes = (32, {"num_classes": 3} if name == "test_l2vit" else SIZES)
    model = create_model(name, **sizes).train(training)
    found: list[str] = []

    def note(graph, inputs):
        calls = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        found.extend(call.split(".")[1] for call in calls if call.startswith("linvision."))
        return graph.forward

    with FakeTensorMode():
        put_on_gpu(model)
        images = torch.empty(2, 3, side, side, device="cuda")
        with (
            torch.set_grad_enabled(training),
            torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            logits = torch.compile(model, backend=note, fullgraph=True)(images)
    assert logits.shape == (2, 3)
    assert {op: found.count(op) for op in found} == OPS[name]
