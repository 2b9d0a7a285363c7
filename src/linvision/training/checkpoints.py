"""The training state on disk: written in one piece, read as data only."""

import io
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from linvision.errors import RunError
from linvision.files import replacing

PARTS = {
    "epoch",
    "global_step",
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "loops",
    "pytorch-lightning_version",
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a training state beside its place, so that the old one stays until the new one is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` in one piece."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a training state, as data only.

        Raises:
            RunError: the file is damaged or no training state.
        """
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, KeyError, ValueError) as error:
            # What the unpickler says advises to trust the file.
            plain = str(error) and not isinstance(error, pickle.UnpicklingError)
            reason = str(error).splitlines()[0] if plain else "cut short, or no plain data"
            raise RunError(f"{path} is damaged: {reason}") from error
        missing = PARTS - set(checkpoint) if isinstance(checkpoint, dict) else PARTS
        if missing:
            raise RunError(f"{path} is no training state: it lacks {', '.join(sorted(missing))}")
        return checkpoint
