"""From a registered name to a model: timm's builder, with weights that take our one way into it."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from linvision.errors import UnknownOptionError, did_you_mean
from linvision.models.checkpoints import Release, load_weights
from linvision.models.downloads import fetch
from linvision.models.hub import WEIGHT_OPTIONS, fetch_from_hub, weights_in
from linvision.models.weight_files import StateDict, load_state_dict, unwrap

# Overrides that timm's builder takes for itself; all others go to the model's constructor.
BUILDER_OPTIONS = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
    "features_only",
    "out_indices",
    "feature_cls",
)


@dataclass(frozen=True)
class Published:
    """What a paper reports for a registered name."""

    top1: float  # %, ImageNet-1K validation set
    note: str = ""


class Weights(NamedTuple):
    """A state dict that a model is to be built with; ``name`` is for the messages."""

    state_dict: StateDict
    name: str


@dataclass(frozen=True)
class Family:
    """What is known of a family's registered names.

    Attributes:
        label: the family's name.
        release: how its weights were released.
        default_cfgs: timm's descriptions, by name.
        published: what papers report, by name with tag.
        aliases: published names, and the registered ones with tag that they stand for.
        unpublished: what to say of weights that were never published; empty where they were.
    """

    label: str
    release: Release
    default_cfgs: Mapping[str, DefaultCfg]
    published: Mapping[str, Published]
    aliases: Mapping[str, str]
    unpublished: str = ""

    def names(self) -> list[str]:
        """List the registered names with their tags; ``test_*`` sizes are known but not listed."""
        return [
            f"{arch}.{tag}" if tag else arch
            for arch, cfg in self.default_cfgs.items()
            for tag in cfg.tags
            if not arch.startswith("test_")
        ]

    def reported(self, arch: str, tag: str | None) -> Published | None:
        """Return what papers report for a name; without a tag, for its first checkpoint."""
        tag = tag or self.default_cfgs[arch].tags[0]
        return self.published.get(f"{arch}.{tag}" if tag else arch)


def classifier_cfg(**changes: Any) -> dict[str, Any]:
    """Return timm's description of an ImageNet-1K classifier's input and head, with ``changes``."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "",
        **changes,
    }


def build(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    family: Family,
    defaults: dict[str, Any],
    overrides: dict[str, Any],
    out_indices: tuple[int, ...],
) -> nn.Module:
    """Build a registered model through timm: constructor ``defaults`` of the variant, changed by ``overrides``.

    Weights (those of the override ``weights``, or with ``pretrained`` the published or shared ones that timm's
    description names, of ``ema`` their moving average) are loaded into the whole model before timm cuts a feature
    extractor out of it. The classifier stays fresh with ``drop_head``, and where published weights have other classes.

    Raises:
        UnknownOptionError: for an override that neither timm's builder nor the constructor knows.
    """
    known = [*inspect.signature(model_class).parameters, *BUILDER_OPTIONS, *WEIGHT_OPTIONS]
    for name in overrides:
        if name not in known:
            raise UnknownOptionError(f"{variant} has no option {name!r}{did_you_mean(name, known)}")
    overrides = dict(overrides)
    weights: Weights | None = overrides.pop("weights", None)
    drop_head, ema = (bool(overrides.pop(name, False)) for name in ("drop_head", "ema"))
    cfg = resolve_pretrained_cfg(variant, overrides.get("pretrained_cfg"), overrides.get("pretrained_cfg_overlay"))
    published = pretrained and weights is None
    if published:
        weights = published_weights(cfg, variant, family=family, ema=ema, cache_dir=overrides.get("cache_dir"))

    def construct(**options: Any) -> nn.Module:
        model = model_class(**options)
        if weights is not None:
            other_classes = published and getattr(model, "num_classes", 0) not in (0, cfg.num_classes)
            release, fresh_head = family.release, drop_head or other_classes
            load_weights(
                model, weights.state_dict, weights.name, release=release, cfg=cfg.to_dict(), drop_head=fresh_head
            )
        return model

    model = build_model_with_cfg(
        construct,
        variant,
        False,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**defaults, **overrides},
    )
    # Kept for sharing the model; older versions of timm keep no such thing.
    vars(model)["constructor_args"] = {name: x for name, x in overrides.items() if name not in BUILDER_OPTIONS}
    return model


def published_weights(
    cfg: PretrainedCfg,
    name: str,
    *,
    family: Family | None = None,
    ema: bool = False,
    cache_dir: str | Path | None = None,
) -> Weights:
    """Fetch and read, once, the weights that timm's description of a model names, or the average beside them.

    Raises:
        ValueError: it names none.
        CheckpointError, DownloadError: they cannot be had.
    """
    if cfg.state_dict:
        return Weights(unwrap(cfg.state_dict, name, ema=ema), name)
    file = Path(cfg.file) if cfg.file else None
    if file is not None and file.is_dir():
        file = weights_in(file)
    if file is None and cfg.hf_hub_id:
        published = family.reported(name, cfg.tag) if family and cfg.source != "hf-hub" else None
        accuracy = published.top1 if published else None
        file = fetch_from_hub(str(cfg.hf_hub_id), accuracy=accuracy, filename=cfg.hf_hub_filename, cache_dir=cache_dir)
    elif file is None and cfg.url:
        file = fetch(str(cfg.url), cache_dir)
    if file is None:
        reason = f" ({family.unpublished})" if family and family.unpublished else ""
        raise ValueError(
            f"{name} has no published weights{reason}; load a file of your own through checkpoint_path, train it, "
            "or take a model that has them, such as vil2_tiny_patch16_224"
        )
    return Weights(load_state_dict(file, ema=ema), file.name)
