"""Checkpoints: renamed by a table, held against the model with errors that name the keys, and loaded.

``weight_files`` reads the files, ``downloads`` fetches them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from linvision.errors import CheckpointError
from linvision.models.downloads import fetch
from linvision.models.weight_files import StateDict, load_state_dict, some

__all__ = ["KeyTable", "Release", "StateDict", "fetch", "load_state_dict", "load_weights", "rename"]

EXTRACTED = "model."  # prefix of what timm's feature extractors hold
KeyTable = dict[str, str | None]  # start of a released key -> start of the model's; None: dropped on purpose


@dataclass(frozen=True)
class Release:
    """How the files that a family was released in name and wrap its weights.

    Attributes:
        wrapper: key under which such a file holds the state dict.
        keys: the table of keys for a state dict in either naming, used both ways; the longest start counts.
        is_released: whether a state dict has the released keys, where these are not the model's own.
        fit: changes values of a state dict in the model's keys for a model of another image size, say.
        from_file, to_file: reshape values that lie otherwise in released files, in the model's keys.
    """

    wrapper: str
    keys: Callable[[StateDict], KeyTable] = lambda state_dict: {}
    is_released: Callable[[StateDict], bool] = lambda state_dict: False
    fit: Callable[[StateDict, nn.Module], StateDict] = lambda state_dict, model: state_dict
    from_file: Callable[[StateDict], StateDict] = lambda state_dict: state_dict
    to_file: Callable[[StateDict], StateDict] = lambda state_dict: state_dict

    def own_keys(self, state_dict: StateDict) -> StateDict:
        """Give the released keys of a state dict the model's names; one that has these already stays as it is."""
        if not self.is_released(state_dict):
            return state_dict
        return self.from_file(rename(state_dict, self.keys(state_dict)))

    def released(self, state_dict: StateDict) -> dict[str, StateDict]:
        """Lay a state dict in the model's keys out as a released file holds it."""
        table = {own: released for released, own in self.keys(state_dict).items() if own is not None}
        return {self.wrapper: rename(self.to_file(state_dict), table)}


def rename(state_dict: StateDict, table: Mapping[str, str | None]) -> StateDict:
    """Exchange the starts of keys by a table, of which the longest that fits counts; None drops a key."""
    starts = sorted(table, key=len, reverse=True)
    renamed = {}
    for key, value in state_dict.items():
        start = next((start for start in starts if key.startswith(start)), "")
        new_start = table.get(start, "") if start else ""
        if new_start is not None:
            renamed[new_start + key.removeprefix(start)] = value
    return renamed


def load_weights(
    model: nn.Module,
    state_dict: StateDict,
    name: str,
    *,
    release: Release | None = None,
    cfg: Mapping[str, Any] | None = None,
    drop_head: bool = False,
) -> None:
    """Load a state dict into a model, whatever layout it has: the one way that all weights take.

    Args:
        model: the model to fill. Half-precision weights are taken in the model's own type.
        state_dict: weights, in the released keys of the model's family or in the model's own.
        name: the file's name, for the messages.
        release: how the model's family was released; None for models of other packages.
        cfg: timm's description of the model, which names its classifier and its first convolutions; these are adapted
            from 3 channels to the model's number. None: the model's own.
        drop_head: leave the model's own classifier as it is, whatever the file has there.

    Raises:
        CheckpointError: names missing and unknown keys, and shapes and kinds of numbers that differ.
    """
    described = (cfg if cfg is not None else getattr(model, "pretrained_cfg", None)) or {}
    heads = tuple(f"{head}." for head in _names(described.get("classifier") or "head"))
    own = model.state_dict()
    if release is not None:
        state_dict = release.own_keys(state_dict)
    if all(key.startswith(EXTRACTED) for key in own):  # its prefix was taken for that of a wrapper
        state_dict = {f"{EXTRACTED}{key.removeprefix(EXTRACTED)}": x for key, x in state_dict.items()}
    what = f"{name} does not fit {type(model).__name__}"
    _check_kinds(state_dict, own, what)
    if not any(key.startswith(heads) for key in own):
        parts = (*heads, *(f"{part}." for part in getattr(model, "classifier_parts", ())))
        without = tuple(part for part in parts if not any(key.startswith(part) for key in own))
        state_dict = {key: x for key, x in state_dict.items() if not key.startswith(without)}
    if release is not None:
        state_dict = release.fit(state_dict, model)
    if drop_head:
        state_dict = {key: x for key, x in state_dict.items() if not key.startswith(heads)}
        own = {key: x for key, x in own.items() if not key.startswith(heads)}
    state_dict = _adapt_channels(state_dict, own, _names(described.get("first_conv") or ()))
    _check_fit(state_dict, own, what, heads)
    model.load_state_dict(state_dict, strict=False)


def _check_kinds(state_dict: StateDict, own: StateDict, what: str) -> None:
    """Raise CheckpointError for integers where the model has fractions, say; whole numbers may be stored as floats."""
    differing = sorted(key for key in state_dict.keys() & own.keys() if not _is_alike(state_dict[key], own[key]))
    if differing:
        shown = [f"{key} {state_dict[key].dtype} in the file, {own[key].dtype} in the model" for key in differing]
        raise CheckpointError(f"{what}: {len(shown)} keys differ in their kind of numbers: {some(shown)}")


def _is_alike(x: Tensor, own: Tensor) -> bool:
    if x.is_floating_point() and not own.is_floating_point():
        return own.dtype != torch.bool and torch.equal(x, x.round())
    return x.is_floating_point() == own.is_floating_point() and (x.dtype == torch.bool) == (own.dtype == torch.bool)


def _check_fit(state_dict: StateDict, own: StateDict, what: str, heads: tuple[str, ...]) -> None:
    missing = sorted(own.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - own.keys())
    differing = sorted(key for key in state_dict.keys() & own.keys() if state_dict[key].shape != own[key].shape)
    if not (missing or unknown or differing):
        return
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in differing
    ]
    parts = [("differ in shape", shapes), ("are missing", missing), ("are unknown to the model", unknown)]
    problems = "; ".join(f"{len(keys)} keys {how}: {some(keys)}" for how, keys in parts if keys)
    head_only = all(key.startswith(heads) for key in (*missing, *unknown, *differing))
    hint = "; drop_head=True keeps the model's own classifier" if head_only else ""
    raise CheckpointError(f"{what}: {problems}{hint}")


def _adapt_channels(state_dict: StateDict, own: StateDict, first_convs: tuple[str, ...]) -> StateDict:
    """Adapt first convolutions of 3 channels to the model's number of channels."""
    for key in (f"{conv}.weight" for conv in first_convs):
        if key in state_dict and key in own and state_dict[key].ndim == own[key].ndim == 4:
            wanted = own[key].shape[1]
            if state_dict[key].shape[1] == 3 != wanted:
                state_dict = {**state_dict, key: adapt_input_conv(wanted, state_dict[key])}
    return state_dict


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
