"""What ``gpu_verification.py`` does with single kernels: whether they are right, and how fast they are."""

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

from linvision import create_model
from linvision.bench.machine import measure_peaks, synchronize
from linvision.bench.measure import alternate, spread
from linvision.ops import MLSTMState, mlstm, selective_scan, use_backend
from linvision.ops.backends.triton.device import interpreted

SMOKE = interpreted()
DEVICE = "cpu" if SMOKE else "cuda"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative errors (of norms) of outputs and gradients that are allowed.
BOUNDS = {"float32": (1e-5, 2e-4), "float16": (2e-3, 1e-2), "bfloat16": (1.2e-2, 5e-2)}
SAME = 1e-2  # between a model and its replay, whose products in bfloat16 may be computed in another order
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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compare by norms."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def outcome(
    op: Callable, inputs: dict[str, Tensor], backend: str, *, states: bool, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what an op answers, states too if asked for, and the gradients of a loss that takes in all of it."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    arguments = dict(leaves)
    if "C0" in arguments:
        arguments["initial_state"] = MLSTMState(arguments.pop("C0"), arguments.pop("n0"), options.pop("m0"))
    with use_backend(backend):
        answer = op(**arguments, return_state=states, **options)
        y, state = answer if states else (answer, [])
        weight = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).view_as(y)
        final = [state] if isinstance(state, Tensor) else list(state[:2])
        loss = (y.double() * weight).sum() + sum(x.double().square().mean() for x in final)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    return [y, *final], list(gradients)


def compare(op: Callable, inputs: dict[str, Tensor], type_name: str, **options: Any) -> Iterator[Row]:
    """Hold Triton's kernels, and plain PyTorch in the same type, against float64."""
    exact_options = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    exact = outcome(op, {name: x.double() for name, x in inputs.items()}, "plain", **exact_options)
    row: Row = {}
    for backend in ("triton", "plain"):
        answer = outcome(op, inputs, backend, **options)
        for kind, ours, expected in zip(("output", "gradient"), answer, exact, strict=True):
            row[f"{backend} {kind}"] = max(relative_error(a, b) for a, b in zip(ours, expected, strict=True))
    row["right"] = all(row[f"triton {k}"] <= b for k, b in zip(("output", "gradient"), BOUNDS[type_name], strict=True))
    yield row


def correctness() -> Iterator[Case]:
    """Hold the kernels against float64: what models use first, then other widths, lengths and states handed over."""
    long = 5 if SMOKE else 785
    for type_name in reversed(TYPES):
        for place, dim in enumerate([4] if SMOKE else [96, 192, 48, 384, 4]):
            yield mlstm_case(type_name, dim, long, reverse=bool(place % 2), states=False)
        for place, num_states in enumerate([4] if SMOKE else [16, 1, 17, 64]):
            yield scan_case(type_name, num_states, long, reverse=bool(place % 2), states=False)
    for type_name in TYPES:
        for place, tokens in enumerate([3] if SMOKE else [257, 63, 1]):
            yield mlstm_case(type_name, 4 if SMOKE else 96, tokens, reverse=not place % 2, states=True)
            yield scan_case(type_name, 4 if SMOKE else 16, tokens, reverse=not place % 2, states=True)
    for name, (op, make, _) in ops().items():
        if not SMOKE:  # no CPU's memory is for this
            yield f"{name} of more than 2^31 elements", lambda op=op, make=make: huge(op, make)


def mlstm_case(type_name: str, dim: int, tokens: int, *, reverse: bool, states: bool) -> Case:
    """Compare one mLSTM."""

    def measure() -> Iterator[Row]:
        inputs, options = mlstm_inputs(2, tokens, 2, dim, TYPES[type_name]), {}
        if states:
            inputs |= {"C0": noise(2, 2, dim, dim, seed=7), "n0": noise(2, 2, dim, seed=8)}
            options["m0"] = noise(2, 2, seed=9)
        yield from compare(mlstm, inputs, type_name, states=states, reverse=reverse, **options)

    return f"mlstm {type_name} D={dim} S={tokens}{' reverse' * reverse}{' states' * states}", measure


def scan_case(type_name: str, num_states: int, tokens: int, *, reverse: bool, states: bool) -> Case:
    """Compare one selective scan."""

    def measure() -> Iterator[Row]:
        inputs = scan_inputs(2, tokens, 6 if SMOKE else 200, num_states, TYPES[type_name])
        if states:
            inputs["initial_state"] = noise(2, inputs["A"].shape[0], num_states, seed=8)
        options = {"states": states, "delta_softplus": True, "reverse": reverse}
        yield from compare(selective_scan, inputs, type_name, **options)

    return f"scan {type_name} N={num_states} S={tokens}{' reverse' * reverse}{' states' * states}", measure


