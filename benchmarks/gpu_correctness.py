"""What ``gpu_verification.py`` does to tell whether single kernels are right."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_kernels import (
    DEVICE,
    HALF,
    SMOKE,
    TYPES,
    Case,
    Row,
    capture,
    convolution_inputs,
    gated_norm_inputs,
    mlstm_inputs,
    noise,
    outputs,
    project,
    projection_inputs,
    scan_inputs,
)
from torch import Tensor

from linvision import create_model
from linvision.ops import MLSTMState, depthwise_conv2d, gated_head_norm, mlstm, selective_scan, use_backend

# Relative errors (of norms) of outputs and gradients that are allowed.
BOUNDS = {"float32": (1e-5, 2e-4), "float16": (2e-3, 1e-2), "bfloat16": (1.2e-2, 5e-2)}
SAME = 1e-2  # between a model and its replay, whose products in bfloat16 may be computed in another order


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
        yield from stateless_cases(type_name)
    for type_name in TYPES:
        for place, tokens in enumerate([3] if SMOKE else [257, 63, 1]):
            yield mlstm_case(type_name, 4 if SMOKE else 96, tokens, reverse=not place % 2, states=True)
            yield scan_case(type_name, 4 if SMOKE else 16, tokens, reverse=not place % 2, states=True)
    for name, (op, make) in ops().items():
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


def stateless_case(name: str, function: Callable, make: Callable[[torch.dtype], dict[str, Tensor]], of: str) -> Case:
    """Compare one op that knows no states, in a type."""

    def op(*, return_state: bool, **inputs: Tensor) -> Any:
        y = function(**inputs)
        return (y, []) if return_state else y

    return f"{name} {of}", lambda: compare(op, make(TYPES[of]), of, states=False)


def stateless_cases(type_name: str) -> Iterator[Case]:
    """Compare what stands around the scans: convolution, mlstm_inputs, gated norm."""

    def together(**inputs: Tensor) -> Tensor:
        return torch.cat([y.double() for y in project(**inputs)], 2)

    grid, tokens = ((2, 3, 5), (3, 8)) if SMOKE else ((29, 27, 200), (785, 200))
    for name, function, make, size in (
        ("convolution", partial(depthwise_conv2d, activation="silu", reverse=True), convolution_inputs, grid),
        ("mlstm_inputs", together, projection_inputs, tokens),
        ("gated norm", partial(gated_head_norm, eps=1e-5), gated_norm_inputs, tokens),
    ):
        yield stateless_case(name, function, lambda dtype, make=make, size=size: make(2, *size, dtype), type_name)


def ops() -> dict[str, tuple[Callable, Callable[[int, int], dict[str, Tensor]]]]:
    """Each op with what makes its inputs from a batch size and a length."""
    dim = 8 if SMOKE else 96
    width = 4 * dim
    return {
        "mlstm": (mlstm, lambda batch, tokens: mlstm_inputs(batch, tokens, 4, dim, HALF)),
        "scan": (
            partial(selective_scan, delta_softplus=True),
            lambda batch, tokens: scan_inputs(batch, tokens, width, 16, HALF),
        ),
        "convolution": (
            partial(depthwise_conv2d, activation="silu"),
            lambda batch, tokens: convolution_inputs(batch, tokens, 1, width, HALF),
        ),
        "mlstm_inputs": (project, lambda batch, tokens: projection_inputs(batch, tokens, width, HALF)),
        "gated norm": (
            partial(gated_head_norm, eps=1e-5),
            lambda batch, tokens: gated_norm_inputs(batch, tokens, width, HALF),
        ),
    }


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Put all numbers into one tensor."""
    return torch.cat([x.flatten().float() for x in tensors])


def huge(op: Callable, make: Callable[[int, int], dict[str, Tensor]]) -> Iterator[Row]:
    """Compute 90 x 65536 x 384 elements: the last sequence as if it were the only one."""
    one = make(1, 65536)
    many = {key: x.expand(90, *x.shape[1:]) if x.ndim > 2 and len(x) == 1 else x for key, x in one.items()}
    first = next(iter(many))
    many[first] = many[first].contiguous()
    with use_backend("triton"):
        pairs = zip(outputs(op(**many)), outputs(op(**one)), strict=True)
        yield {"elements": many[first].numel(), "right": all(torch.equal(a[-1], b[0]) for a, b in pairs)}


def graphs() -> Iterator[Case]:
    """Capture kernels and whole models, and replay them."""
    for name, (op, make) in ops().items():
        inputs = make(1, 5) if SMOKE else make(2, 785)
        yield f"{name}, forward", lambda op=op, x=inputs: captured(lambda: joined(outputs(op(**x))))
        yield f"{name}, forward and backward", lambda op=op, x=inputs: captured(lambda: gradients_of(op, x))
    for name in ("vil2_mini_patch4_32", "vim_mini_patch4_32"):
        yield f"{name}, inference", lambda name=name: captured(model_step(name))


def gradients_of(op: Callable, inputs: dict[str, Tensor]) -> Tensor:
    """Return all gradients of an op in one tensor."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = outputs(op(**leaves))
    return joined(torch.autograd.grad(y, list(leaves.values()), [x.detach() for x in y]))


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


def sanitizer() -> Iterator[Case]:
    """Launch each kernel a few times, small: what compute-sanitizer is to watch."""
    for type_name in TYPES:
        yield mlstm_case(type_name, 8 if SMOKE else 48, 5 if SMOKE else 300, reverse=True, states=True)
        yield scan_case(type_name, 4 if SMOKE else 16, 5 if SMOKE else 300, reverse=True, states=True)
        yield from stateless_cases(type_name)
