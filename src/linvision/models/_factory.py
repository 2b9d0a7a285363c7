"""Models by name: the published aliases, creation with safe loading, and what is known about each name."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, model_entrypoint, split_model_name_tag
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from linvision.errors import DownloadError, UnknownNameError, did_you_mean
from linvision.models import deit3, l2vit_variants, vil_variants, vim_variants
from linvision.models._backbone import Published
from linvision.models._checkpoints import StateDict, fetch, load_into, load_state_dict
from linvision.models._hub import fetch_from_hub

SOURCES = ("hf-hub:", "local-dir:")  # of models that carry their own weights and description
FAMILIES: dict[str, ModuleType] = {
    "ViL": vil_variants,
    "Vim": vim_variants,
    "L2ViT": l2vit_variants,
    "DeiT-III": deit3,
}


def list_models(pattern: str = "*") -> list[str]:
    """List the registered names of this package that match a shell pattern, with their checkpoint tags."""
    names = [
        f"{arch}.{tag}" if tag else arch
        for family in FAMILIES.values()
        for arch, cfg in family.default_cfgs.items()
        for tag in cfg.tags
    ]
    return [name for name in names if fnmatch(name, pattern) or fnmatch(split_model_name_tag(name)[0], pattern)]


def resolve_name(name: str) -> str:
    """Turn a published alias into the registered name; timm's names and ``hf-hub:`` ones stay as they are.

    Raises:
        UnknownNameError: for a name that nobody knows, with the nearest ones.
    """
    aliases = {alias: target for family in FAMILIES.values() for alias, target in family.ALIASES.items()}
    if name in aliases:
        return aliases[name]
    if name.startswith(SOURCES):
        return name
    arch, tag = split_model_name_tag(name)
    if is_model(arch):
        tagged = [known for known in (*list_models(), *timm.list_pretrained()) if known.startswith(f"{arch}.")]
        if tag and name not in tagged:
            raise UnknownNameError(f"{arch} has no checkpoint {tag!r}; it has {', '.join(tagged) or 'none'}")
        return name
    known = [
        *aliases,
        *list_models(),
        *(split_model_name_tag(known)[0] for known in list_models()),
        *timm.list_models(),
    ]
    raise UnknownNameError(f"unknown model {name!r}{did_you_mean(name, known)}")


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    *,
    drop_head: bool = False,
    ema: bool = False,
    revision: str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Create a model by name, with published weights, those of a file, or freshly initialised.

    Args:
        name: a name of ``list_models()``, with or without its checkpoint tag; a published alias ("vil2-tiny"); any
            name of timm's; "hf-hub:owner/name@revision" or "local-dir:folder", which come with their weights.
        pretrained: load the published weights, downloaded once. With another ``num_classes`` the classifier is fresh.
        checkpoint_path: load this file: safetensors, a released file or a state dict; as data, never running its code.
        drop_head: keep the fresh classifier instead of the file's.
        ema: take the file's exponential moving average.
        revision: branch, tag or commit of published weights that live on the Hugging Face hub.
        **overrides: timm's: num_classes, in_chans, img_size, drop_path_rate, features_only, out_indices, global_pool;
            and those of the model's constructor. Unknown ones are refused.

    Raises:
        UnknownNameError, UnknownOptionError: with the nearest known names.
        CheckpointError: for a file that cannot be read or does not fit, naming keys and shapes.
        DownloadError: where published weights cannot be fetched, with the manual way.
    """
    name = resolve_name(name)
    if pretrained and checkpoint_path is not None:
        raise ValueError("give pretrained=True or checkpoint_path, not both")
    if checkpoint_path is None and not (pretrained and _family(name)):
        try:
            return timm.create_model(name, pretrained=pretrained or name.startswith(SOURCES), **overrides)
        except (LocalEntryNotFoundError, HfHubHTTPError) as error:
            reason = str(error).splitlines()[0]
            raise DownloadError(f"could not get {name} from the Hugging Face hub ({reason})") from error
    path = Path(checkpoint_path) if checkpoint_path is not None else _fetch_published(name, revision)
    state_dict = load_state_dict(path, ema=ema)
    fresh_head = drop_head or (pretrained and overrides.get("num_classes", 1000) != 1000)
    feature_options = {key: overrides.pop(key) for key in ("features_only", "out_indices") if key in overrides}
    model = timm.create_model(name, **overrides)
    _load(model, state_dict, path.name, drop_head=fresh_head)
    if not feature_options.get("features_only"):
        return model
    # timm prunes what the chosen maps do not need, so the wrapper's keys are a part of the whole model's; only norms
    # that dense tasks add to the maps are its own.
    features = timm.create_model(name, **overrides, **feature_options)
    loaded = model.state_dict()
    own = features.state_dict()
    features.load_state_dict({key: loaded.get(key.removeprefix("model."), own[key]) for key in own})
    return features


