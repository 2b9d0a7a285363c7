"""Keep memory that a forward pass frees, for the next layer to use.

PyTorch takes CPU tensors from the C library's allocator and gives them back to it. glibc in turn hands large freed
blocks to the system at once, so that each layer's activations are new pages, which the system must clear: a third of
the time of a ViL-T. Telling glibc to keep up to 1 GiB costs no memory at the peak.
"""

import ctypes
import os
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
LARGEST_HEAP_BLOCK = 32 << 20  # the most that glibc takes for M_MMAP_THRESHOLD on 64 bits


def keep_freed_memory() -> bool:
    """Set glibc to keep freed memory for this process; returns whether it does.

    It is left alone elsewhere than on Linux, with another allocator's library preloaded, where glibc's own environment
    variables already say something, and with LINVISION_KEEP_MEMORY=0.
    """
    settings = ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if sys.platform != "linux" or os.environ.get("LINVISION_KEEP_MEMORY") == "0":
        return False
    if any(os.environ.get(name) for name in settings):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
