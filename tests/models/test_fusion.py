"""Models in inference, where kernels read the parameters of standard layers, do what the layers themselves would do."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import linvision
from linvision.models import _fusion
from linvision.ops import use_backend

COMPOSED = {
    "vil2_tiny_patch16_224": ("blocks.1.rowwise_from_top_left.layer", "blocks.1.rowwise_from_top_left.drop_path"),
    "vim_tiny_patch16_224": ("layers.3", "layers.3.mixer", "layers.3.drop_path", "pos_drop"),
    "l2vit_tiny": ("stages.0.0.attn", "stages.0.1.attn", "stages.0.0.mlp", "stages.0.0.drop_path"),
}
MODELS = {
    "vil2_tiny_patch16_224": "blocks.0.rowwise_from_top_left",
    "vim_tiny_patch16_224": "layers.1",
    "l2vit_tiny": "stages.0.0",
}
LINEARS = {
    "vil2_tiny_patch16_224": ("layer.proj_up", "layer.proj_down", "norm"),
    "vim_tiny_patch16_224": ("mixer.in_proj", "mixer.out_proj", "mixer.x_proj", "mixer.dt_proj_b"),
    "l2vit_tiny": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2", "mlp.act"),
}
LAYERS = [(name, layer) for name, layers in LINEARS.items() for layer in layers]


def small(name):
    torch.manual_seed(0)
    model = linvision.create_model(name, num_classes=7, **({} if name == "l2vit_tiny" else {"img_size": 48})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none of them is zero or one, nor like another
            parameter += 0.02 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, 48, 48)


@pytest.mark.parametrize("name", MODELS)
def test_inference_equals_the_forward_pass_of_training(name):
    model, images = small(name)
    with use_backend("plain"):
        expected = model(images).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        model.double()
        torch.testing.assert_close(model(images.double()).float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_hooks_of_layers_are_heard(name, layer):
    model, images = small(name)
    module, calls = model.get_submodule(f"{MODELS[name]}.{layer}"), []
    with torch.inference_mode():
        expected = model(images)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: calls.append(args))
            torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
    assert len(calls) == 2


class Adapter(nn.Module):
    """A layer around a layer, as adapters for fine-tuning are; it shows the inner one's weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize(
    ("name", "layer"), [(name, layer) for name, layer in LAYERS if "proj" in layer or "fc" in layer]
)
def test_layers_that_stand_in_for_others_are_called(name, layer):
    model, images = small(name)
    path = f"{MODELS[name]}.{layer}"
    original = model.get_submodule(path)
    with torch.inference_mode():
        before = model(images)
    for parameter in original.parameters(recurse=False):
        parameter.data *= 2
    with torch.inference_mode():
        expected = model(images)
    for parameter in original.parameters(recurse=False):
        parameter.data /= 2
    model.set_submodule(path, Adapter(original))
    with torch.inference_mode():
        adapted = model(images)
    assert not torch.allclose(adapted, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in COMPOSED.items() for layer in layers])
def test_composed_layers_are_heard_and_what_they_return_is_left_alone(name, layer):
    model, images = small(name)
    kept, copies = [], []

    def keep(module, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        kept.extend(outputs)
        copies.extend(tensor.clone() for tensor in outputs)

    model.get_submodule(layer).register_forward_hook(keep)
    expected = model(images)
    recorded = [tensor.detach() for tensor in copies]
    kept.clear()
    copies.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected.detach(), rtol=1e-4, atol=1e-5)
    assert len(recorded) == len(kept) > 0
    torch.testing.assert_close(kept, copies, rtol=0, atol=0)
    torch.testing.assert_close(kept, recorded, rtol=1e-3, atol=1e-4)


class Wrapper(nn.Module):
    """A layer in another's place that does the same."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name, layers in COMPOSED.items() for layer in layers])
def test_composed_layers_can_be_replaced(name, layer):
    model, images = small(name)
    with torch.no_grad():
        expected = model(images)
        model.set_submodule(layer, Wrapper(model.get_submodule(layer)))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


class Tagged(torch.Tensor):
    """A tensor of another kind, as quantised and distributed weights are."""


def changed_layers():
    def linear():
        return nn.Linear(4, 4).eval()

    offloaded, hooked, wrapped, parametrised = linear(), linear(), linear(), linear()
    offloaded.forward = lambda x: x
    hooked.register_full_backward_hook(lambda *args: None)
    wrapped.weight = nn.Parameter(wrapped.weight.detach().as_subclass(Tagged))
    parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    return {
        "pruned": prune.l1_unstructured(linear(), "weight", amount=0.5),
        "parametrised": parametrised.eval(),
        "offloaded": offloaded,
        "hooked": hooked,
        "wrapped": wrapped,
        "tanh": nn.GELU(approximate="tanh").eval(),
        "norm without parameters": nn.LayerNorm(4, elementwise_affine=False).eval(),
        "in training": nn.Linear(4, 4),
    }


@pytest.mark.parametrize("change", changed_layers())
def test_changed_layers_are_not_standard(change):
    assert _fusion.fusible(nn.Linear(4, 4).eval(), nn.GELU().eval(), nn.LayerNorm(4).eval())
    assert not _fusion.fusible(changed_layers()[change])


@pytest.mark.parametrize("name", MODELS)
def test_dynamically_quantised_models_run(name):
    model, images = small(name)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, logits = model(images), quantised(images)
    assert not torch.equal(logits, expected)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.9


@pytest.mark.parametrize("name", ["vil2_tiny_patch16_224", "l2vit_tiny"])
def test_stochastic_depth_stays_where_it_is_wanted(name):
    torch.manual_seed(0)
    model = linvision.create_model(name, drop_path_rate=0.9).eval()
    images = torch.randn(2, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.train()
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))


def test_a_layer_recomputed_by_checkpointing_has_the_same_gradients():
    model, _ = small("vim_tiny_patch16_224")
    inputs = [torch.randn(1, 10, 192) for _ in range(2)]
    gradients = []
    for run in (model.layers[2], lambda *x: checkpoint(model.layers[2], *x, use_reentrant=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        hidden, residual = run(*leaves)
        (hidden.square() + residual).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)
