"""Freed memory is kept where glibc can be told to, and nowhere against the user's own settings."""

import os
import platform
import sys

import pytest
import torch

from linvision.ops import causal_conv1d, keep_freed_memory
from linvision.ops.backends.cpp import library
from tests.ops.kernels import needs_kernels

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


@needs_kernels
def test_the_first_kernel_asks_for_it_and_not_the_question_whether_there_are_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(library, "keep_freed_memory", lambda: calls.append(1))
    library._in_use.cache_clear()
    assert library.missing() is None
    assert not calls
    for _ in range(2):
        causal_conv1d(torch.ones(1, 2, 3), torch.ones(3, 1, 2))
    assert calls == [1]
