"""Freed memory is kept where glibc can be told to, and nowhere against the user's own settings."""

import os
import platform
import sys

import pytest

from linvision.ops import keep_freed_memory

ON_GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LINVISION_KEEP_MEMORY", raising=False)


def test_glibc_is_told():
    assert keep_freed_memory() == ON_GLIBC


@pytest.mark.parametrize(
    ("name", "value"),
    [("LINVISION_KEEP_MEMORY", "0"), ("MALLOC_TRIM_THRESHOLD_", "1"), ("LD_PRELOAD", "libjemalloc.so")],
)
def test_the_users_settings_come_first(monkeypatch, name, value):
    monkeypatch.setitem(os.environ, name, value)
    assert not keep_freed_memory()
