"""Files of weights, read as data only: a file may claim anything, and is believed in nothing that could do harm.

Files are safetensors or torch pickles of tensors and plain containers, in any of the layouts of the field: a bare state
dict, or one under "state_dict", "model" or "model_state_dict" beside an optimiser, arguments and an exponential moving
average (EMA); its keys may have the prefixes of wrappers. A pickle that carries code is refused and nothing of it is
run; so is a file that would take more memory than its own size, and a tensor that is no plain array of finite numbers.
"""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from linvision.errors import CheckpointError

StateDict = dict[str, Tensor]

WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "weights", "params", "net")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "params_ema", "ema")
ALWAYS_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and AveragedModel, and of torch.compile
WRAPPERS = (
    "model.",
    "net.",
    "network.",
    "backbone.",
    "timm_model.",
)  # of Lightning, transformers; on every key or on none
COUNTERS = ("n_averaged",)  # what AveragedModel counts beside the weights

PLAIN_TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

# What readers raise for bytes that are no checkpoint, beside refusals of code.
DAMAGE = (
    SafetensorError, EOFError, RuntimeError, OSError, zipfile.BadZipFile, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, ArithmeticError, MemoryError, ImportError, struct.error,
)  # fmt: skip


def load_state_dict(path: str | Path, *, ema: bool = False) -> StateDict:
    """Read the weights of a checkpoint file as a flat state dict on the CPU.

    Args:
        path: a .safetensors file, or a torch file (.pth, .th, .pt, .ckpt, ...) of tensors and plain containers.
        ema: take the exponential moving average that the file carries beside the weights.

    Raises:
        FileNotFoundError: where there is no such file.
        CheckpointError: for a truncated or foreign file, one that holds code, one without weights (or EMA weights), and
            tensors that are no plain arrays of finite numbers.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file: give the file that holds the weights")
    return unwrap(_read(path), path.name, ema=ema)


def unwrap(content: Any, name: str, *, ema: bool = False) -> StateDict:
    """Find the state dict in what a checkpoint file holds; ``name`` is for the messages."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__} where a state dict is needed")
    weights, averages = ([key for key in keys if _is_mapping(content.get(key))] for keys in (WEIGHT_KEYS, EMA_KEYS))
    if ema and not averages:
        raise CheckpointError(f"{name} has no EMA weights ({' or '.join(EMA_KEYS[:2])}); load it without ema")
    if averages and not weights and not ema:
        raise CheckpointError(f"{name} has EMA weights alone ({averages[0]}); load it with ema")
    keys = averages if ema else weights
    state_dict = _without_wrappers(dict(content[keys[0]] if keys else content), name)
    foreign = sorted(str(key) for key, value in state_dict.items() if not isinstance(value, Tensor))
    if foreign or not state_dict:
        found = f"keys that are no tensors: {some(foreign)}" if foreign else "nothing"
        raise CheckpointError(f"{name} is no state dict: it holds {found}")
    _check_tensors(state_dict, name)
    return {key: x.detach() for key, x in state_dict.items()}


def damage(path: Path) -> str | None:
    """Say why a file is no checkpoint, or None. Records of torch's files are held against their checksums."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_records(archive, path)
                record = archive.testzip()
            return f"it is damaged: {record} has another checksum" if record else None
        load_state_dict(path)
    except (zipfile.BadZipFile, CheckpointError, OSError) as error:
        return str(error)
    return None


def some(keys: list[str], most: int = 4) -> str:
    """Name the first of some keys, and how many more there are."""
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _is_mapping(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content)


def _without_wrappers(state_dict: dict[Any, Any], name: str) -> dict[str, Any]:
    """Take the prefixes of wrapping modules off all keys."""
    numbers = [key for key in state_dict if not isinstance(key, str)]
    if numbers:
        raise CheckpointError(f"{name} is no state dict: its keys are to be names, but one is {numbers[0]!r:.50}")
    names = {key: key for key in state_dict if key not in COUNTERS}
    while True:
        shorter = {key: _without(short, ALWAYS_WRAPPERS) for key, short in names.items()}
        wrapper = next((each for each in WRAPPERS if all(name.startswith(each) for name in shorter.values())), "")
        shorter = {key: short.removeprefix(wrapper) for key, short in shorter.items()}
        if shorter == names:
            break
        names = shorter
    if len(set(names.values())) < len(names):
        raise CheckpointError(
            f"{name} is no state dict: it has keys that differ by {' or '.join(ALWAYS_WRAPPERS)} alone"
        )
    return {short: state_dict[key] for key, short in names.items()}


def _without(key: str, prefixes: tuple[str, ...]) -> str:
    return next((key.removeprefix(prefix) for prefix in prefixes if key.startswith(prefix)), key)


def _check_tensors(state_dict: StateDict, name: str) -> None:
    """Raise CheckpointError unless all tensors are plain arrays of finite numbers that the file holds."""
    faults: dict[str, list[str]] = {}
    for key, x in state_dict.items():
        fault = _fault(x)
        if fault:
            faults.setdefault(fault, []).append(key)
    if faults:
        named = "; ".join(f"{fault}: {some(sorted(keys))}" for fault, keys in faults.items())
        raise CheckpointError(f"{name} is refused: its tensors must be plain arrays of finite numbers; {named}")


def _fault(x: Tensor) -> str | None:
    if type(x) not in (Tensor, nn.Parameter):
        return f"of the kind {type(x).__name__}"
    if x.is_meta:
        return "without values (on the meta device)"
    if x.is_nested or x.layout != torch.strided:
        return "sparse or nested (store them dense)"
    if x.dtype not in PLAIN_TYPES:
        return f"of type {x.dtype} (store them as float32)"
    if x.numel() * x.element_size() > x.untyped_storage().nbytes():
        return "larger than what is stored of them (store them contiguous)"
    if x.is_floating_point() and not x.isfinite().all():
        return "not finite (NaN or infinity; take a checkpoint from before the training diverged)"
    return None


def _read(path: Path) -> Any:
    with path.open("rb") as file:  # a file that may not be read is another fault than one that is damaged
        begins = file.read(9)
    try:
        if path.suffix == ".safetensors" or begins[8:] == b"{":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_records(archive, path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"it holds more than tensors and plain containers ({code[1]}), which could run code on loading"
        else:
            reason = "it is truncated, or no checkpoint of tensors and plain containers"
        raise CheckpointError(f"{path} is refused: {reason}") from None
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is refused: it is truncated or no checkpoint ({reason})") from error


def _check_records(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise CheckpointError for records that take more room unpacked than the file; torch writes them as they are."""
    records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or sum(record.file_size for record in records) > path.stat().st_size:
        what = f"its records are compressed: {some(packed)}" if packed else "its records overlap"
        raise CheckpointError(f"{path} is refused: {what}; save it again with torch.save")
