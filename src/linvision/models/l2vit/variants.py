"""The published L2ViT models: registered names and their checkpoint files, of which none are public.

Accuracies are those of the paper ("The Linear Attention Resurrection in Vision Transformer"), ImageNet-1K validation,
top-1 in %.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from linvision.models.builder import Family, Published, build, classifier_cfg
from linvision.models.l2vit.model import L2ViT
from linvision.models.l2vit.release import RELEASE
from linvision.models.patches import pair


def _cfg(**changes: Any) -> dict[str, Any]:
    first_conv = "downsample_layers.0.proj.proj.0"
    return classifier_cfg(paper_name="L2ViT", **{"first_conv": first_conv, "crop_pct": 0.875, **changes})


default_cfgs = generate_default_cfgs(
    {
        "l2vit_tiny": _cfg(),
        "l2vit_small": _cfg(),
        "l2vit_base": _cfg(),
        "l2vit_base_384": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "test_l2vit": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0),
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

FAMILY = Family("L2ViT", RELEASE, default_cfgs, PUBLISHED, ALIASES, UNPUBLISHED)


class NormedFeatures(FeatureGetterNet):
    """timm's feature extractor with each map through its own norm, as dense tasks use L2ViT."""

    def __init__(self, model: L2ViT, out_indices: tuple[int, ...], **options: Any) -> None:
        super().__init__(model, out_indices, **{**options, "norm": model.feature_norms, "output_fmt": "NCHW"})


def _build(variant: str, pretrained: bool, overrides: dict[str, Any], **defaults: Any) -> nn.Module:
    overrides = dict(overrides)
    size = overrides.pop("img_size", None)
    if size is not None:  # the model takes any size; what feeds it must know
        overlay = {"input_size": (overrides.get("in_chans", 3), *pair(size))}
        overrides["pretrained_cfg_overlay"] = {**(overrides.get("pretrained_cfg_overlay") or {}), **overlay}
    dense: dict[str, Any] = {}
    if overrides.get("features_only") and "feature_cls" not in overrides:
        dense = {"feature_norms": True, "feature_cls": NormedFeatures}
    return build(
        L2ViT,
        variant,
        pretrained,
        family=FAMILY,
        defaults={**defaults, **dense},
        overrides=overrides,
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


@register_model
def test_l2vit(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """L2ViT as small as it gets, for tests: four stages of up to two blocks, 16 to 64 channels, windows of 2 x 2."""
    own = {"depths": (1, 2, 2, 1), "dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4), "window_size": 2}
    return _build("test_l2vit", pretrained, overrides, **own)
