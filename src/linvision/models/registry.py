"""Models by name: the published aliases, creation with safe loading, and what is known about each name."""

from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, split_model_name_tag
from torch import nn

from linvision.errors import CheckpointError, UnknownNameError, nearest, suggestion
from linvision.models.builder import Family, Weights
from linvision.models.checkpoints import load_weights
from linvision.models.counts import counts
from linvision.models.hub import WEIGHT_OPTIONS, shared_description
from linvision.models.runs import is_run, read_run, trained_weights
from linvision.models.timm_models import create_timm_model, read_checkpoints_of
from linvision.models.weight_files import StateDict, load_state_dict

SOURCES = ("hf-hub:", "local-dir:")  # of models that carry their own weights and description
NEAR = 0.7  # how similar a name has to be to be guessed at
NAMES = ("vil", "vim", "l2vit", "deit3")  # the folders of the families, in the order of lists
FAMILIES: tuple[Family, ...] = tuple(import_module(f"linvision.models.{name}.variants").FAMILY for name in NAMES)


def list_models(pattern: str = "*") -> list[str]:
    """List the registered names of this package that match a shell pattern, with their checkpoint tags."""
    names = [name for family in FAMILIES for name in family.names()]
    return [name for name in names if fnmatch(name, pattern) or fnmatch(split_model_name_tag(name)[0], pattern)]


def resolve_name(name: str) -> str:
    """Turn a published alias into the registered name; timm's names and ``hf-hub:`` ones stay as they are.

    Capitals do not matter, nor whether words are joined by "-" or "_".

    Raises:
        UnknownNameError: for a name that nobody knows, with the nearest ones.
    """
    aliases = {alias: target for family in FAMILIES for alias, target in family.aliases.items()}
    if name in aliases or is_source(name):
        return aliases.get(name, name)
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
    spelled = {_spelling(known): known for known in (*list_models(), *aliases)}.get(_spelling(name))
    if spelled is not None:
        return aliases.get(spelled, spelled)
    longer = sorted({each for each in known if _spelling(each).startswith(_spelling(name))}, key=lambda x: (len(x), x))
    raise UnknownNameError(f"unknown model {name!r}{suggestion(longer[:3] or nearest(name, known, cutoff=NEAR))}")


def _spelling(name: str) -> str:
    """Reduce a name to what its spellings share: ``vil2_tiny`` and ``VIL2-Tiny`` are one name."""
    return name.lower().replace("-", "_")


def has_weights(name: str) -> bool:
    """Say whether a model comes with weights, published ones or, as a shared model, its own."""
    name = resolve_name(name)
    return is_source(name) or bool(_pretrained_cfg(name).has_weights)


def is_source(name: str) -> bool:
    """Say whether a name stands for a model that carries its own weights: a shared one, or a run's folder."""
    return name.startswith(SOURCES) or is_run(name)


def architecture_of(source: str) -> tuple[str, dict[str, Any]]:
    """Return the registered name of a source and its constructor's arguments, but the classes and the size of images.

    Raises:
        CheckpointError: what describes it is missing or damaged.
        DownloadError: it cannot be fetched.
    """
    if is_run(source):
        name, arguments = read_run(source)[:2]
    else:
        _, name, arguments = shared_description(source)
    own = {"num_classes", "img_size", *WEIGHT_OPTIONS}  # what every caller says for itself
    return name, {key: value for key, value in arguments.items() if key not in own}


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
            name of timm's; "hf-hub:owner/name@revision", "local-dir:folder" or the folder of a run, which come with
            their weights.
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
    if revision is not None:
        overrides["pretrained_cfg_overlay"] = _pinned(name, revision, overrides.get("pretrained_cfg_overlay"))
    if is_run(name):
        run = read_run(name)
        if checkpoint_path is None:
            checkpoint_path = trained_weights(name)
            drop_head = drop_head or overrides.get("num_classes", run.num_classes) != run.num_classes
        own = {**run.arguments, "num_classes": run.num_classes, **size_overrides(run.name, run.size)}
        return create_model(run.name, False, checkpoint_path, drop_head=drop_head, ema=ema, **{**own, **overrides})
    path = None if checkpoint_path is None else Path(checkpoint_path)
    weights = None if path is None else Weights(load_state_dict(path, ema=ema), path.name)
    if name.startswith(SOURCES):
        cfg, name, arguments = shared_description(name, overrides.get("cache_dir"))
        if not is_model(name):
            raise CheckpointError(f"its config.json names an architecture that nobody knows, {name!r}")
        overrides = {"pretrained_cfg": cfg, **arguments, **overrides}
        pretrained = weights is None
    if _family(name) is not None:
        options = {"weights": weights, "drop_head": drop_head, "ema": ema}
        return timm.create_model(name, pretrained=pretrained, **options, **overrides)
    if weights is None and not pretrained:
        return timm.create_model(name, **overrides)
    return create_timm_model(name, weights, drop_head=drop_head, ema=ema, **overrides)


