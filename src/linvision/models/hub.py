"""The Hugging Face hub: published files fetched by repository, and models shared in timm's form."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, load_model_config_from_hf
from timm.models._hub import generate_readme, load_model_config_from_path, save_for_hf
from torch import nn

from linvision.errors import CheckpointError, DownloadError
from linvision.files import write_json, write_text
from linvision.models.downloads import damage_of

WEIGHT_FILES = ["*.safetensors", "*.pth", "*.pt", "*.bin"]
# What ``linvision.create_model`` asks of the weights, in words that no constructor knows.
WEIGHT_OPTIONS = ("weights", "drop_head", "ema")
SHARED_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm and ``push_to_hub`` call them, the first first


def fetch_from_hub(
    repo_id: str, *, accuracy: float | None = None, filename: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Download the weights of a hub repository into the hub's cache and return the file.

    Args:
        repo_id: "owner/name", or "owner/name@revision" with a branch, tag or commit to pin.
        accuracy: published top-1 in %. Of several files the one that carries it in its name (76p1 for 76.1) is taken.
        filename: the file to take.
        cache_dir: another cache than the hub's own.

    Raises:
        DownloadError: without a network, for an unknown repository, or where no file or no one file is to be chosen.
    """
    repo_id, _, revision = repo_id.partition("@")
    named = filename or (f"*{accuracy:.1f}*".replace(".", "p") if accuracy is not None else None)
    options: dict[str, Any] = {"revision": revision or None}
    if cache_dir is not None:
        options["cache_dir"] = cache_dir
    found: list[Path] = []
    for patterns in [[named] if named else [SHARED_FILES[0]], WEIGHT_FILES]:
        folder = _snapshot(repo_id, patterns, options)
        found = _weight_files(folder, patterns)
        if len(found) == 1 and _is_damaged(found[0]):
            found = _weight_files(_snapshot(repo_id, patterns, {**options, "force_download": True}), patterns)
            if _is_damaged(found[0]):
                raise DownloadError(f"{found[0].resolve()} of {repo_id} is damaged again: remove it, and try once more")
        if len(found) == 1:
            return found[0]
    names = ", ".join(path.name for path in found) or "no weight files"
    raise DownloadError(f"{repo_id} holds {names}: download the right one and pass its path as checkpoint_path")


def _snapshot(repo_id: str, patterns: list[str], options: dict[str, Any]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise DownloadError(
            f"could not download {repo_id} from the Hugging Face hub ({str(error).splitlines()[0]}); fetch a file "
            f"of https://huggingface.co/{repo_id} by other means and pass its path as checkpoint_path"
        ) from error


def _is_damaged(path: Path) -> bool:
    """Hold a file of the hub's cache against its SHA-256, which is its name there where the hub has published one."""
    blob = path.resolve()
    return re.fullmatch("[0-9a-f]{64}", blob.name) is not None and damage_of(blob, blob.name) is not None


def shared_description(source: str, cache_dir: str | Path | None = None) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Return timm's description of a shared model, its registered name, and its constructor's arguments.

    Args:
        source: "hf-hub:owner/name@revision" or "local-dir:folder".
        cache_dir: another cache than the hub's own.

    Raises:
        CheckpointError: its config.json is missing or damaged.
        DownloadError: it cannot be fetched.
    """
    kind, _, place = source.partition(":")
    try:
        if kind == "local-dir":
            cfg, name, arguments = load_model_config_from_path(Path(place))
        else:
            cfg, name, arguments = load_model_config_from_hf(place, cache_dir=cache_dir)
        described = PretrainedCfg(**{**cfg, "state_dict": None})
        channels, height, width = map(int, described.input_size)
        if min(channels, height, width, described.num_classes + 1) < 1:
            raise ValueError(f"input_size {described.input_size} and {described.num_classes} classes")
        return described.to_dict(), str(name), dict(arguments or {})
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DownloadError(f"could not get {source} from the Hugging Face hub ({reason})") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise CheckpointError(f"{source} has no sound config.json, as save_pretrained writes: {what}") from error


def weights_in(folder: Path) -> Path:
    """Return the weights in a folder that ``save_pretrained``, or timm, has written.

    Raises:
        CheckpointError: there is no file of weights, or no telling which.
    """
    found = _weight_files(folder, WEIGHT_FILES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no weight files"
        raise CheckpointError(f"{folder} holds {names}: one is needed, {' or '.join(SHARED_FILES)}")
    return found[0]


def _weight_files(folder: Path, patterns: list[str]) -> list[Path]:
    """List a folder's files by patterns; where one of them is what timm calls its weights, that alone."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    shared = [path for name in SHARED_FILES for path in found if path.name == name]
    return shared[:1] or found


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    labels: Sequence[str] | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Add model",
) -> None:
    """Upload a model to the Hugging Face hub in timm's form, as safetensors; ``create_model("hf-hub:...")`` reads it.

    Needs a login (``huggingface-cli login``) with write access to ``repo_id``. ``labels`` are the classes' names, in
    the order of the logits; None for those that the model came with.
    """
    api = huggingface_hub.HfApi(library_name="linvision")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    has_card = api.file_exists(repo_id=repo_id, filename="README.md", revision=revision)
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, labels=labels)
        if not has_card:
            card = {"description": f"{type(model).__name__}, trained with linvision.", "license": "unknown"}
            write_text(Path(folder) / "README.md", generate_readme(card, repo_id.partition("/")[2]))
        api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)


def save_pretrained(model: nn.Module, folder: str | Path, *, labels: Sequence[str] | None = None) -> None:
    """Write a model into a folder as ``push_to_hub`` uploads it; ``create_model("local-dir:...")`` reads it.

    So do timm, and ``AutoModelForImageClassification`` and ``pipeline`` of transformers.

    Args:
        model: made by ``create_model``, with its classifier.
        folder: made where there is none.
        labels: the classes' names, in the order of the logits; None for those that the model came with.

    Raises:
        ValueError: there are more or fewer labels than classes, or two of one name.
    """
    cfg: dict[str, Any] | None = getattr(model, "pretrained_cfg", None)
    if cfg is None:
        raise ValueError(f"{type(model).__name__} has no pretrained_cfg: share a model that create_model has made")
    if labels is None:
        known = cfg.get("label_names") or ()
        labels = list(known) if len(known) == model.num_classes else None
    elif len(labels) != model.num_classes or len(set(labels)) < len(labels):
        raise ValueError(f"{len(labels)} labels for {model.num_classes} classes: give one name of its own to each")
    recorded: dict[str, Any] = getattr(model, "_model_args", {})  # by newer versions of timm
    for name in WEIGHT_OPTIONS:
        recorded.pop(name, None)
    described = {"label_names": list(labels)} if labels is not None else None
    arguments = getattr(model, "constructor_args", None)
    save_for_hf(model, str(folder), model_config=described, model_args=arguments, safe_serialization=True)
    # The number of classes stands beside the arguments; transformers would give it twice.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    write_json(path, config)
