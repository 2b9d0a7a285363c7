"""What ``gpu_verification.py`` does with single kernels: whether they are right, and how fast they are."""

# ruff: noqa: E402  (the interpreter is chosen before Triton is imported)

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

SMOKE = "--smoke" in sys.argv
if SMOKE:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from linvision.bench.machine import measure_peaks, synchronize
from linvision.bench.measure import alternate, spread
from linvision.ops import MLSTMState, mlstm, selective_scan, use_backend

DEVICE = "cpu" if SMOKE else "cuda"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative errors (of norms) of outputs and gradients that are allowed; a section with a larger one fails.
BOUNDS = {"float32": (1e-5, 2e-4), "float16": (2e-3, 1e-2), "bfloat16": (1.2e-2, 4e-2)}
HALF = torch.bfloat16
Row = dict[str, Any]
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
    u, delta, z = (noise(batch, tokens, width, dtype=dtype, seed=seed) for seed in range(3))
    B, C = (noise(batch, tokens, states, dtype=dtype, seed=seed) for seed in (3, 4))
    A = -torch.arange(1.0, states + 1, device=DEVICE).repeat(width, 1)
    D, bias = noise(width, seed=5), noise(width, seed=6) - 3
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compare by norms."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def outcome(op: Callable, inputs: dict[str, Tensor], backend: str, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return everything that an op answers, and the gradients of a loss that takes in all of it."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    arguments = dict(leaves)
    if "C0" in arguments:
        arguments["initial_state"] = MLSTMState(arguments.pop("C0"), arguments.pop("n0"), options.pop("m0"))
    with use_backend(backend):
        y, state = op(**arguments, return_state=True, **options)
        weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
        states = [state] if isinstance(state, Tensor) else list(state[:2])
        loss = (y.double() * weight).sum() + sum(x.double().square().mean() for x in states)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [y, *states], list(gradients)


def compare(op: Callable, inputs: dict[str, Tensor], **options: Any) -> Row:
    """Hold Triton's kernels, and plain PyTorch in the same type, against float64."""
    exact_options = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    exact = outcome(op, {name: x.double() for name, x in inputs.items()}, "plain", **exact_options)
    row: Row = {}
    for backend in ("triton", "plain"):
        answer = outcome(op, inputs, backend, **options)
        for kind, ours, expected in zip(("output", "gradient"), answer, exact, strict=True):
            row[f"{backend} {kind}"] = max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))
    return row


