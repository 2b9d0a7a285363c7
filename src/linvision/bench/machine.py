"""What a benchmark ran on: processor, versions, settings, and the peaks that were measured there."""

import os
import platform
from importlib import import_module
from typing import Any

import timm
import torch

import linvision
from linvision.bench.measure import alternate
from linvision.devices import cpu_name
from linvision.ops.backends.cpp import library
from linvision.ops.backends.triton.device import unusable

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far more than caches hold


def describe_machine(device: str) -> dict[str, Any]:
    """Describe hardware, versions and the settings of torch that change speed."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if gpu else None,
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "linvision": linvision.__version__,
        "kernels": kernels_on(device),
    }


def kernels_on(device: str) -> str:
    """Name the kernels that can run on a device."""
    if device != "cpu":
        reason = unusable(torch.empty(0, device=device))
        version = "" if reason else import_module("triton").__version__
        return f"no Triton kernels: {reason}" if reason else f"Triton kernels ({version})"
    return f"C++ kernels for {library.level()}" if library.missing() is None else "no C++ kernels"


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peaks(device: str, dtypes: list[str], *, repeats: int = 7) -> dict[str, Any]:
    """Measure what the machine can do at most: FLOP/s of a large matrix product by type, bytes/s of a large copy.

    Best of ``repeats``; a multiply-add is two operations, a copied byte one that is read and one that is written.
    """
    side = MATRIX_SIDE[device]
    products = {}
    for dtype in dtypes:
        a, b = (torch.rand(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        products[dtype] = 2 * side**3 / _best(lambda a=a, b=b: a @ b, device, repeats)
    source = torch.ones(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = 2 * source.numel() / _best(lambda: target.copy_(source), device, repeats)
    return {"flops_per_second": products, "bytes_per_second": copied}


def _best(step: Any, device: str, repeats: int) -> float:
    return min(alternate({"": step}, rounds=repeats, seconds=60, synchronize=lambda: synchronize(device))[""])
