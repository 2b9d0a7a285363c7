"""What ``gpu_verification.py`` does to tell how fast single kernels are."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from linvision import ops
from linvision.bench.machine import measure_peaks, synchronize
from linvision.bench.measure import alternate, spread
from linvision.ops import (
    BlockDiagonalParameters,
    GateParameters,
    depthwise_conv2d,
    gated_head_norm,
    mlstm,
    selective_scan,
    use_backend,
)
from linvision.ops.backends.triton.device import interpreted

SMOKE = interpreted()
DEVICE = "cpu" if SMOKE else "cuda"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = torch.bfloat16
BATCH = 1 if SMOKE else 32
Row = dict[str, Any]
Case = tuple[str, Callable[[], Iterator[Row]]]
Contestant = tuple[Callable, dict[str, Any]]


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw normal numbers."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def mlstm_inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make what an mLSTM reads."""
    q, k, v = (noise(batch, tokens, heads, dim, dtype=dtype, seed=seed) for seed in range(3))
    i, f = (noise(batch, tokens, heads, seed=seed) * 3 for seed in (3, 4))
    return {"q": q, "k": k, "v": v, "i": i, "f": f + 3}


def scan_inputs(batch: int, tokens: int, width: int, states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make what a selective scan reads."""
    u, delta, z, residual = (noise(batch, tokens, width, dtype=dtype, seed=seed) for seed in (0, 1, 2, 7))
    B, C = (noise(batch, tokens, states, dtype=dtype, seed=seed) for seed in (3, 4))
    A = -torch.arange(1.0, states + 1, device=DEVICE).repeat(width, 1)
    D, bias = noise(width, seed=5), noise(width, seed=6) - 3
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}
    return inputs | {"residual": residual}


def convolution_inputs(batch: int, rows: int, columns: int, channels: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make what ViL's convolution reads."""
    x, weight, bias = noise(batch, rows, columns, channels, dtype=dtype), noise(channels, 1, 3, 3), noise(channels)
    return {"x": x, "weight": weight / 3, "bias": bias}


def projection_inputs(batch: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make what ``mlstm_inputs`` reads, for four heads."""
    inputs = {name: noise(batch, tokens, width, dtype=dtype, seed=seed) for seed, name in enumerate("cx")}
    for seed, name in enumerate("qkv"):
        inputs[name] = noise(width // 4, 4, 4, seed=seed + 2) / 2
        inputs[f"{name}_bias"] = noise(width, seed=seed + 5)
    for seed, name in enumerate("if"):
        inputs[name] = noise(4, 3 * width, seed=seed + 8) / width**0.5
        inputs[f"{name}_bias"] = noise(4, seed=seed + 10)
    return inputs


def project(c: Tensor, x: Tensor, **parameters: Tensor) -> tuple[Tensor, ...]:
    """Compute q, k, v, i and f."""
    q, k, v = (BlockDiagonalParameters(parameters[name], parameters[f"{name}_bias"]) for name in "qkv")
    i, f = (GateParameters(parameters[name], parameters[f"{name}_bias"]) for name in "if")
    return ops.mlstm_inputs(c, x, q, k, v, i=i, f=f)


def gated_norm_inputs(batch: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make what the end of a ViL layer reads, for four heads."""
    inputs = {"h": noise(batch, tokens, 4, width // 4, dtype=dtype)}
    inputs |= {name: noise(batch, tokens, width, dtype=dtype, seed=seed) for seed, name in enumerate("cz", start=1)}
    return inputs | {name: noise(width, seed=seed) for seed, name in enumerate(("weight", "bias", "skip"), start=3)}


def outputs(answer: Any) -> tuple[Tensor, ...]:
    """List what an op answers."""
    return answer if isinstance(answer, tuple) else (answer,)


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a step into a CUDA graph; return it, and what the step returned, which replays write anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = step()
    return graph, answer


def kernels() -> Iterator[Case]:
    """Time the kernels at the shapes of the tiny and small models."""
    peaks: dict[str, Any] = {}
    yield "measured peaks", lambda: measure_machine(peaks)
    for width in [32] if SMOKE else [384, 768]:
        for tokens in [5] if SMOKE else [784, 6084, 16384]:
            yield f"mlstm, D = {width // 4}, S = {tokens}", lambda w=width, t=tokens: race_mlstm(w, t, peaks)
            yield f"scan, E = {width}, S = {tokens}", lambda w=width, t=tokens: race_scan(w, t, peaks)
            yield from between_products(width, tokens, peaks)


def compiled_kernels() -> Iterator[Case]:
    """Time what stands around the scans once more, beside what PyTorch's compiler makes of it."""
    peaks: dict[str, Any] = {}
    yield "measured peaks", lambda: measure_machine(peaks)
    yield from between_products(32 if SMOKE else 384, 5 if SMOKE else 16384, peaks, compiled=True)


def between_products(width: int, tokens: int, peaks: dict[str, Any], *, compiled: bool = False) -> Iterator[Case]:
    """Time the kernels of a ViL layer that do but move numbers.

    The convolution of 3 x 3 tokens reads x and writes y, backward x, dy and dx; mlstm_inputs makes three tensors of
    two, backward two of five; the gated norm one of three, backward three of four.
    """
    side = math.isqrt(tokens)
    for name, function, inputs, moved in (
        (
            f"convolution, C = {width}, {side} x {side}",
            partial(depthwise_conv2d, activation="silu"),
            lambda: convolution_inputs(BATCH, side, side, width, HALF),
            (2, 5),
        ),
        (
            f"mlstm_inputs, E = {width}, S = {tokens}",
            project,
            lambda: projection_inputs(BATCH, tokens, width, HALF),
            (5, 12),
        ),
        (
            f"gated norm, E = {width}, S = {tokens}",
            partial(gated_head_norm, eps=1e-5),
            lambda: gated_norm_inputs(BATCH, tokens, width, HALF),
            (4, 11),
        ),
    ):
        race = partial(race_movers, function, moved=moved, peaks=peaks, compiled=compiled)
        yield name + ", compiled" * compiled, lambda race=race, inputs=inputs: race(inputs())


def measure_machine(peaks: dict[str, Any]) -> Iterator[Row]:
    """Measure what floors are made of."""
    peaks.update(measure_peaks(DEVICE, ["bfloat16", "float32"], repeats=1 if SMOKE else 7))
    peaks["exponentials_per_second"] = measure_exponentials(rounds=2 if SMOKE else 4096)
    rates = {f"{name} TFLOP/s": rate / 1e12 for name, rate in peaks["flops_per_second"].items()}
    rates["exponentials, T/s"] = peaks["exponentials_per_second"] / 1e12
    yield {"GB/s": peaks["bytes_per_second"] / 1e9} | rates


@triton.jit
def _exponentials_kernel(out, rounds, SIZE: tl.constexpr):
    """Take exponentials, one after the other, of as many numbers at once as keep the units busy."""
    x = tl.arange(0, SIZE).to(tl.float32) / SIZE
    for _ in range(0, rounds):
        x = tl.exp2(x - 1.0)
    tl.store(out + tl.program_id(0) * SIZE + tl.arange(0, SIZE), x)


def measure_exponentials(rounds: int) -> float:
    """Return exponentials a second, best of five."""
    programs, size = (1, 16) if SMOKE else (132 * 64, 1024)
    out = torch.empty(programs * size, device=DEVICE)
    seconds = []
    for _ in range(5):
        synchronize(DEVICE)
        start = perf_counter()
        _exponentials_kernel[(programs,)](out, rounds, SIZE=size)
        synchronize(DEVICE)
        seconds.append(perf_counter() - start)
    return programs * size * rounds / min(seconds)


def race_mlstm(width: int, tokens: int, peaks: dict[str, Any]) -> Iterator[Row]:
    """Time the mLSTM with four heads.

    The least to compute is the recurrence itself. The least to move: forward three inputs and the result, backward
    these and their four gradients; gates are small.
    """
    inputs = mlstm_inputs(BATCH, tokens, 4, width // 4, HALF)
    contestants: dict[str, Contestant] = {"ours": (mlstm, inputs)} | attention(inputs) | mlstm_peers(inputs)
    elements = BATCH * tokens * width
    seconds = 4 * elements * (width // 4) / peaks["flops_per_second"]["bfloat16"]
    bandwidth = peaks["bytes_per_second"]
    floors = {
        "forward": max(8 * elements / bandwidth, seconds),
        "forward and backward": max(24 * elements / bandwidth, 3 * seconds),
    }
    yield from race(contestants, floors)


def race_scan(width: int, tokens: int, peaks: dict[str, Any]) -> Iterator[Row]:
    """Time the scan with 16 states, without a residual, as Vim's first direction has none.

    An exponential a state and token is the least in each pass: those of the forward pass are too many to keep.
    """
    inputs = scan_inputs(BATCH, tokens, width, 16, HALF)
    del inputs["residual"]
    elements = BATCH * tokens * width
    seconds = 9 * elements * 16 / peaks["flops_per_second"]["float32"]
    exponentials = elements * 16 / peaks["exponentials_per_second"]
    bandwidth = peaks["bytes_per_second"]
    contestants: dict[str, Contestant] = {"ours": (partial(selective_scan, delta_softplus=True), inputs)}
    floors = {
        "forward": max(8 * elements / bandwidth, seconds, exponentials),
        "forward and backward": max(24 * elements / bandwidth, 3 * seconds, 2 * exponentials),
    }
    yield from race(contestants, floors)


def race_movers(
    function: Callable, inputs: dict[str, Tensor], *, moved: tuple[int, int], peaks: dict[str, Any], compiled: bool
) -> Iterator[Row]:
    """Time what does but move so many tensors of the first one's size, beside plain PyTorch, compiled or not."""
    plain = function
    if compiled:
        torch.compiler.reset()
        plain = torch.compile(function, dynamic=False, backend="aot_eager" if SMOKE else "inductor")
    contestants: dict[str, Contestant] = {"ours": (function, inputs), "plain": (in_plain_pytorch(plain), inputs)}
    tokens = next(iter(inputs.values()))
    transfer = tokens.element_size() * tokens.numel() / peaks["bytes_per_second"]
    modes = ("forward", "forward and backward")
    yield from race(contestants, {mode: count * transfer for mode, count in zip(modes, moved, strict=True)})


def in_plain_pytorch(function: Callable) -> Callable:
    """Force the backend."""

    def run(**inputs: Any) -> Any:
        with use_backend("plain"):
            return function(**inputs)

    return run


def attention(inputs: dict[str, Tensor]) -> dict[str, Contestant]:
    """Prepare fused attention over the same heads."""
    query, key, value = (inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    return {"flash attention": (scaled_dot_product_attention, {"query": query, "key": key, "value": value})}


def mlstm_peers(inputs: dict[str, Tensor]) -> dict[str, Contestant]:
    """Find the published kernels that are installed, and work there: for measuring only."""
    peers: dict[str, Contestant] = {}
    with suppress(ImportError, AttributeError, RuntimeError):
        function = import_module("mlstm_kernels.torch.chunkwise").mlstm_chunkwise__xl_chunk
        peers["mlstm_kernels"] = (function, {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()})
    with suppress(ImportError, AttributeError, RuntimeError):
        # Its gated linear attention: the mLSTM without input gate, normaliser and stabiliser.
        linear = import_module("fla.ops.simple_gla").chunk_simple_gla
        gates = logsigmoid(inputs["f"])
        peers["fla simple_gla"] = (lambda **x: linear(**x)[0], {n: inputs[n] for n in "qkv"} | {"g": gates})
    return peers


def race(contestants: dict[str, Contestant], floors: dict[str, float]) -> Iterator[Row]:
    """Time kernels in turns and set ours against the floors, in seconds by mode.

    What is timed are replays of CUDA graphs: small kernels take the device less time than they take the host. What
    cannot be captured is launched, and named.
    """
    for (mode, floor), prepare in zip(floors.items(), (run_forward, run_both), strict=True):
        row: Row = {"mode": mode}
        steps: dict[str, Callable[[], None]] = {}
        launched = []
        for name, (function, inputs) in contestants.items():
            step = prepare(function, inputs)
            try:
                step()
            except Exception as error:  # a peer's limits are not ours
                if name == "ours":
                    raise
                row[f"{name} ms"] = f"cannot run: {' '.join(str(error).split())[:80]}"
                continue
            steps[name] = step
            if SMOKE:
                continue
            try:
                steps[name] = capture(step)[0].replay
            except RuntimeError:
                launched.append(name)
        if launched:
            row["not captured"] = ", ".join(launched)
        times = alternate(
            steps, rounds=3 if SMOKE else 9, seconds=0 if SMOKE else 1, synchronize=lambda: synchronize(DEVICE)
        )
        row |= {f"{name} ms": 1e3 * spread(own).median for name, own in times.items() if own}
        row["floor ms"] = 1e3 * floor
        yield row | {"ours / floor": row["ours ms"] / row["floor ms"]}


def run_forward(function: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a forward pass to time."""

    def step() -> None:
        with torch.no_grad(), use_backend("triton"):
            function(**inputs)

    return step


def run_both(function: Callable, inputs: dict[str, Any]) -> Callable[[], None]:
    """Return a forward and a backward pass to time."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if isinstance(x, Tensor)}

    def step() -> None:
        with use_backend("triton"):
            y = outputs(function(**inputs | leaves))
            torch.autograd.grad(y, list(leaves.values()), [x.detach() for x in y], allow_unused=True)

    return step
