"""Models of timm's own, whose weights take the same way as ours: read as data only, and none missing unsaid."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import _factory, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from linvision.errors import CheckpointError
from linvision.models.builder import Weights, published_weights
from linvision.models.checkpoints import load_weights

FEATURE_OPTIONS = ("features_only", "out_indices", "feature_cls")
NO_SOURCE = {"source": "", "file": None, "url": None, "hf_hub_id": None, "hf_hub_filename": None}


def create_timm_model(
    name: str, weights: Weights | None, *, drop_head: bool = False, ema: bool = False, **overrides: Any
) -> nn.Module:
    """Create a model of timm's with weights in its own keys, or None for those that timm's description of it names.

    Published weights go through timm's filters, into a model with the classes that they have.

    Raises:
        ValueError: there are no published weights.
        CheckpointError, DownloadError: weights cannot be had, or do not fit.
    """
    if weights is None:
        arch, tag = split_model_name_tag(name)
        overlay = overrides.pop("pretrained_cfg_overlay", None)
        cfg = resolve_pretrained_cfg(arch, overrides.pop("pretrained_cfg", None) or tag, overlay)
        name, overrides["pretrained_cfg"] = arch, cfg.to_dict()
        if cfg.custom_load:  # arrays of numpy's, which hold no code
            return timm.create_model(arch, pretrained=True, **overrides)
        weights = published_weights(cfg, name, ema=ema, cache_dir=overrides.get("cache_dir"))
        source = _filtered(arch, weights, overrides)
        same_classes = overrides.get("num_classes") in (None, cfg.num_classes)
        if same_classes and not drop_head and not overrides.get("features_only"):
            return source
        weights, drop_head = Weights(source.state_dict(), weights.name), drop_head or not same_classes
    features = {key: overrides.pop(key) for key in FEATURE_OPTIONS if key in overrides}
    model = timm.create_model(name, **overrides)
    load_weights(model, weights.state_dict, weights.name, drop_head=drop_head)
    if not features.get("features_only"):
        return model
    # timm's feature extractors rename and drop keys each in its own way, after loading what it takes for a file.
    return _loaded_by_timm(name, model.state_dict(), {**overrides, **features})


def _filtered(arch: str, weights: Weights, overrides: dict[str, Any]) -> nn.Module:
    """Create the model that published weights are for, with everything that timm does to them, none missing."""
    own = {key: x for key, x in overrides.items() if key not in (*FEATURE_OPTIONS, "num_classes")}
    try:
        return _loaded_by_timm(arch, weights.state_dict, own)
    except (RuntimeError, KeyError) as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{weights.name} does not fit {arch}: {problem:.500}") from error


def _loaded_by_timm(name: str, state_dict: dict[str, Any], overrides: dict[str, Any]) -> nn.Module:
    """Let timm load a state dict as it loads published weights; the model does not keep it."""
    overrides = dict(overrides)
    arch, tag = split_model_name_tag(name)
    overlay = overrides.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(arch, overrides.pop("pretrained_cfg", None) or tag, overlay)
    described = replace(cfg, **NO_SOURCE, state_dict=state_dict)
    model = timm.create_model(arch, pretrained=True, pretrained_cfg=described, **overrides)
    for attribute in ("pretrained_cfg", "default_cfg"):
        if hasattr(model, attribute):
            setattr(model, attribute, cfg.to_dict())
    return model


def read_checkpoints_of(
    is_ours: Callable[[nn.Module], Any], load_checkpoint: Callable[[nn.Module, str | Path], None]
) -> None:
    """Let ``timm.create_model(name, checkpoint_path=...)`` read files for our models as we do."""
    by_timm = getattr(_factory.load_checkpoint, "by_timm", _factory.load_checkpoint)

    def load(model: nn.Module, checkpoint_path: Any, *arguments: Any, **options: Any) -> Any:
        if is_ours(model):
            return load_checkpoint(model, checkpoint_path)
        return by_timm(model, checkpoint_path, *arguments, **options)

    load.by_timm = by_timm  # pyright: ignore[reportFunctionMemberAccess]
    _factory.load_checkpoint = load
