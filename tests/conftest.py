"""What all tests share: one thread, Triton's interpreter where there is no GPU, a word on what is left out."""

import logging
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # to be set before Triton is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
logging.getLogger("torch.__trace").propagate = False  # a compiler's diary, long, for nobody here
torch.set_num_threads(1)  # the models here are too small for more; tests about threads ask for theirs


@pytest.fixture(autouse=True)
def _one_thread():
    """Leave the number of threads as it was, whatever a test does."""
    yield
    torch.set_num_threads(1)


_left_out: Counter[str] = Counter()


def pytest_deselected(items):
    """Count the tests that a marker or a name leaves out, by file."""
    _left_out.update(item.nodeid.partition("::")[0] for item in items)


def pytest_sessionfinish(session):
    """Hand the count from a process of pytest-xdist's to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Take over a process's count; all of them collect the same tests."""
    _left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out")) - _left_out)


def pytest_terminal_summary(terminalreporter):
    """Say which tests did not run and why."""
    skipped = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    lines = [f"{count} skipped: {reason.removeprefix('Skipped: ')}" for reason, count in skipped.most_common()]
    lines += [f"{count} left to make test-all: {file}" for file, count in sorted(_left_out.items())]
    if lines:
        terminalreporter.section("not run", "-")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """Return an image folder of two classes."""
    from tests.data.samples import write_folder

    return write_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, colours) -> Path:
    """Return the folder of a run of two epochs on it."""
    from linvision.cli import main
    from tests.tasks.runs import TINY

    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", "--data", str(colours), "--out", str(out), *TINY]) == 0
    return out
