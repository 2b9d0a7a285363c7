"""Models in inference, where kernels read the parameters of standard layers, do what the layers themselves would do."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import linvision
from linvision.models import _fusion
from linvision.ops import use_backend

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


def test_pruned_and_parametrised_layers_are_not_standard():
    linear = nn.Linear(4, 4).eval()
    assert _fusion.fusible(linear)
    assert not _fusion.fusible(prune.l1_unstructured(nn.Linear(4, 4).eval(), "weight", amount=0.5))
    parametrize.register_parametrization(linear, "weight", nn.Softplus())
    assert not _fusion.fusible(linear.eval())


def test_training_mode_keeps_stochastic_depth():
    torch.manual_seed(0)
    model = linvision.create_model("l2vit_tiny", drop_path_rate=0.9).train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