def load_checkpoint(model: nn.Module, path: str | Path, *, drop_head: bool = False, ema: bool = False) -> None:
    """Load a checkpoint file into a model made by ``create_model``; arguments and errors as there."""
    path = Path(path)
    _load(model, load_state_dict(path, ema=ema), path.name, drop_head=drop_head)


def to_release(name: str, state_dict: StateDict) -> dict[str, Any]:
    """Turn the state dict of model ``name`` into the layout of its family's released files."""
    family = _family(resolve_name(name))
    if family is None:
        raise ValueError(f"{name} is no model of this package: no release layout is known for it")
    return family.to_release(state_dict)


@dataclass(frozen=True)
class ModelDescription:
    """What is known about a registered name."""

    name: str
    family: str
    parameters: int
    macs: int  # multiply-adds of one image at the input size, scans included
    input_size: tuple[int, int, int]
    top1: float | None  # %, as published, ImageNet-1K
    source: str  # URL or hub name of the published weights; empty where there are none
    note: str


def describe(name: str) -> ModelDescription:
    """Describe a model; parameters and multiply-adds are counted on a model without memory."""
    name = resolve_name(name)
    cfg = _pretrained_cfg(name)
    family = _family(name)
    channels, height, width = cfg.input_size
    with torch.device("meta"), torch.inference_mode():
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, channels, height, width))
    families = {module: label for label, module in FAMILIES.items()}
    published = _published(name)
    return ModelDescription(
        name=name,
        family=families[family] if family else "timm",
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        input_size=(channels, height, width),
        top1=published.top1 if published else None,
        source=str(cfg.url or cfg.hf_hub_id or ""),
        note=published.note if published else "",
    )


def _family(name: str) -> ModuleType | None:
    arch, _ = split_model_name_tag(name)
    if not is_model(arch):
        return None
    modules = {module.__name__: module for module in FAMILIES.values()}
    return modules.get(model_entrypoint(arch).__module__)


def _published(name: str) -> Published | None:
    """Look up what is published for a name; without a tag, for its first checkpoint."""
    family = _family(name)
    if family is None:
        return None
    arch, tag = split_model_name_tag(name)
    tag = tag or family.default_cfgs[arch].tags[0]
    return family.PUBLISHED.get(f"{arch}.{tag}" if tag else arch)


def _load(model: nn.Module, state_dict: StateDict, name: str, *, drop_head: bool) -> None:
    cfg = getattr(model, "pretrained_cfg", {})
    family = _family(cfg.get("architecture") or "")
    if family is not None:
        state_dict = family.checkpoint_filter_fn(state_dict, model)
    load_into(model, state_dict, name, drop_head=drop_head, classifier=cfg.get("classifier") or "head")


def _fetch_published(name: str, revision: str | None) -> Path:
    cfg = _pretrained_cfg(name)
    if cfg.url:
        return fetch(str(cfg.url))
    if cfg.hf_hub_id:
        published = _published(name)
        return fetch_from_hub(str(cfg.hf_hub_id), accuracy=published.top1 if published else None, revision=revision)
    raise ValueError(
        f"{name} has no published weights; load a file of your own through checkpoint_path, train it, or take a model "
        "that has them, such as vil2_tiny_patch16_224"
    )


def _pretrained_cfg(name: str) -> PretrainedCfg:
    return get_pretrained_cfg(name) or PretrainedCfg()