def ops() -> dict[str, tuple[Callable, Callable[[int, int], dict[str, Tensor]], tuple[int, int]]]:
    """Each op with what makes its inputs from a batch size and a length, and a small batch and length."""
    width, small = (8, (1, 5)) if SMOKE else (96, (2, 785))
    return {
        "mlstm": (mlstm, lambda batch, tokens: mlstm_inputs(batch, tokens, 4, width, HALF), small),
        "scan": (
            partial(selective_scan, delta_softplus=True),
            lambda batch, tokens: scan_inputs(batch, tokens, 4 * width, 16, HALF),
            small,
        ),
    }


def huge(op: Callable, make: Callable[[int, int], dict[str, Tensor]]) -> Iterator[Row]:
    """Compute 90 x 65536 x 384 elements: the last sequence as if it were the only one."""
    one = make(1, 65536)
    many = {key: x.expand(90, *x.shape[1:]) if x.ndim > 2 else x for key, x in one.items()}
    first = next(iter(many))
    many[first] = many[first].contiguous()
    with use_backend("triton"):
        yield {"elements": many[first].numel(), "right": torch.equal(op(**many)[-1], op(**one)[0])}


def graphs() -> Iterator[Case]:
    """Capture kernels and whole models, and replay them."""
    for name, (op, make, small) in ops().items():
        inputs = make(*small)
        yield f"{name}, forward", lambda op=op, x=inputs: captured(lambda: op(**x))
        yield f"{name}, forward and backward", lambda op=op, x=inputs: captured(lambda: gradients_of(op, x))
    for name in ("vil2_mini_patch4_32", "vim_mini_patch4_32"):
        yield f"{name}, inference", lambda name=name: captured(model_step(name))


def gradients_of(op: Callable, inputs: dict[str, Tensor]) -> Tensor:
    """Return all gradients of an op in one tensor."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = op(**leaves)
    return torch.cat([x.flatten().float() for x in torch.autograd.grad(y, list(leaves.values()), y.detach())])


def model_step(name: str) -> Callable[[], Tensor]:
    """Prepare inference."""
    model = create_model(name, **({"img_size": 8, "depth": 2} if SMOKE else {})).to(DEVICE, HALF).eval()
    side = 8 if SMOKE else 32
    images = noise(1 if SMOKE else 32, 3, side, side, dtype=HALF)
    return torch.no_grad()(lambda: model(images))


def captured(step: Callable[[], Tensor]) -> Iterator[Row]:
    """Capture a step and hold what its replay computes against what it computes by itself."""
    with use_backend("triton"):
        expected = step()
        if SMOKE:
            yield {"right": bool(expected.isfinite().all())}
            return
        graph, answer = capture(step)
        answer.zero_()
        graph.replay()
        torch.cuda.synchronize()
        error = relative_error(answer, expected)
        yield {"error": error, "right": error < SAME}


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

    def measure_machine() -> Iterator[Row]:
        peaks.update(measure_peaks(DEVICE, ["bfloat16", "float32"], repeats=1 if SMOKE else 7))
        peaks["exponentials_per_second"] = measure_exponentials(rounds=2 if SMOKE else 4096)
        rates = {f"{name} TFLOP/s": rate / 1e12 for name, rate in peaks["flops_per_second"].items()}
        rates["exponentials, T/s"] = peaks["exponentials_per_second"] / 1e12
        yield {"GB/s": peaks["bytes_per_second"] / 1e9} | rates

    yield "measured peaks", measure_machine
    for width in [32] if SMOKE else [384, 768]:
        for tokens in [5] if SMOKE else [784, 6084, 16384]:
            yield f"mlstm, D = {width // 4}, S = {tokens}", lambda w=width, t=tokens: race_mlstm(w, t, peaks)
            yield f"scan, E = {width}, S = {tokens}", lambda w=width, t=tokens: race_scan(w, t, peaks)


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
            y = function(**inputs | leaves)
            torch.autograd.grad(y, list(leaves.values()), y.detach(), allow_unused=True)

    return step


def sanitizer() -> Iterator[Case]:
    """Launch each kernel a few times, small: what compute-sanitizer is to watch."""
    for type_name in TYPES:
        yield mlstm_case(type_name, 8 if SMOKE else 48, 5 if SMOKE else 300, reverse=True, states=True)
        yield scan_case(type_name, 4 if SMOKE else 16, 5 if SMOKE else 300, reverse=True, states=True)
