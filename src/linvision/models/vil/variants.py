"""The published ViL models: registered names, checkpoint files, published constructor arguments.

Accuracies are those of the paper (arXiv 2406.04303) and its checkpoints, ImageNet-1K validation, top-1 in %.
"""

import logging
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from linvision.models.builder import Family, Published, build, classifier_cfg
from linvision.models.vil.model import VisionLSTM, VisionLSTM2
from linvision.models.vil.release import RELEASE

DOWNLOADS = "https://ml.jku.at/research/vision_lstm/download/"

logger = logging.getLogger(__name__)


def _cfg(file: str, **changes: Any) -> dict[str, Any]:
    return classifier_cfg(url=f"{DOWNLOADS}{file}", paper_ids="arXiv:2406.04303", paper_name="Vision-LSTM", **changes)


WRONG_STRIDE = (
    "the published list names the stride-16 file for this stride-8 model as well: "
    "it loads, but cannot give the accuracy reported in the paper"
)

default_cfgs = generate_default_cfgs(
    {
        "vil2_tiny_patch16_224.e800_in1k": _cfg("vil2_tiny16_e800_in1k.th"),
        "vil2_tiny_patch16_224.e400_in1k": _cfg("vil2_tiny16_e400_in1k.th"),
        "vil2_small_patch16_224.e400_in1k": _cfg("vil2_small16_e400_in1k.th"),
        "vil2_base_patch16_224.e400_in1k": _cfg("vil2_base16_e400_in1k.th"),
        "vil2_mini_patch4_32": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
        "test_vil2": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
        "test_vil": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
        "vil_tiny_patch16_224.e800_in1k": _cfg("vil_tiny16_e800_in1k.th"),
        "vil_tiny_patch16_224.e400_in1k": _cfg("vil_tiny16_e400_in1k.th"),
        "vil_tinyplus_patch16_224.e800_in1k": _cfg("vil_tinyplus16_e800_in1k.th"),
        "vil_tinyplus_patch16_224.e400_in1k": _cfg("vil_tinyplus16_e400_in1k.th"),
        "vil_tinyplus_patch16_stride8_224.e800_in1k": _cfg("vil_tinyplus16_e800_in1k.th"),
        "vil_small_patch16_224.e400_in1k": _cfg("vil_small16_e400_in1k.th"),
        "vil_smallplus_patch16_224.e400_in1k": _cfg("vil_smallplus16_e400_in1k.th"),
        "vil_smallplus_patch16_stride8_224.e400_in1k": _cfg("vil_smallplus16_e400_in1k_stride8.th"),
        "vil_base_patch16_224.e400_in1k": _cfg("vil_base16_e400_in1k.th"),
        "vil_base_patch16_stride8_224.e400_in1k": _cfg("vil_base16_e400_in1k_stride8.th"),
    }
)

PUBLISHED = {
    "vil2_tiny_patch16_224.e800_in1k": Published(78.3),
    "vil2_tiny_patch16_224.e400_in1k": Published(77.2),
    "vil2_small_patch16_224.e400_in1k": Published(81.5),
    "vil2_base_patch16_224.e400_in1k": Published(82.4),
    "vil_tiny_patch16_224.e800_in1k": Published(77.3),
    "vil_tiny_patch16_224.e400_in1k": Published(76.1),
    "vil_tinyplus_patch16_224.e800_in1k": Published(78.1),
    "vil_tinyplus_patch16_224.e400_in1k": Published(77.2),
    "vil_tinyplus_patch16_stride8_224.e800_in1k": Published(80.0, WRONG_STRIDE),
    "vil_small_patch16_224.e400_in1k": Published(80.7),
    "vil_smallplus_patch16_224.e400_in1k": Published(80.9),
    "vil_smallplus_patch16_stride8_224.e400_in1k": Published(82.2),
    "vil_base_patch16_224.e400_in1k": Published(81.6),
    "vil_base_patch16_stride8_224.e400_in1k": Published(82.7),
}

# The names of the published hub.
ALIASES = {
    "vil2-tiny": "vil2_tiny_patch16_224.e800_in1k",
    "vil2-tiny-e400": "vil2_tiny_patch16_224.e400_in1k",
    "vil2-small": "vil2_small_patch16_224.e400_in1k",
    "vil2-base": "vil2_base_patch16_224.e400_in1k",
    "vil-tiny": "vil_tiny_patch16_224.e800_in1k",
    "vil-tiny-e400": "vil_tiny_patch16_224.e400_in1k",
    "vil-tinyplus": "vil_tinyplus_patch16_224.e800_in1k",
    "vil-tinyplus-e400": "vil_tinyplus_patch16_224.e400_in1k",
    "vil-tinyplus-stride8": "vil_tinyplus_patch16_stride8_224.e800_in1k",
    "vil-small": "vil_small_patch16_224.e400_in1k",
    "vil-smallplus": "vil_smallplus_patch16_224.e400_in1k",
    "vil-smallplus-stride8": "vil_smallplus_patch16_stride8_224.e400_in1k",
    "vil-base": "vil_base_patch16_224.e400_in1k",
    "vil-base-stride8": "vil_base_patch16_stride8_224.e400_in1k",
}

FAMILY = Family("ViL", RELEASE, default_cfgs, PUBLISHED, ALIASES)


