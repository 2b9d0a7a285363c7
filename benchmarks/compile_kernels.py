"""Compile the Triton kernels as models launch them, for GPUs that need not be there, and say what they take of a card.

    python benchmarks/compile_kernels.py                                            # everything
    python benchmarks/compile_kernels.py --targets sm_90 --widths 96 --states 16 --types bfloat16

A row a kernel and target: shared memory of a block beside the most that the card gives one, registers of a thread, the
bytes of its stack, which is where registers that do not suffice are spilled, and the instructions of its longest
innermost loop (NVIDIA; of the scan, a tile of tokens or two). The exit code says whether all fit.
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linvision.ops.backends.scan_inputs import Inputs, interval
from linvision.ops.backends.triton import convolution, device, gated_norm, mlstm, mlstm_inputs, selective_scan

KIB = 1024
# The most shared memory that a block may have; of all of a generation, the least.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),  # and sm_89
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOKENS = 784  # more than a chunk, and no multiple of one


@dataclass(frozen=True)
class Launch:
    """A kernel with what it was called with: tensors on the meta device, numbers, and options by name."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> Any:
        """Compile for a GPU, specialised as a launch there would be: for 1, for multiples of 16, for aligned memory."""
        names = self.kernel.arg_names
        given = dict(zip(names, self.arguments, strict=False)) | {n: x for n, x in self.options.items() if n in names}
        signature, constants, attributes = {}, {}, {}
        for place, name in enumerate(names):
            x = given[name]
            if isinstance(x, Tensor):
                signature[name] = f"*{TYPES[x.dtype]}"
            elif self.kernel.params[place].is_constexpr or x is None or x == 1:
                signature[name], constants[name] = "constexpr", x
                continue
            elif isinstance(x, float):
                signature[name] = "fp32"
                continue
            else:
                signature[name] = "i32" if x < 2**31 else "i64"
            if isinstance(x, Tensor) or x % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        settings = device.COMPILING | {name: x for name, x in self.options.items() if name not in names}
        return triton.compile(source, target=target, options=settings)


def launches_of(run: Callable[[], Any], implementation: Any, target: GPUTarget) -> list[Launch]:
    """List what an implementation would launch on such a GPU."""
    found = []

    def note(kernel: Any, num_programs: int, *arguments: Any, like: Tensor, **options: Any) -> None:
        found.append(Launch(kernel, arguments, options))

    version = "0" if target.backend == "hip" else None
    with mock.patch.object(implementation, "launch", note), mock.patch.object(torch.version, "hip", version):
        run()
    return found


def mlstm_launches(dtype: torch.dtype, head_dim: int, states: bool, target: GPUTarget) -> list[Launch]:
    """List the kernels of a forward and a backward pass."""
    with torch.device("meta"):
        q, h = (torch.empty(2, TOKENS, 4, head_dim, dtype=dtype) for _ in range(2))
        gate = torch.empty(2, TOKENS, 4)
        state = (torch.empty(2, 4, head_dim, head_dim), torch.empty(2, 4, head_dim), torch.empty(2, 4))
    inputs, given = (q, q, q, gate, gate), state if states else None

    def run() -> None:
        mlstm.forward(*inputs, given, return_state=states, reverse=True)
        mlstm.backward(h, state[:2] if states else None, h, inputs, given, reverse=True)

    return launches_of(run, mlstm, target)


