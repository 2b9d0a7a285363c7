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
from collections.abc import Mapping
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


def load_into(
    model: nn.Module, state_dict: StateDict, name: str, *, drop_head: bool = False, classifier: str = "head"
) -> None:
    """Load a state dict that already has the model's keys; every key must fit.

    Args:
        model: the model to fill. Half-precision weights are taken in the model's own type.
        state_dict: its weights. A first convolution for 3 channels is adapted to the model's number of channels.
        name: the file's name, for the messages.
        drop_head: leave the model's own classifier as it is, whatever the file has there.
        classifier: prefix of the classifier's keys.

    Raises:
        CheckpointError: names missing and unknown keys and shapes that differ.
    """
    own = model.state_dict()
    state_dict = _adapt_channels(state_dict, own)
    kept = {key for key in own if drop_head and key.startswith(f"{classifier}.")}
    state_dict = {
        key: value for key, value in state_dict.items() if not (drop_head and key.startswith(f"{classifier}."))
    }
    missing = sorted(own.keys() - state_dict.keys() - kept)
    unknown = sorted(state_dict.keys() - own.keys())
    differing = sorted(key for key in state_dict.keys() & own.keys() if state_dict[key].shape != own[key].shape)
    if not (missing or unknown or differing):
        model.load_state_dict(state_dict, strict=False)
        return
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in differing
    ]
    parts = [("differ in shape", shapes), ("are missing", missing), ("are unknown to the model", unknown)]
    problems = "; ".join(f"{len(keys)} keys {what}: {_some(keys)}" for what, keys in parts if keys)
    head_only = all(key.startswith(f"{classifier}.") for key in (*missing, *unknown, *differing))
    hint = "; drop_head=True keeps the model's own classifier" if head_only else ""
    raise CheckpointError(f"{name} does not fit {type(model).__name__}: {problems}{hint}")


def rename(state_dict: StateDict, table: Mapping[str, str]) -> StateDict:
    """Rename keys by the first regular expression of ``table`` that matches their start; others stay as they are."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in table.items():
            new_key, count = re.subn(f"^{pattern}", replacement, key)
            if count:
                renamed[new_key] = value
                break
        else:
            renamed[key] = value
    return renamed


def fetch(url: str) -> Path:
    """Download published weights into the torch hub cache, with a progress bar, and check that they can be read.

    Raises:
        DownloadError: without a network or with a damaged download; names the URL and where to put the file by hand.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
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


def _adapt_channels(state_dict: StateDict, own: StateDict) -> StateDict:
    key = "patch_embed.proj.weight"
    if key not in state_dict or key not in own or state_dict[key].shape[1] == own[key].shape[1]:
        return state_dict
    if state_dict[key].shape[1] != 3:
        return state_dict
    return {**state_dict, key: adapt_input_conv(own[key].shape[1], state_dict[key])}


def _some(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
