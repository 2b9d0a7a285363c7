"""Forms of layers compute what the definitions do, and stand aside as soon as anything inside a layer is changed."""

from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from linvision.models import use_forms
from linvision.models.forms import FORMS, form_of, form_of_stack, is_plain
from linvision.ops import use_backend
from tests.models.sizes import TEST_SIZES

KINDS: dict[str, tuple[str, dict]] = {
    "vil2": ("test_vil2", {}),
    "vil2 causal, no biases": ("test_vil2", {"conv_kind": "causal1d", "proj_bias": False, "norm_bias": False}),
    "vil": ("test_vil", {}),
    "vim": ("test_vim", {}),
    "vim v1, layer norm, scaled": ("test_vim", {"directions": "v1", "norm": "layer", "layer_scale": 0.5}),
    "vim one-way": ("test_vim", {"directions": "one-way", "class_token": "none"}),
    "vim paired": ("test_vim", {"directions": "paired", "rotary": "both", "class_token": "first"}),
    "l2vit": ("test_l2vit", {}),
}


PLAIN_KINDS = [kind for kind, (_, own) in KINDS.items() if not own]


def build(kind: str, **options) -> nn.Module:
    """Make a small model in which no parameter is zero or one, nor like another."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **own, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def layers_with_forms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if any(layer_class is type(layer) for layer_class, _ in FORMS)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(2)  # of dropped paths
    logits = model(images())
    (logits * torch.linspace(-1, 2, logits.numel()).view_as(logits)).sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


# Every form computes its layer's definition.


def test_the_small_models_have_every_form():
    seen = {type(layer) for kind in KINDS for layer in layers_with_forms(build(kind))}
    assert {layer_class for layer_class, _ in FORMS} <= seen
    with_forms = {name for name in TEST_SIZES if layers_with_forms(timm.create_model(name))}
    assert with_forms <= {name for name, _ in KINDS.values()}  # a new family joins in here


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_that_of_the_definitions(kind, dtype):
    model, batch = build(kind).to(dtype), images().to(dtype)
    with torch.no_grad():
        with use_forms(False):
            expected = model(batch)
        if "paired" not in kind:
            assert [type(layer).__name__ for layer in layers_with_forms(model) if form_of(layer) is None] == []
        torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
        with use_backend("plain"):
            torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_definitions(kind):
    model = build(kind, drop_path_rate=0.3).train()
    actual = gradients(model)
    with use_forms(False):
        expected = gradients(model)
    assert actual.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (actual[key] - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-2 * scale), key


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_that_of_the_definitions(kind):
    model, batch = build(kind), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with use_forms(False):
            expected = model(batch)
        assert (model(batch) - expected).norm() <= 0.03 * expected.norm()


def test_the_reference_backend_runs_definitions():
    layer = layers_with_forms(build("vil2"))[0]
    with torch.no_grad(), use_backend("reference"):
        assert form_of(layer) is None


# Changes of one module within a layer, each with what undoes it.


class Wrapper(nn.Module):
    """A module in another's place that does the same, as adapters do; it shows the inner one's parameters."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, *inputs):
        return self.inner(*inputs)


class Tagged(torch.Tensor):
    """A tensor of another kind, as quantised and distributed weights are."""


def hook(model, path):
    return model.get_submodule(path).register_forward_hook(lambda *_: None).remove


def pre_hook(model, path):
    return model.get_submodule(path).register_forward_pre_hook(lambda *_: None).remove


def backward_hook(model, path):
    return model.get_submodule(path).register_full_backward_hook(lambda *_: None).remove


def replaced_forward(model, path):
    module = model.get_submodule(path)
    module.forward = module.forward
    return lambda: delattr(module, "forward")


def replaced(model, path):
    module = model.get_submodule(path)
    model.set_submodule(path, Wrapper(module))
    return lambda: model.set_submodule(path, module)


def swapped(model, path):
    """A layer that is known, but not in this place."""
    module = model.get_submodule(path)
    model.set_submodule(path, nn.GELU() if not isinstance(module, nn.GELU) else nn.Linear(2, 2))
    return lambda: model.set_submodule(path, module)


def compiled(model, path):
    module = model.get_submodule(path)
    module._compiled_call_impl = module._call_impl  # what nn.Module.compile does, without a compiler
    return lambda: setattr(module, "_compiled_call_impl", None)


def tagged(model, path):
    module = model.get_submodule(path)
    name, parameter = next(iter(module.named_parameters(recurse=False)), (None, None))
    if name is None:
        return None
    setattr(module, name, nn.Parameter(parameter.detach().as_subclass(Tagged)))
    return lambda: setattr(module, name, parameter)


def pruned(model, path):
    module = model.get_submodule(path)
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return None
    kept = module.weight.detach().clone()
    prune.identity(module, "weight")

    def undo():
        prune.remove(module, "weight")
        module.weight.data.copy_(kept)

    return undo


def parametrised(model, path):
    module = model.get_submodule(path)
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return None
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return lambda: parametrize.remove_parametrizations(module, "weight")