def scan_launches(dtype: torch.dtype, num_states: int, target: GPUTarget) -> list[Launch]:
    """List the kernels of a forward and a backward pass with all options."""
    with torch.device("meta"):
        u = torch.empty(2, TOKENS, 384, dtype=dtype)
        B, A, D = torch.empty(2, TOKENS, num_states, dtype=dtype), torch.empty(num_states, 384), torch.empty(384)
        state = torch.empty(2, 384, num_states)
        kept = torch.empty(-(-TOKENS // interval(num_states)), 2, num_states, 384)
    inputs = Inputs(u, u, A, B, B, D, u, D, delta_softplus=True, reverse=True, residual=u)

    def run() -> None:
        selective_scan.forward(inputs, state, keep_states=True)
        selective_scan.backward(inputs, kept, u, state)

    return launches_of(run, selective_scan, target)


def convolution_launches(dtype: torch.dtype, kernel: tuple[int, int], target: GPUTarget) -> list[Launch]:
    """List the kernels of a forward and a backward pass, causal where the kernel has one row."""
    with torch.device("meta"):
        x = torch.empty(2, 28, TOKENS // 28, 384, dtype=dtype)
        weight, bias = torch.empty(384, 1, *kernel), torch.empty(384)
    options = {"causal": kernel[0] == 1, "silu": True, "reverse": True}

    def run() -> None:
        convolution.forward(x, weight, bias, **options)
        convolution.backward(x, x, weight, bias, **options)

    return launches_of(run, convolution, target)


def mlstm_inputs_launches(dtype: torch.dtype, target: GPUTarget) -> list[Launch]:
    """List the kernels of a forward and a backward pass of what an mLSTM of 4 heads is fed."""
    with torch.device("meta"):
        x, weight, bias = torch.empty(2, TOKENS, 384, dtype=dtype), torch.empty(96, 4, 4), torch.empty(384)
        gate, of_heads, gate_bias = torch.empty(2, TOKENS, 4), torch.empty(4, 3 * 384), torch.empty(4)
    parameters = [weight] * 3, [bias] * 3, [of_heads] * 2, [gate_bias] * 2

    def run() -> None:
        mlstm_inputs.forward(x, x, *parameters)
        mlstm_inputs.backward([x, x, x, gate, gate], x, x, *parameters)

    return launches_of(run, mlstm_inputs, target)


def gated_norm_launches(dtype: torch.dtype, target: GPUTarget) -> list[Launch]:
    """List the kernels of a forward and a backward pass with 4 heads."""
    with torch.device("meta"):
        h, c, parameter = (
            torch.empty(2, TOKENS, 4, 96, dtype=dtype),
            torch.empty(2, TOKENS, 384, dtype=dtype),
            torch.empty(384),
        )
    parameters = (parameter, parameter, parameter, 1e-5)

    def run() -> None:
        gated_norm.forward(h, c, c, *parameters)
        gated_norm.backward(c, h, c, c, *parameters)

    return launches_of(run, gated_norm, target)


@dataclass(frozen=True)
class Row:
    """What a kernel takes: bytes of shared memory and of stack, registers, instructions of its longest loop."""

    target: str
    case: str
    kernel: str
    shared: int
    limit: int
    registers: int | None
    stack: int | None
    loop: int | None

    @property
    def fits(self) -> bool:
        """Whether a block may have so much."""
        return self.shared <= self.limit


def measure(target_name: str, case: str, launches: list[Launch]) -> Iterator[Row]:
    """Compile what was listed; the same kernel twice is one row, as one of them is."""
    target, limit = TARGETS[target_name]
    seen = set()
    for launch in launches:
        compiled = launch.compile(target)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            name = launch.kernel.__name__
            yield Row(target_name, case, name, compiled.metadata.shared, limit, *usage(compiled))


def usage(compiled: Any) -> tuple[int | None, int | None, int | None]:
    """Return registers and bytes of stack of a thread, and the instructions of the longest innermost loop."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = [re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
        loop = None
    else:
        with TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            text, code = (disassemble(file, option) for option in ("--dump-resource-usage", "--dump-sass"))
        found = [re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK")]
        loop = longest_loop(code)
    registers, stack = (None if match is None else int(match[1]) for match in found)
    return registers, stack, loop


def disassemble(file: Path, option: str) -> str:
    """Ask CUDA's tool, which Triton brings along."""
    return subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, file], capture_output=True, text=True).stdout


def longest_loop(code: str) -> int | None:
    """Count the instructions from the target of a branch backwards to the branch, of loops that hold no other."""
    places = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", code, re.MULTILINE)]
    branches = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?BRA\S*\s.*?(0x[0-9a-f]+)", code, re.MULTILINE)
    loops = [(int(to, 16), int(at, 16)) for at, to in branches if int(to, 16) < int(at, 16)]
    inner = [
        one for one in loops if not any(one != other and one[0] <= other[0] < other[1] <= one[1] for other in loops)
    ]
    return max((sum(first <= place <= last for place in places) for first, last in inner), default=None)


def rows(
    targets: list[str],
    types: list[str],
    widths: list[int],
    states: list[int],
    kernels: list[tuple[int, int]],
    handed_over: tuple[bool, ...],
) -> Iterator[Row]:
    """Measure all combinations; ``handed_over``: whether the mLSTM starts from a state and returns one."""
    for name in targets:
        target, _ = TARGETS[name]
        for type_name in types:
            dtype = getattr(torch, type_name)
            for width in widths:
                for with_state in handed_over:
                    case = f"mlstm {type_name} D={width}{' with states' if with_state else ''}"
                    yield from measure(name, case, mlstm_launches(dtype, width, with_state, target))
            for number in states:
                yield from measure(name, f"scan {type_name} N={number}", scan_launches(dtype, number, target))
            for kernel in kernels:
                case = f"convolution {type_name} {kernel[0]}x{kernel[1]}"
                yield from measure(name, case, convolution_launches(dtype, kernel, target))
            if kernels:
                yield from measure(name, f"mlstm_inputs {type_name}", mlstm_inputs_launches(dtype, target))
                yield from measure(name, f"gated norm {type_name}", gated_norm_launches(dtype, target))


def main() -> int:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, by commas")
    parser.add_argument("--types", default="bfloat16,float16,float32", help="types of the inputs, by commas")
    parser.add_argument(
        "--widths", default="48,96,192,384", help="channels of the mLSTM's heads, by commas, or nothing"
    )
    parser.add_argument("--states", default="1,16,64", help="states of the scan's channels, by commas, or nothing")
    parser.add_argument(
        "--kernels",
        default="3x3,1x4",
        help="sides of convolutions, by commas, or nothing (then no mlstm_inputs and gated norms of ViL)",
    )
    parser.add_argument("--stateless", action="store_true", help="no mLSTM that starts from a state and returns one")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets does not know {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if device.interpreted():
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    widths, states = ([int(n) for n in text.split(",") if n] for text in (options.widths, options.states))
    kernels = [(int(a), int(b)) for a, b in (text.split("x") for text in options.kernels.split(",") if text)]
    handed_over = (False,) if options.stateless else (False, True)
    fit = True
    for row in rows(targets, options.types.split(","), widths, states, kernels, handed_over):
        fit = fit and row.fits
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            taken = f"{row.shared / KIB:6.1f} of {row.limit // KIB:3} KiB{'' if row.fits else ' TOO MUCH'}"
            print(
                f"{row.target:7} {row.case:34} {row.kernel:22} {taken}, registers {row.registers}, stack {row.stack}, "
                f"loop {row.loop}"
            )
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
