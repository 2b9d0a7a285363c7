"""Runs that several tests look at."""

from pathlib import Path

import pytest

from linvision.cli import main
from tests.data.samples import write_folder
from tests.tasks.runs import TINY


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """Return an image folder of two classes."""
    return write_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, colours) -> Path:
    """Return the folder of a run of two epochs on it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY]) == 0
    return out