CHANGES = [
    hook, pre_hook, backward_hook, replaced_forward, replaced, swapped, compiled, tagged, pruned, parametrised,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_any_change_anywhere_in_a_layer_switches_its_form_off(kind, change):
    model = build(kind)
    seen: set[type] = set()
    for layer in layers_with_forms(model):
        if type(layer) in seen:
            continue
        seen.add(type(layer))
        changed = 0
        for path, module in layer.named_modules():
            if not path or isinstance(module, nn.ModuleList):
                continue
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    before = form_of(layer)
                undo: Callable | None = change(layer, path)
                if undo is None:
                    continue
                with torch.set_grad_enabled(grad):
                    assert form_of(layer) is None, path
                undo()
                with torch.set_grad_enabled(grad):
                    assert (form_of(layer) is None) == (before is None), path
                changed += 1
        assert changed > 4


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_in_a_stack_switches_its_form_off(change):
    model = build("vim")
    with torch.no_grad():
        assert form_of_stack(model.layers) is not None
        undo = change(model.layers, "2.mixer.dt_proj_b")
        assert form_of_stack(model.layers) is None
        undo()
        assert form_of_stack(model.layers) is not None
    assert form_of_stack(model.layers) is None  # gradients


def test_global_hooks_switch_every_form_off():
    model = build("vil2")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert not any(form_of(layer) for layer in layers_with_forms(model))
        handle.remove()
        assert all(form_of(layer) for layer in layers_with_forms(model))


@pytest.mark.parametrize(
    "layer",
    [nn.GELU(approximate="tanh"), nn.LayerNorm(4, elementwise_affine=False), Wrapper(nn.GELU()), nn.Sequential()],
    ids=["tanh", "norm without parameters", "unknown class", "container"],
)
def test_layers_that_are_not_plain(layer):
    assert is_plain(nn.Sequential(nn.GELU())[0].eval(), True)
    assert not is_plain(layer.eval(), True)


def test_stochastic_depth_stays_where_it_is_wanted():
    for kind in ("vil2", "vim", "l2vit"):
        model = build(kind, drop_path_rate=0.9)
        for module in model.modules():
            if isinstance(module, DropPath):
                module.train()
        with torch.no_grad():
            assert not torch.equal(model(images(8)), model(images(8))), kind


# Whole models whose parts are watched or replaced.


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_heard_and_what_it_returned_is_left_alone(kind, grad):
    model, batch = build(kind), images()
    with torch.set_grad_enabled(grad):
        expected = model(batch)
        deaf = []
        for path, module in model.named_modules():
            if not path or isinstance(module, nn.ModuleList):
                continue
            kept, copies = [], []

            def keep(module, inputs, output, kept=kept, copies=copies):
                outputs = output if isinstance(output, tuple) else (output,)
                kept.extend(outputs)
                copies.extend(tensor.clone() for tensor in outputs)

            handle = module.register_forward_hook(keep)
            torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-5)
            handle.remove()
            deaf += [] if kept else [path]
            torch.testing.assert_close(kept, copies, rtol=0, atol=0)
    assert deaf == []


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_adapters_in_place_of_linear_layers_are_called(kind):
    class Doubling(Wrapper):
        def forward(self, x):
            return 2 * self.inner(x)

    model, batch = build(kind), images()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "head"]
    with torch.no_grad():
        before = model(batch)
        for path in paths[:: max(1, len(paths) // 12)]:
            original = model.get_submodule(path)
            for parameter in original.parameters():
                parameter *= 2
            expected = model(batch)
            for parameter in original.parameters():
                parameter /= 2
            model.set_submodule(path, Doubling(original))
            adapted = model(batch)
            model.set_submodule(path, original)
            torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(adapted, before, rtol=1e-5, atol=1e-6), path


@pytest.mark.parametrize("kind", ["vil2", "vim", "l2vit"])
def test_dynamically_quantised_models_run(kind):
    model, batch = build(kind), images()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, logits = model(batch), quantised(batch)
    assert not torch.equal(logits, expected)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.9


@pytest.mark.parametrize("kind", ["vil2", "vim", "l2vit"])
def test_compiled_models_mind_hooks_and_masks(kind):
    model, batch = build(kind), images()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "head"]
    model.get_submodule(paths[0]).register_forward_hook(lambda module, inputs, output: output * 0.5)
    masked = model.get_submodule(paths[-1])
    prune.l1_unstructured(masked, "weight", amount=0.5)
    masked.weight_orig.data.mul_(2)  # as an optimiser's step would, or loading
    with torch.no_grad():
        expected = model(batch)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(batch), expected, rtol=1e-3, atol=1e-4)


def test_a_layer_recomputed_by_checkpointing_has_the_same_gradients():
    model = build("vim")
    inputs = [torch.randn(1, 10, 32) for _ in range(2)]
    found = []
    for run in (model.layers[2], lambda *x: checkpoint(model.layers[2], *x, use_reentrant=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        hidden, residual = run(*leaves)
        (hidden.square() + residual).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*found)
