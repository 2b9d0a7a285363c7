"""The compiled library: found beside this file, loaded at first use, called with structures that mirror arguments.h."""

import ctypes
import os
from functools import cache
from importlib import resources
from typing import Any

import torch  # before the library: it brings the OpenMP runtime that both are to share
from torch import Tensor

from linvision.ops.backends.cpp.allocator import keep_freed_memory
from linvision.ops.backends.strides import with_unit_stride

LIBRARY = "liblinvision.so"
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_OUT_OF_MEMORY = 1


class Strided(ctypes.Structure):
    """A tensor whose first axes are batch, token and, for some, head; strides count elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor | None) -> "Strided":
        """Describe a tensor, which must outlive the call."""
        if x is None:
            return cls(None, 0, 0, 0)
        strides = x.stride()
        return cls(pointer(x), strides[0], strides[1], strides[2])


class Grid(ctypes.Structure):
    """Tokens (B, rows, columns, channels), channels contiguous."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, x: Tensor) -> "Grid":
        """Describe a tensor, which must outlive the call."""
        return cls(pointer(x), *x.stride()[:3])


@cache
def library() -> ctypes.CDLL | None:
    """Load the compiled kernels; None where they were not compiled.

    LINVISION_CPP_LIBRARY names another build of them, such as one with AddressSanitizer.
    """
    other = os.environ.get("LINVISION_CPP_LIBRARY")
    if other:
        return ctypes.CDLL(other)
    try:
        file = resources.files("linvision.ops.backends.cpp") / LIBRARY
        with resources.as_file(file) as path:
            return ctypes.CDLL(str(path))
    except OSError:
        return None


@cache
def _in_use() -> Any:
    """Return the library for a kernel to run; the first that does has freed memory kept for the following ones."""
    keep_freed_memory()
    return library()


@torch.compiler.assume_constant_result  # what torch.compile traces need not know how a library is loaded
def missing() -> str | None:
    """Say why no kernel can run, or return None if they can."""
    if library() is None:
        return "not compiled: the package was installed without a C++ compiler; install it again where there is one"
    return None


def level() -> str:
    """Name the instruction set that kernels use on this CPU."""
    loaded = library()
    return "none" if loaded is None else LEVELS[loaded.linvision_level()]


def call(function: str, arguments: ctypes.Structure) -> None:
    """Run a kernel.

    Raises:
        MemoryError: there was none left for a kernel's scratch.
        NotImplementedError: the kernel cannot compute this on this CPU; ``unsupported`` is to see to it beforehand.
    """
    status = getattr(_in_use(), function)(ctypes.byref(arguments))
    if status == _OUT_OF_MEMORY:
        raise MemoryError(f"{function}: out of memory")
    if status:
        raise NotImplementedError(f"{function}: not for this CPU, type or size")


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a tensor, which must outlive the call.

    Raises:
        ValueError: it has elements, but no memory.
    """
    if x is None:
        return None
    address = x.data_ptr()
    if not address and x.numel():
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no memory (its storage was freed); give one that has")
    return address


def readable(x: Tensor) -> Tensor:
    """Return tokens as kernels read them: x itself, or a copy with a contiguous last axis; float16 becomes float32."""
    return with_unit_stride(x if x.dtype in DTYPES else x.float())


def unreadable(x: Tensor) -> str | None:
    """Say why no kernel can compute what belongs to these tokens, or return None if one can."""
    if x.device.type != "cpu":
        return f"the tensors are on {x.device}, not on a CPU"
    if x.dtype == torch.float64:
        return "float64 is computed in plain PyTorch"
    return missing()
