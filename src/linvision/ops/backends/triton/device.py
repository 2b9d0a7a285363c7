"""What Triton kernels need of a device and of tensors, and the precision of their matrix products."""

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
COMPILING = {"enable_fp_fusion": True}  # multiply and add in one: Triton's default until 3.9, then no more
MOST_TILES = 16  # of a program that adds over tokens
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unusable(x: Tensor) -> str | None:
    """Say why no Triton kernel can compute tensors of this device and type, or return None if one can."""
    return _unusable(x.device, x.dtype)


@torch.compiler.assume_constant_result  # looking for a module or asking a driver would break compiled graphs
def _unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is computed in plain PyTorch"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}, not on a GPU"
    if torch.version.hip is None and _capability(device) < OLDEST_CAPABILITY:
        major, minor = _capability(device)
        return f"an old GPU, of compute capability {major}.{minor}; 8.0 is needed"
    return None


def interpreted() -> bool:
    """Tell whether Triton runs kernels in Python, on a CPU: set before Triton is imported, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose the type in which computed matrices (weighted scores, states) enter a product with inputs of a type.

    bfloat16 stays: it has float32's range. float16 has not, and states of long sequences or inverse norms leave it:
    there, computed matrices are float32 and the product takes them as TF32, which keeps float16's ten bits.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def product_precision(dtype: torch.dtype) -> str:
    """Choose how Triton multiplies float32 operands, beside inputs of a type.

    float16 inputs: as TF32, by which they lose nothing. float32 inputs: as TF32 where PyTorch's own products may use it
    (``torch.backends.cuda.matmul.fp32_precision`` and the settings before it), else as three products in TF32, which
    come to float32's precision on matrix cores. AMD's matrix cores take float32 as it is, and not all know TF32.
    """
    if interpreted():
        return "interpreted"
    if torch.version.hip is not None:
        return "ieee"
    return "tf32" if dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def operand_type(dtype: torch.dtype) -> Any:
    """Return ``operand_dtype`` as kernels know it."""
    import triton.language as tl

    return tl.bfloat16 if operand_dtype(dtype) == torch.bfloat16 else tl.float32


def registers(most: int) -> dict[str, int]:
    """Limit the registers of a thread, as an option of a kernel: more programs share a multiprocessor of NVIDIA's."""
    return {} if interpreted() or torch.version.hip is not None else {"maxnreg": most}


def launch(kernel: Any, num_programs: int, *arguments: Any, like: Tensor, **options: Any) -> None:
    """Start a kernel on the device of a tensor, as so many programs; none of them is no launch."""
    if num_programs == 0:
        return
    with torch.cuda.device(like.device) if like.device.type == "cuda" else nullcontext():
        kernel[(num_programs,)](*arguments, **COMPILING, **options)


def power_of_two(number: int, *, least: int = 1) -> int:
    """Return the smallest power of two that is neither below the number nor below ``least``."""
    return max(least, 1 << (number - 1).bit_length())


def tiles_and_pieces(batch: int, num_tokens: int, tokens: int) -> tuple[int, int]:
    """Share sequences out to programs that add over tokens: tiles of a program, and pieces of all sequences."""
    tiles = min(MOST_TILES, power_of_two(-(-num_tokens // tokens)))
    return tiles, batch * -(-num_tokens // (tiles * tokens))
