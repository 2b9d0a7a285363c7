"""The training state on disk: written in one piece, read as data only."""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from pytorch_lightning.plugins.io import TorchCheckpointIO

from linvision.errors import RunError
from linvision.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves a training state so that the old one stays until the new one is complete."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path`` in one piece."""
        with replacing(Path(path)) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a training state, as data only.

        Raises:
            RunError: the file is damaged.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except (pickle.UnpicklingError, RuntimeError, EOFError, BadZipFile, KeyError) as error:
            raise RunError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
