"""Where commands compute."""

import os
from pathlib import Path

import pytest

from linvision.devices import available_cpus


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 6), ("250000 100000", 3), ("1000 100000", 1), ("", 6)])
def test_cpus_are_those_that_the_process_may_use(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: quota)
    assert available_cpus() == expected
