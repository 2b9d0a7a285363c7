"""The published ViL models: registered names, checkpoint files and their key tables.

Accuracies are those of the paper (arXiv 2406.04303) and its checkpoints, ImageNet-1K validation, top-1 in %.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from linvision.errors import CheckpointError
from linvision.models._backbone import Published, build, classifier_cfg, resize_grid
from linvision.models._checkpoints import StateDict, rename, unwrap
from linvision.models.vil import VisionLSTM, VisionLSTM2

DOWNLOADS = "https://ml.jku.at/research/vision_lstm/download/"

# Release key (a regular expression) -> architecture key. In the second generation two layers make a block.
RELEASE_KEYS_1 = {
    r"xlstm\.blocks\.(\d+)\.xlstm\.": r"blocks.\1.layer.",
    r"xlstm\.blocks\.(\d+)\.xlstm_norm\.": r"blocks.\1.norm.",
    r"xlstm\.post_blocks_norm\.": "legacy_norm.",
    r"head\.0\.": "norm.",
    r"head\.1\.": "head.",
}
RELEASE_KEYS_2 = {
    r"xlstm\.blocks\.(\d+)\.xlstm\.conv1d\.": r"blocks.\1.layer.conv.",
    r"xlstm\.blocks\.(\d+)\.xlstm\.": r"blocks.\1.layer.",
    r"xlstm\.blocks\.(\d+)\.xlstm_norm\.": r"blocks.\1.norm.",
    r"xlstm\.post_blocks_norm\.": "norm.",
    r"head\.0\.": "legacy_norm.",
    r"head\.1\.": "head.",
}
PAIR = ("rowwise_from_top_left", "rowwise_from_bot_right")

logger = logging.getLogger(__name__)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Rename a release file's keys, drop what a model without classifier has no place for, resize the table."""
    state_dict = unwrap(state_dict, "checkpoint")
    second = isinstance(model, VisionLSTM2)
    if any(key.startswith("xlstm.") for key in state_dict):
        if second == any(".conv1d.conv." in key for key in state_dict):
            own, other = ("second", "first") if second else ("first", "second")
            raise CheckpointError(f"the file holds a {other}-generation ViL but the model is of the {own} generation")
        state_dict = _paired(rename(state_dict, RELEASE_KEYS_2)) if second else rename(state_dict, RELEASE_KEYS_1)
    own = model.state_dict()
    if not any(key.startswith("head.") for key in own):
        # The classifier's own parts; a token norm (first generation) is a part of the features and stays.
        state_dict = {key: x for key, x in state_dict.items() if not key.startswith("head.")}
        if second and "legacy_norm.weight" not in own:
            state_dict = {key: x for key, x in state_dict.items() if not key.startswith("legacy_norm.")}
    table = state_dict.get("pos_embed.embed")
    if table is not None and table.ndim == 4 and table.shape[-1] == own["pos_embed.embed"].shape[-1]:
        state_dict["pos_embed.embed"] = resize_grid(table.float(), own["pos_embed.embed"].shape[1:3])
    return state_dict


def to_release(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Turn architecture keys back into the layout of the released files, under "state_dict"."""
    renamed = {}
    for key, value in state_dict.items():
        second = re.match(rf"blocks\.(\d+)\.({'|'.join(PAIR)})\.(.*)", key)
        first = re.match(r"blocks\.(\d+)\.(.*)", key)
        if second:
            rest = re.sub(r"^layer\.conv\.", "layer.conv1d.", second[3])
            new_key = _release_layer(2 * int(second[1]) + PAIR.index(second[2]), rest)
        elif first:
            new_key = _release_layer(int(first[1]), first[2])
        else:
            new_key = key
        renamed[new_key] = value
    paired = any(name in key for key in state_dict for name in PAIR)
    post, head = ("norm.", "legacy_norm.") if paired else ("legacy_norm.", "norm.")
    table = {post: "xlstm.post_blocks_norm.", head: "head.0.", "head.": "head.1."}
    return {"state_dict": rename(renamed, {re.escape(old): new for old, new in table.items()})}


def _release_layer(index: int, rest: str) -> str:
    part = {"layer.": "xlstm.", "norm.": "xlstm_norm."}
    return f"xlstm.blocks.{index}." + next(
        new + rest.removeprefix(old) for old, new in part.items() if rest.startswith(old)
    )


def _paired(state_dict: StateDict) -> StateDict:
    """Number layers as pairs: layer j of a flat list is half j % 2 of block j // 2."""

    def number(match: re.Match) -> str:
        pair, half = divmod(int(match[1]), 2)
        return f"blocks.{pair}.{PAIR[half]}."

    return {re.sub(r"^blocks\.(\d+)\.", number, key): value for key, value in state_dict.items()}


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
        defaults={"legacy_norm": True, **defaults},
        overrides=overrides,
        filter_fn=checkpoint_filter_fn,
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