def _build(
    model_class: type[VisionLSTM2 | VisionLSTM],
    variant: str,
    pretrained: bool,
    overrides: dict[str, Any],
    **defaults: Any,
) -> nn.Module:
    depth = overrides.get("depth", defaults.get("depth", 12 if model_class is VisionLSTM2 else 24))
    return build(
        model_class,
        variant,
        pretrained,
        family=FAMILY,
        defaults={"legacy_norm": True, **defaults},
        overrides=overrides,
        # The layers that the paper's segmentation heads read: a third, a half, two thirds and all of the depth.
        out_indices=tuple(sorted({max(depth * part // 6, 1) - 1 for part in (2, 3, 4, 6)})),
    )


@register_model
def vil2_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-T of the second generation: 6.4 M parameters."""
    return _build(VisionLSTM2, "vil2_tiny_patch16_224", pretrained, overrides, dim=192)


@register_model
def vil2_small_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-S of the second generation: 23.4 M parameters. Trained with a drop-path rate of 0.05."""
    return _build(VisionLSTM2, "vil2_small_patch16_224", pretrained, overrides, dim=384)


@register_model
def vil2_base_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-B of the second generation. Trained with a drop-path rate of 0.2."""
    return _build(VisionLSTM2, "vil2_base_patch16_224", pretrained, overrides, dim=768)


@register_model
def vil2_mini_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL for small images such as digits: 32x32 pixels, patches of 4, four mLSTM layers. No published weights."""
    own = {"img_size": 32, "patch_size": 4, "depth": 2, "legacy_norm": False}
    return _build(VisionLSTM2, "vil2_mini_patch4_32", pretrained, overrides, dim=192, **own)


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-T of the first generation: 6.1 M parameters."""
    return _build(VisionLSTM, "vil_tiny_patch16_224", pretrained, overrides, dim=192)


@register_model
def vil_small_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-S of the first generation."""
    return _build(VisionLSTM, "vil_small_patch16_224", pretrained, overrides, dim=384)


@register_model
def vil_base_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-B of the first generation."""
    return _build(VisionLSTM, "vil_base_patch16_224", pretrained, overrides, dim=768)


@register_model
def vil_tinyplus_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-T+ of the first generation: 29 layers."""
    return _build(VisionLSTM, "vil_tinyplus_patch16_224", pretrained, overrides, dim=192, depth=29)


@register_model
def vil_smallplus_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-S+ of the first generation: 26 layers."""
    return _build(VisionLSTM, "vil_smallplus_patch16_224", pretrained, overrides, dim=384, depth=26)


@register_model
def vil_tinyplus_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-T+ fine-tuned on 729 overlapping patches; see PUBLISHED for what its published file is worth."""
    if pretrained:
        logger.warning("vil_tinyplus_patch16_stride8_224: %s", WRONG_STRIDE)
    return _build(VisionLSTM, "vil_tinyplus_patch16_stride8_224", pretrained, overrides, dim=192, depth=29, stride=8)


@register_model
def vil_smallplus_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-S+ fine-tuned on 729 overlapping patches."""
    return _build(VisionLSTM, "vil_smallplus_patch16_stride8_224", pretrained, overrides, dim=384, depth=26, stride=8)


@register_model
def vil_base_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL-B fine-tuned on 729 overlapping patches."""
    return _build(VisionLSTM, "vil_base_patch16_stride8_224", pretrained, overrides, dim=768, stride=8)


@register_model
def test_vil2(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL of the second generation as small as it gets, for tests: two pairs of layers, 32 channels, patches of 8."""
    own = {"img_size": 32, "patch_size": 8, "depth": 2}
    return _build(VisionLSTM2, "test_vil2", pretrained, overrides, dim=32, **own)


@register_model
def test_vil(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """ViL of the first generation as small as it gets, for tests: four layers, 32 channels, overlapping patches."""
    own = {"img_size": 32, "patch_size": 8, "stride": 4, "depth": 4}
    return _build(VisionLSTM, "test_vil", pretrained, overrides, dim=32, **own)


def vision_lstm2(**arguments: Any) -> VisionLSTM2:
    """Build a VisionLSTM2 from the published constructor arguments and their defaults; no others are taken."""
    return VisionLSTM2(**from_published_arguments(VisionLSTM2, arguments))


def vision_lstm(**arguments: Any) -> VisionLSTM:
    """Build a VisionLSTM from the published constructor arguments and their defaults; no others are taken."""
    return VisionLSTM(**from_published_arguments(VisionLSTM, arguments))


def from_published_arguments(
    model_class: type[VisionLSTM2 | VisionLSTM], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Translate published constructor arguments into those of the class.

    ``input_shape`` (C, H, W) becomes in_chans and img_size, ``output_shape`` (classes,) num_classes and ``pooling``
    global_pool; ``mode`` is "classifier", or "features" or None for no classifier. The other names are shared.

    Raises:
        ValueError: for values that the published models do not know.
    """
    own = dict(arguments)
    if "input_shape" in own:
        own["in_chans"], *own["img_size"] = own.pop("input_shape")
    if "pooling" in own:
        own["global_pool"] = own.pop("pooling")
    alternation = own.pop("alternation", "bidirectional")
    if alternation != "bidirectional":
        raise ValueError(f"alternation={alternation!r}: layers alternate as 'bidirectional' only")
    mode, output_shape = own.pop("mode", "classifier"), own.pop("output_shape", (1000,))
    if mode not in ("classifier", "features", None):
        raise ValueError(f"mode={mode!r}: use 'classifier', or 'features' or None for no classifier")
    if mode != "classifier":
        own["num_classes"] = 0
        if model_class is VisionLSTM2:
            own["legacy_norm"] = False  # in the second generation a part of the classifier
    elif output_shape is None or len(output_shape) != 1:
        raise ValueError(f"output_shape={output_shape!r}: a classifier needs (number of classes,)")
    else:
        own["num_classes"] = output_shape[0]
    return own
