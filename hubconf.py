"""The published names for ``torch.hub.load``: the models' own arguments, or the published ones where a name has them.

    model = torch.hub.load("OWNER/linvision", "vil2-tiny")                      # with its published weights
    model = torch.hub.load("OWNER/linvision", "VisionLSTM2", dim=192, depth=12, input_shape=(3, 224, 224))

ViL and DeiT-III names load their published weights unless ``pretrained=False``; Vim and L2ViT names, as published, do
not unless asked.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub"]

sys.path.insert(0, str(Path(__file__).parent / "src"))

from linvision.models import VisionLSTM as _VisionLSTM  # noqa: E402
from linvision.models import VisionLSTM2 as _VisionLSTM2  # noqa: E402
from linvision.models import create_model  # noqa: E402
from linvision.models.checkpoints import load_weights  # noqa: E402
from linvision.models.deit3 import variants as deit3  # noqa: E402
from linvision.models.l2vit import variants as l2vit  # noqa: E402
from linvision.models.vil import variants as vil  # noqa: E402
from linvision.models.vim import variants as vim  # noqa: E402


def VisionLSTM2(**arguments: Any) -> nn.Module:  # noqa: N802
    """Build a second-generation ViL from the published constructor arguments."""
    return vil.vision_lstm2(**arguments)


def VisionLSTM(**arguments: Any) -> nn.Module:  # noqa: N802
    """Build a first-generation ViL from the published constructor arguments."""
    return vil.vision_lstm(**arguments)


def VisionMamba(**arguments: Any) -> nn.Module:  # noqa: N802
    """Build a Vim from the published constructor arguments."""
    return vim.from_published_arguments(**arguments)


def _vil(alias: str) -> Callable[..., nn.Module]:
    model_class = _VisionLSTM2 if alias.startswith("vil2") else _VisionLSTM

    def entry(pretrained: bool = True, **arguments: Any) -> nn.Module:
        if arguments:
            arguments = vil.from_published_arguments(model_class, arguments)
        return create_model(alias, pretrained=pretrained, **arguments)

    entry.__doc__ = f"Build {vil.ALIASES[alias]}; takes the published constructor arguments."
    return entry


def _named(alias: str, name: str, *, pretrained: bool) -> Callable[..., nn.Module]:
    default = pretrained

    def entry(pretrained: bool = default, **overrides: Any) -> nn.Module:
        return create_model(alias, pretrained=pretrained, **overrides)

    entry.__doc__ = f"Build {name}; takes the overrides of linvision.create_model."
    return entry


def _vim(alias: str) -> Callable[..., nn.Module]:
    def entry(pretrained: bool = False, **arguments: Any) -> nn.Module:
        model = vim.from_published_arguments(**{**vim.FUNCTION_ARGUMENTS[alias], **arguments})
        if pretrained:
            weights = create_model(alias, pretrained=True).state_dict()
            load_weights(model, weights, alias, release=vim.RELEASE, drop_head=model.num_classes != 1000)
        return model

    entry.__doc__ = f"Build {vim.ALIASES[alias]}; takes the published constructor arguments."
    return entry


globals().update({alias: _vil(alias) for alias in vil.ALIASES})
globals().update({alias: _vim(alias) for alias in vim.ALIASES})
globals().update({alias: _named(alias, name, pretrained=True) for alias, name in deit3.ALIASES.items()})
globals().update({alias.replace("-", "_"): globals()[alias] for alias in (*vil.ALIASES, *deit3.ALIASES)})
globals().update({alias: _named(alias, name, pretrained=False) for alias, name in l2vit.ALIASES.items()})
