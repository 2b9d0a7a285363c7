"""Published files, downloaded once: with time-outs, resumed after an interruption, checked, one writer at a time."""

import hashlib
import http
import http.client
import logging
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock
from huggingface_hub.utils import tqdm

from linvision.errors import DownloadError
from linvision.models.weight_files import damage

TIMEOUT = 30.0  # seconds that a server may be silent
CHUNK = 1 << 20
HASH = re.compile(r"-([0-9a-f]{8,64})\.")  # of a published file in its name, as torch's and timm's have it
INTERRUPTED = (OSError, http.client.HTTPException)

_logger = logging.getLogger(__name__)


def fetch(url: str, folder: str | Path | None = None) -> Path:
    """Download published weights, with a progress bar, and check that they are whole.

    An interrupted download is resumed, by the next call too; a damaged file in the cache is fetched again. Threads and
    processes that want the same file wait for the one that downloads it.

    Args:
        url: of the file.
        folder: where it is kept; None for the torch hub cache.

    Raises:
        DownloadError: without a network or with a damaged download; names the URL and where to put the file by hand.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints" if folder is None else Path(folder)
    target = folder / unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if target.exists() and damage_of(target) is None:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{target.name}.lock"):
            damaged = damage_of(target) if target.exists() else None
            if damaged:
                _logger.warning("%s is fetched again, since it is damaged: %s", target, damaged)
            if damaged or not target.exists():
                _download(url, target)
    except INTERRUPTED as error:
        raise DownloadError(
            f"could not download {url} ({str(error) or type(error).__name__}); fetch it by other means and save it as "
            f"{target}{', which is damaged' if target.exists() else ''}, or pass its path as checkpoint_path"
        ) from error
    return target


def damage_of(path: Path, checksum: str = "") -> str | None:
    """Say why a published file is not what was published, or None.

    ``checksum`` is the start of its SHA-256; by default the one that the file's name carries, if it does.
    """
    checksum = checksum or checksum_in(path.name)
    if not checksum:
        return damage(path)
    with path.open("rb") as file:
        own = hashlib.file_digest(file, "sha256").hexdigest()
    return None if own.startswith(checksum) else f"its SHA-256 begins with {own[:8]} instead of {checksum[:8]}"


def checksum_in(name: str) -> str:
    """Return the start of the SHA-256 that a file's name carries, or nothing."""
    found = HASH.search(name)
    return found[1] if found else ""


def _download(url: str, target: Path) -> None:
    """Download into a file beside the target, which is there once it is whole."""
    partial = target.with_name(f"{target.name}.part")
    for resumed in (partial.exists(), False):
        _receive(url, partial)
        damaged = damage_of(partial, checksum_in(target.name))
        if damaged is None:
            partial.replace(target)
            return
        partial.unlink()
        if not resumed:  # otherwise its beginning may have been of another version
            raise DownloadError(f"what came is damaged: {damaged}")


def _receive(url: str, partial: Path) -> None:
    """Receive a file from where it was interrupted, as long as each attempt brings something."""
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _receive_once(url, partial, before):
                return
            reason: Exception = OSError("the connection ended early")
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not before:
                raise
            partial.unlink()  # it is no beginning of the file that is there now
            continue
        except INTERRUPTED as error:
            reason = error
        if not partial.exists() or partial.stat().st_size <= before:
            raise reason


def _receive_once(url: str, partial: Path, start: int) -> bool:
    """Append what follows after ``start`` bytes; say whether the file is complete."""
    request = urllib.request.Request(url, headers={"User-Agent": "linvision", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        length = response.headers.get("Content-Length")
        size = (start if resumed else 0) + int(length) if length else None
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(total=size, initial=file.tell(), unit="B", unit_scale=True, desc=partial.stem, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return size is None or partial.stat().st_size >= size