def correctness() -> Iterator[Row]:
    """Hold the kernels against float64."""
    lengths = (5,) if SMOKE else (1, 63, 257, 785)
    for type_name, dtype in TYPES.items():
        for dim in (4, 96) if SMOKE else (4, 48, 96, 192, 384):
            for index, tokens in enumerate(lengths):
                inputs, options = mlstm_inputs(2, tokens, 2, dim, dtype), {"reverse": bool((index + dim // 4) % 2)}
                if index % 2:
                    inputs |= {"C0": noise(2, 2, dim, dim, seed=7), "n0": noise(2, 2, dim, seed=8)}
                    options["m0"] = noise(2, 2, seed=9)
                case = f"mlstm {type_name} D={dim} S={tokens} {'reverse' if options['reverse'] else 'forward'}"
                yield judge({"case": case} | compare(mlstm, inputs, **options), type_name)
        for states in (4,) if SMOKE else (1, 16, 17, 64):
            for index, tokens in enumerate(lengths):
                inputs = scan_inputs(2, tokens, 6 if SMOKE else 200, states, dtype)
                if index % 2:
                    inputs["initial_state"] = noise(2, inputs["A"].shape[0], states, seed=7)
                reverse = bool((index + states) % 2)
                case = f"scan {type_name} N={states} S={tokens} {'reverse' if reverse else 'forward'}"
                row = {"case": case} | compare(selective_scan, inputs, delta_softplus=True, reverse=reverse)
                yield judge(row, type_name)
    if not SMOKE:
        yield from special_cases()


def judge(row: Row, type_name: str) -> Row:
    """Say whether errors are within the bounds of a type."""
    row["right"] = all(row[f"triton {k}"] <= b for k, b in zip(("output", "gradient"), BOUNDS[type_name], strict=True))
    return row


def special_cases() -> Iterator[Row]:
    """Capture CUDA graphs, and compute more than 2^31 elements."""
    cases = {
        "mlstm": (mlstm, mlstm_inputs(2, 785, 4, 96, HALF), lambda n: mlstm_inputs(n, 65536, 4, 96, HALF)),
        "scan": (selective_scan, scan_inputs(2, 785, 384, 16, HALF), lambda n: scan_inputs(n, 65536, 384, 16, HALF)),
    }
    for name, (op, inputs, large) in cases.items():
        for _ in range(2):
            expected = op(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = op(**inputs)
        graph.replay()
        yield {"case": f"{name} in a CUDA graph", "right": torch.equal(answer, expected)}
        one = large(1)
        many = {key: x.expand(90, *x.shape[1:]) if x.ndim > 2 else x for key, x in one.items()}
        last = next(iter(many))
        many[last] = many[last].contiguous()  # 90 x 65536 x 384 elements, more than 2^31
        right = torch.equal(op(**many)[-1], op(**one)[0])
        yield {"case": f"{name} of {many[last].numel()} elements", "right": right}
        del many, one
        torch.cuda.empty_cache()


def kernels() -> Iterator[Row]:
    """Time the kernels at the shapes of the tiny and small models."""
    peaks = measure_peaks(DEVICE, ["bfloat16", "float32"], repeats=1 if SMOKE else 7)
    rates, bandwidth = peaks["flops_per_second"], peaks["bytes_per_second"]
    yield {"case": "measured peaks", "GB/s": bandwidth / 1e9} | {f"{n} TFLOP/s": r / 1e12 for n, r in rates.items()}
    batch, num_states = (1, 4) if SMOKE else (32, 16)
    for width in (64,) if SMOKE else (384, 768):
        for tokens in (20,) if SMOKE else (784, 6084, 16384):
            elements = batch * tokens * width
            # The least that has to move: forward three inputs and the result, backward three gradients more and that
            # of the result; gates, B and C are small. The least to compute: the recurrence itself; twice it backward.
            moved = {"forward": 2 * 4 * elements, "forward and backward": 2 * (4 + 8) * elements}
            computed = 4 * elements * (width // 4) / rates["bfloat16"]
            contestants: dict[str, Contestant] = {"ours": (mlstm, mlstm_inputs(batch, tokens, 4, width // 4, HALF))}
            contestants |= attention(contestants["ours"][1]) | mlstm_peers(contestants["ours"][1])
            yield from race(f"mlstm, D = {width // 4}, S = {tokens}", contestants, moved, computed, bandwidth)
            computed = 9 * elements * num_states / rates["float32"]
            inputs = scan_inputs(batch, tokens, width, num_states, HALF)
            scan: dict[str, Contestant] = {"ours": (selective_scan, inputs | {"delta_softplus": True})}
            yield from race(f"scan, E = {width}, S = {tokens}", scan, moved, computed, bandwidth)


def attention(inputs: dict[str, Tensor]) -> dict[str, Contestant]:
    """Prepare fused attention over the same heads."""
    query, key, value = (inputs[name].transpose(1, 2).contiguous() for name in "qkv")
    return {"flash attention": (scaled_dot_product_attention, {"query": query, "key": key, "value": value})}


def mlstm_peers(inputs: dict[str, Tensor]) -> dict[str, Contestant]:
    """Find the published kernels that are installed: for measuring only."""
    peers: dict[str, Contestant] = {}
    heads_first = {name: x.transpose(1, 2).contiguous() for name, x in inputs.items()}
    if find_spec("mlstm_kernels"):
        function = getattr(import_module("mlstm_kernels.torch.chunkwise"), "mlstm_chunkwise__xl_chunk", None)
        if function is not None:
            peers["mlstm_kernels"] = (function, heads_first)
    if find_spec("fla"):  # its gated linear attention: the mLSTM without input gate, normaliser and stabiliser
        function = getattr(import_module("fla.ops.simple_gla"), "chunk_simple_gla", None)
        if function is not None:
            gates = logsigmoid(inputs["f"])
            peers["fla simple_gla"] = (lambda **x: function(**x)[0], {n: inputs[n] for n in "qkv"} | {"g": gates})
    return peers


def race(
    case: str, contestants: dict[str, Contestant], moved: dict[str, int], computed: float, bandwidth: float
) -> Iterator[Row]:
    """Time kernels in turns and set ours against the floor; ``computed``: seconds of the forward pass's operations."""
    for mode, traffic in moved.items():
        row: Row = {"case": f"{case}, {mode}"}
        steps = {}
        for name, (function, inputs) in contestants.items():
            step = run_forward(function, inputs) if mode == "forward" else run_both(function, inputs)
            try:
                step()
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # a peer's limits are not ours
                if name == "ours":
                    raise
                row[f"{name} ms"] = f"cannot run: {str(error).splitlines()[0][:80]}"
                continue
            steps[name] = step
        times = alternate(
            steps, rounds=3 if SMOKE else 9, seconds=0 if SMOKE else 2, synchronize=lambda: synchronize(DEVICE)
        )
        row |= {f"{name} ms": 1e3 * spread(own).median for name, own in times.items() if own}
        row["floor ms"] = 1e3 * max(traffic / bandwidth, computed * (1 if mode == "forward" else 3))
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
            y = function(**inputs | leaves)
            torch.autograd.grad(y, list(leaves.values()), y.detach(), allow_unused=True)

    return step


def sanitizer() -> Iterator[Row]:
    """Launch each kernel a few times, small: what compute-sanitizer is to watch."""
    for type_name, dtype in TYPES.items():
        outcome(mlstm, mlstm_inputs(1, 20 if SMOKE else 300, 2, 48, dtype), "triton", reverse=True)
        outcome(selective_scan, scan_inputs(1, 20 if SMOKE else 300, 40, 16, dtype), "triton", reverse=True)
        synchronize(DEVICE)
        yield {"case": f"launched in {type_name}", "right": True}
