"""Forms: functions that may stand for a layer, since they compute the same in fewer passes over memory.

A layer's ``forward`` is its definition. A form reads the parameters of everything inside the layer and calls little of
it, so it may stand for the layer only while all of that is what the classes say: their annotated children, with plain
parameters, and nobody who listens to, replaces, prunes, quantises, adapts, compiles or offloads any of it. ``form_of``
asks that for ``Backbone``, in every mode, compiled graphs included.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import get_annotations
from typing import Any, Literal, get_args

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from linvision.ops import LayerNormParameters, LinearParameters
from linvision.ops.dispatch import is_traceable

Compute = Callable[..., Any]
# "inference": no gradients, and nothing within the layer is in training mode. "training": anywhere else as well.
# "stack": for each layer of a stack in inference, if it may stand for all of them.
When = Literal["inference", "training", "stack"]

# Modules of other packages that may stand inside a layer that has a form.
STANDARD = (nn.Linear, nn.LayerNorm, nn.GELU, nn.BatchNorm2d, nn.ModuleList, DropPath)

PLAIN = (nn.Parameter, Tensor, FakeTensor)  # kinds of parameters; a fake tensor stands for a plain one while tracing

FORMS: dict[tuple[type[nn.Module], When], Compute] = {}
_parts: dict[type[nn.Module], dict[str, tuple[type, ...]]] = {}  # annotated children of our own classes
_in_use = True


def stands_for(
    layer_class: type[nn.Module], when: When, *, within: tuple[type[nn.Module], ...] = ()
) -> Callable[[Compute], Compute]:
    """Register a function, called with the layer and what its ``forward`` takes, as a form of a class of layers.

    ``within`` names classes of ours in its lists of modules, which annotations do not tell.
    """

    def register(compute: Compute) -> Compute:
        for kind in (layer_class, *within):
            _note_parts(kind)
        FORMS[layer_class, when] = compute
        return compute

    return register


def form_of(layer: nn.Module) -> Compute | None:
    """Return the form that may stand for a layer here and now, called with what its ``forward`` takes, or None."""
    form = _form(type(layer), "inference")
    if form is not None and not torch.is_grad_enabled() and is_plain(layer, True):
        return partial(form, layer)
    form = _form(type(layer), "training")
    return partial(form, layer) if form is not None and is_plain(layer, False) else None


def form_of_stack(layers: nn.ModuleList) -> Compute | None:
    """Return the form that may stand for each layer of a stack here and now, called with the layer first, or None."""
    form = _form(type(layers[0]), "stack") if len(layers) else None
    return form if form is not None and not torch.is_grad_enabled() and is_plain(layers, True) else None


def _form(kind: type[nn.Module], when: When) -> Compute | None:
    """Look up a form; where definitions are to run there is none."""
    form = FORMS.get((kind, when))
    return form if form is not None and _in_use and not is_traceable() else None


@contextmanager
def use_forms(enable: bool) -> Iterator[None]:
    """Let models run their layers by definition (False), or by the forms that may stand for them (True, as usual)."""
    global _in_use
    before, _in_use = _in_use, enable
    try:
        yield
    finally:
        _in_use = before


def is_plain(module: nn.Module, inference: bool) -> bool:
    """Say whether a module and everything in it do what their parameters and classes say.

    ``inference`` also asks that none of them is in training mode.
    """
    return not _has_any_global_hook() and _is_plain(module, inference)


def is_listened_to(module: nn.Module) -> bool:
    """Say whether something happens when the module itself is called, beside its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in vars(module)
    )


def _is_plain(module: nn.Module, inference: bool) -> bool:
    kind, parts = type(module), _parts.get(type(module))
    if (inference and module.training) or is_listened_to(module) or (parts is None and kind not in STANDARD):
        return False
    for name, parameter in module._parameters.items():
        if type(parameter) not in PLAIN and not (parameter is None and name == "bias"):
            return False
    if kind is nn.GELU and module.approximate != "none":
        return False
    for name, child in module._modules.items():
        if child is None or (parts is not None and type(child) not in parts.get(name, ())):
            return False
        if not _is_plain(child, inference):
            return False
    return True


def _note_parts(layer_class: type[nn.Module]) -> None:
    """Note the children that a class of ours, and those of ours among them, are annotated with."""
    if layer_class in STANDARD or layer_class in _parts:
        return
    _parts[layer_class] = {}
    for base in layer_class.__mro__:
        if not base.__module__.startswith("linvision."):
            continue
        for name, annotation in get_annotations(base, eval_str=True).items():
            classes = [kind for kind in get_args(annotation) or (annotation,) if isinstance(kind, type)]
            modules = tuple(kind for kind in classes if issubclass(kind, nn.Module))
            if modules:
                _parts[layer_class].setdefault(name, modules)
                for kind in modules:
                    _note_parts(kind)


def linear_parameters(layer: nn.Linear) -> LinearParameters:
    """Return a layer's parameters."""
    return LinearParameters(layer.weight, layer.bias)


def halves(layer: nn.Linear) -> tuple[LinearParameters, LinearParameters]:
    """Return a layer's parameters as those of two, one for each half of its outputs."""
    weights = layer.weight.chunk(2)
    biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
    return LinearParameters(weights[0], biases[0]), LinearParameters(weights[1], biases[1])


def layer_norm_parameters(layer: nn.LayerNorm) -> LayerNormParameters:
    """Return a layer's parameters."""
    return LayerNormParameters(layer.weight, layer.bias, layer.eps)
