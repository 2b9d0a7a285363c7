"""The Hugging Face hub: published files fetched by repository, and models shared in timm's form."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from timm.models import load_model_config_from_hf, push_to_hf_hub
from timm.models._hub import load_model_config_from_path, save_for_hf
from torch import nn

from linvision.errors import CheckpointError, DownloadError

WEIGHT_FILES = ["*.safetensors", "*.pth", "*.pt", "*.bin"]
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
    place: dict[str, Any] = {} if cache_dir is None else {"cache_dir": cache_dir}
    tried: list[Path] = []
    for patterns in [[named], WEIGHT_FILES] if named else [WEIGHT_FILES]:
        try:
            folder = huggingface_hub.snapshot_download(
                repo_id, revision=revision or None, allow_patterns=patterns, **place
            )
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise DownloadError(
                f"could not download {repo_id} from the Hugging Face hub ({str(error).splitlines()[0]}); fetch a file "
                f"of https://huggingface.co/{repo_id} by other means and pass its path as checkpoint_path"
            ) from error
        tried = _weight_files(Path(folder), patterns)
        if len(tried) == 1:
            return tried[0]
    found = ", ".join(path.name for path in tried) or "no weight files"
    raise DownloadError(f"{repo_id} holds {found}: download the right one and pass its path as checkpoint_path")


def architecture_of(source: str) -> tuple[str, dict[str, Any]]:
    """Return the registered name of a shared model, and the arguments that its constructor got.

    Args:
        source: "hf-hub:owner/name" or "local-dir:folder".

    Raises:
        CheckpointError: its config.json is missing or damaged.
        DownloadError: it cannot be fetched.
    """
    kind, _, place = source.partition(":")
    load = load_model_config_from_hf if kind == "hf-hub" else load_model_config_from_path
    try:
        _, name, model_kwargs = load(place)
    except (HfHubHTTPError, HFValidationError) as error:
        raise DownloadError(f"could not get {source}: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source} has no sound config.json: {error}") from error
    own = {"num_classes", "drop_head", "ema"}  # what every caller says for itself
    return name, {key: value for key, value in (model_kwargs or {}).items() if key not in own}


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
    private: bool = False,
    revision: str | None = None,
    commit_message: str = "Add model",
) -> None:
    """Upload a model to the Hugging Face hub in timm's form, as safetensors; ``create_model("hf-hub:...")`` reads it.

    Needs a login (``huggingface-cli login``) with write access to ``repo_id``.
    """
    push_to_hf_hub(
        model,
        repo_id,
        private=private,
        revision=revision,
        commit_message=commit_message,
        safe_serialization=True,
        model_card={"description": f"{type(model).__name__}, trained with linvision.", "license": "unknown"},
    )


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a model into a folder as ``push_to_hub`` uploads it; ``create_model("local-dir:...")`` reads it."""
    save_for_hf(model, str(folder), safe_serialization=True)