def load_checkpoint(model: nn.Module, path: str | Path, *, drop_head: bool = False, ema: bool = False) -> None:
    """Load a checkpoint file into a model made by ``create_model``; arguments and errors as there."""
    path = Path(path)
    family = _family_of(model)
    release = family.release if family else None
    load_weights(model, load_state_dict(path, ema=ema), path.name, release=release, drop_head=drop_head)


def own_keys(state_dict: StateDict) -> StateDict:
    """Give a state dict with released keys of any family the model's own; others stay as they are."""
    for family in FAMILIES:
        if family.release.is_released(state_dict):
            return family.release.own_keys(state_dict)
    return state_dict


def size_overrides(name: str, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """Return the ``img_size`` argument for a model that is built for one size; convolutional networks take any."""
    cfg = get_pretrained_cfg(name)
    sized = _family(name) is not None or (cfg is not None and cfg.fixed_input_size)
    return {"img_size": img_size} if sized and img_size is not None else {}


def to_release(name: str, state_dict: StateDict) -> dict[str, Any]:
    """Turn the state dict of model ``name`` into the layout of its family's released files."""
    family = _family(resolve_name(name))
    if family is None:
        raise ValueError(f"{name} is no model of this package: no release layout is known for it")
    return family.release.released(state_dict)


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
    """Describe a model; parameters and multiply-adds are those of the table in ``counts``, or counted anew."""
    name = resolve_name(name)
    cfg = _pretrained_cfg(name)
    family = _family(name)
    parameters, macs = counts(name)
    published = family.reported(*split_model_name_tag(name)) if family else None
    return ModelDescription(
        name=name,
        family=family.label if family else "timm",
        parameters=parameters,
        macs=macs,
        input_size=cfg.input_size,
        top1=published.top1 if published else None,
        source=str(cfg.url or cfg.hf_hub_id or ""),
        note=published.note if published else "",
    )


def _family(name: str) -> Family | None:
    arch, _ = split_model_name_tag(name)
    return next((family for family in FAMILIES if arch in family.default_cfgs), None)


def _family_of(model: nn.Module) -> Family | None:
    return _family((getattr(model, "pretrained_cfg", None) or {}).get("architecture") or "")


def _pinned(name: str, revision: str, overlay: dict[str, Any] | None) -> dict[str, Any]:
    """Pin a model of the hub to a revision."""
    hub_id = _pretrained_cfg(name).hf_hub_id
    if not hub_id:
        raise ValueError(f"revision={revision!r}: {name} does not come from the Hugging Face hub")
    return {**(overlay or {}), "hf_hub_id": f"{str(hub_id).partition('@')[0]}@{revision}"}


def _pretrained_cfg(name: str) -> PretrainedCfg:
    return get_pretrained_cfg(name) or PretrainedCfg()


read_checkpoints_of(_family_of, load_checkpoint)
