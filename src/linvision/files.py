"""Files that are either the old ones or the new ones, never half of each."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it takes the place of ``path`` once all of it is on the disk.

    A process that is killed, or a disk that fills up on the way, leaves ``path`` as it was.

    Raises:
        OSError: naming ``path``, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say whose file it was
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write a text file in one piece; bytes of names that are no UTF-8 as ``\udce9``, which JSON reads back."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def as_json(content: Any, *, indent: int | None = None, digits: int = 6) -> str:
    """Write a result as JSON: numbers to so many digits, null for those that are none."""
    text = json.dumps(_rounded(content, digits), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _rounded(content: Any, digits: int) -> Any:
    if isinstance(content, float):
        return float(f"{content:.{digits}g}") if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _rounded(value, digits) for key, value in content.items()}
    return [_rounded(value, digits) for value in content] if isinstance(content, list | tuple) else content


def write_json(path: Path, content: Any, *, digits: int = 6) -> None:
    """Write a JSON file in one piece, numbers to so many digits."""
    write_text(path, as_json(content, indent=2, digits=digits) + "\n")


def write_weights(path: Path, state_dict: "dict[str, Tensor]") -> None:
    """Write a state dict as safetensors in one piece."""
    import safetensors.torch

    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
