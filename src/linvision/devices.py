"""Where commands compute and how: the words for it, the choice of a device, for which torch is imported, its name."""

import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from linvision.errors import UsageError

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["32", "bf16", "16"]
Checkpointing = Literal["none", "selective", "full"]


def choose_device(device: Device, precision: Precision = "32") -> "torch.device":
    """Return the device to run on.

    Raises:
        UsageError: there is no GPU but one is asked for, or precision 16 is asked for without one.
    """
    import torch

    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    chosen = torch.device("cuda" if gpu and device != "cpu" else "cpu")
    if precision == "16" and chosen.type == "cpu":
        raise UsageError("--precision 16 needs a GPU: use 32 or bf16 on the CPU")
    return chosen


def autocast_dtype(precision: Precision) -> "torch.dtype | None":
    """Return the type that autocast is to choose, or None for none."""
    import torch

    return {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[precision]


def available_cpus() -> int:
    """Count the CPUs that this process may use: those it is bound to (taskset, SLURM), within the container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        bound = min(bound, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return bound


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
