"""The published L2ViT models: registered names and their checkpoint files, of which none are public.

Accuracies are those of the paper ("The Linear Attention Resurrection in Vision Transformer"), ImageNet-1K validation,
top-1 in %.
"""

import re
from typing import Any

from timm.models import adapt_input_conv, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from linvision.models._backbone import Published, build, classifier_cfg, pair
from linvision.models._checkpoints import StateDict, unwrap
from linvision.models.l2vit import L2ViT


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Fit a file of the published training code: its keys are the model's own.

    The classifier, and its norm, are dropped where the model has none. The norms of dense tasks, which a classifier's
    file lacks, stay as they are in the model. A first convolution of 3 channels is adapted to the model's number.
    """
    state_dict = unwrap(state_dict, "checkpoint")
    own = model.state_dict()
    for part in ("head.", "norm."):
        if not any(key.startswith(part) for key in own):
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(part)}
    if not any(re.match(r"norm\d", key) for key in state_dict):
        state_dict |= {key: value for key, value in own.items() if re.match(r"norm\d", key)}
    stem = "downsample_layers.0.proj.proj.0.weight"
    if stem in state_dict and state_dict[stem].shape[1] == 3 != own[stem].shape[1]:
        state_dict[stem] = adapt_input_conv(own[stem].shape[1], state_dict[stem])
    return state_dict


def to_release(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Lay weights out as the published training code saves them, under "model"."""
    return {"model": state_dict}


def _cfg(**changes: Any) -> dict[str, Any]:
    first_conv = "downsample_layers.0.proj.proj.0"
    return classifier_cfg(paper_name="L2ViT", **{"first_conv": first_conv, "crop_pct": 0.875, **changes})


default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny": _cfg(),
        "l2vit_small": _cfg(),
        "l2vit_base": _cfg(),
        "l2vit_base_384": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
    }
)

UNPUBLISHED = "no weights were ever published"

PUBLISHED = {
    "l2vit_tiny": Published(83.1, UNPUBLISHED),
    "l2vit_small": Published(84.1, UNPUBLISHED),
    "l2vit_base": Published(84.4, f"86.0 after ImageNet-22K; {UNPUBLISHED}"),
    "l2vit_base_384": Published(87.0, f"after ImageNet-22K; {UNPUBLISHED}"),
}

# The function names of the published code.
ALIASES = {
    "L2ViT_Tiny": "l2vit_tiny",
    "L2ViT_Small": "l2vit_small",
    "L2ViT_Base": "l2vit_base",
    "L2ViT_Base_384": "l2vit_base_384",
}

BASE = {"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}


class NormedFeatures(FeatureGetterNet):
    """timm's feature extractor with each map through its own norm, as dense tasks use L2ViT."""

    def __init__(self, model: L2ViT, out_indices: tuple[int, ...]) -> None:
        super().__init__(model, out_indices, norm=model.feature_norms)


def _build(variant: str, pretrained: bool, overrides: dict[str, Any], **defaults: Any) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"{variant}: {UNPUBLISHED} for L2ViT; pass the file of a model that you trained as checkpoint_path, or "
            "take a backbone with published weights, such as vil2_tiny_patch16_224"
        )
    overrides = dict(overrides)
    size = overrides.pop("img_size", None)
    if size is not None:  # the model takes any size; what feeds it must know
        overlay = {"input_size": (overrides.get("in_chans", 3), *pair(size))}
        overrides["pretrained_cfg_overlay"] = {**(overrides.get("pretrained_cfg_overlay") or {}), **overlay}
    dense = {"feature_norms": True, "feature_cls": NormedFeatures} if overrides.get("features_only") else {}
    return build(
        L2ViT,
        variant,
        pretrained,
        defaults={**defaults, **dense},
        overrides=overrides,
        filter_fn=checkpoint_filter_fn,
        out_indices=(0, 1, 2, 3),
    )


@register_model
def l2vit_tiny(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """L2ViT-T: 28.6 M parameters. Trained with a drop-path rate of 0.1."""
    return _build("l2vit_tiny", pretrained, overrides)


@register_model
def l2vit_small(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """L2ViT-S: 50 M parameters. Trained with a drop-path rate of 0.2."""
    return _build("l2vit_small", pretrained, overrides, depths=(2, 2, 18, 2))


@register_model
def l2vit_base(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """L2ViT-B: 89 M parameters. Trained with a drop-path rate of 0.3."""
    return _build("l2vit_base", pretrained, overrides, **BASE)


@register_model
def l2vit_base_384(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """L2ViT-B for images of 384x384: windows of 12 x 12 tokens."""
    return _build("l2vit_base_384", pretrained, overrides, **BASE, window_size=12)
