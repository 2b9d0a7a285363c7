"""Checkpoints: loaded as data only, renamed by a table, held against the model with errors that name the keys.

Files are safetensors or torch pickles of tensors and plain containers, in any of the layouts of the field: a bare state
dict, or one under "state_dict" or "model" beside an optimiser, arguments and an exponential moving average (EMA). A
pickle that carries code is refused and nothing of it is run.
"""

import argparse
import os
import pickle
import re
import urllib.error
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import safetensors.torch
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from linvision.errors import CheckpointError, DownloadError

StateDict = dict[str, Tensor]

WEIGHT_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema")


def load_state_dict(path: str | Path, *, ema: bool = False) -> StateDict:
    """Read the weights of a checkpoint file as a flat state dict on the CPU.

    Args:
        path: a .safetensors file, or a torch file (.pth, .th, .pt, ...) of tensors and plain containers.
        ema: take the exponential moving average that the file carries beside the weights.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: for a truncated or foreign file, one that holds code, or one without weights (or EMA weights).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    return unwrap(_read(path), path.name, ema=ema)


def unwrap(content: Any, name: str, *, ema: bool = False) -> StateDict:
    """Find the state dict in what a checkpoint file holds; ``name`` is for the messages."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__} where a state dict is needed")
    keys = [key for key in (EMA_KEYS if ema else WEIGHT_KEYS) if isinstance(content.get(key), Mapping)]
    if ema and not keys:
        raise CheckpointError(f"{name} has no EMA weights ({' or '.join(EMA_KEYS)}); load it without ema")
    state_dict = clean_state_dict(dict(content[keys[0]] if keys else content))
    foreign = sorted(str(key) for key, value in state_dict.items() if not isinstance(value, Tensor))
    if foreign or not state_dict:
        found = f"keys that are no tensors: {_some(foreign)}" if foreign else "nothing"
        raise CheckpointError(f"{name} is no state dict: it holds {found}")
    return state_dict


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
        CheckpointError: names missing and unknown keys and shapes that differ.
    """
    described = (cfg if cfg is not None else getattr(model, "pretrained_cfg", None)) or {}
    heads = tuple(f"{head}." for head in _names(described.get("classifier") or "head"))
    own = model.state_dict()
    if release is not None:
        state_dict = release.own_keys(state_dict)
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
    _check_fit(state_dict, own, f"{name} does not fit {type(model).__name__}", heads)
    model.load_state_dict(state_dict, strict=False)


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
    problems = "; ".join(f"{len(keys)} keys {how}: {_some(keys)}" for how, keys in parts if keys)
    head_only = all(key.startswith(heads) for key in (*missing, *unknown, *differing))
    hint = "; drop_head=True keeps the model's own classifier" if head_only else ""
    raise CheckpointError(f"{what}: {problems}{hint}")


def fetch(url: str, folder: str | Path | None = None) -> Path:
    """Download published weights, with a progress bar, and check that they can be read.

    Args:
        url: of the file.
        folder: where it is kept; None for the torch hub cache.

    Raises:
        DownloadError: without a network or with a damaged download; names the URL and where to put the file by hand.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)
    target = folder / url.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(partial), progress=True)
        load_state_dict(partial)
        partial.replace(target)
    except (urllib.error.URLError, OSError, CheckpointError) as error:
        raise DownloadError(
            f"could not download {url} ({error}); fetch it by other means and save it as {target}, "
            f"or pass its path as checkpoint_path"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def _read(path: Path) -> Any:
    path.open("rb").close()  # a file that may not be read is another fault than one that is damaged
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it holds more than tensors and plain containers ({code[1]}), which could run code on loading"
        else:
            reason = "it is truncated, or no checkpoint of tensors and plain containers"
        raise CheckpointError(f"{path.name} is refused: {reason}") from None
    except (SafetensorError, EOFError, RuntimeError, OSError, BadZipFile, ValueError, KeyError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path.name} is refused: it is truncated or no checkpoint ({reason})") from error


def _adapt_channels(state_dict: StateDict, own: StateDict, first_convs: tuple[str, ...]) -> StateDict:
    """Adapt first convolutions of 3 channels to the model's number of channels."""
    for key in (f"{conv}.weight" for conv in first_convs):
        if key in state_dict and key in own and state_dict[key].ndim > 1:
            wanted = own[key].shape[1]
            if state_dict[key].shape[1] == 3 != wanted:
                state_dict = {**state_dict, key: adapt_input_conv(wanted, state_dict[key])}
    return state_dict


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
