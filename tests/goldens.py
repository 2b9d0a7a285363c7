"""Read the golden cases of tests/golden and hold a result against them (bounds: tests/golden/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())

OUTPUT_BOUND = {torch.float64: 2e-7, torch.float32: 1e-5}
GRADIENT_BOUND = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True)
class ModelCase:
    """One model with weights, an input, the output and all gradients."""

    name: str
    config: dict
    state_dict: dict[str, Tensor]
    input: Tensor
    output: Tensor
    loss_weight: Tensor
    gradients: dict[str, Tensor]
    input_grad: Tensor


def names(prefix: str) -> list[str]:
    """List the cases whose name starts with ``prefix``."""
    return [name for name in INDEX if name.startswith(prefix)]


def load_model_case(name: str, dtype: torch.dtype = torch.float64) -> ModelCase:
    """Load a model case with its floating-point tensors in ``dtype``."""
    tensors = load_op_case(name, dtype)
    return ModelCase(
        name=name,
        config=INDEX[name]["config"],
        state_dict={k.removeprefix("param/"): t for k, t in tensors.items() if k.startswith("param/")},
        input=tensors["input"],
        output=tensors["output"],
        loss_weight=tensors["loss_weight"],
        gradients={k.removeprefix("grad/"): t for k, t in tensors.items() if k.startswith("grad/")},
        input_grad=tensors["input_grad"],
    )


def load_op_case(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Load every tensor of a case, floating-point ones in ``dtype``."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def relative_error(ours: Tensor, golden: Tensor, scale: Tensor | None = None) -> float:
    """Return ‖ours - golden‖ / ‖golden‖ in float64; ``scale`` replaces the denominator."""
    ours, golden = ours.detach().double(), golden.detach().double()
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, golden {tuple(golden.shape)}"
    return ((ours - golden).norm() / (golden.norm() if scale is None else scale)).item()


def assert_gradients_match(ours: dict[str, Tensor | None], golden: dict[str, Tensor], bound: float) -> None:
    """Hold each gradient against its golden; one far below the largest is measured against the largest."""
    assert ours.keys() >= golden.keys(), f"no gradient for {sorted(golden.keys() - ours.keys())}"
    largest = max(g.double().norm() for g in golden.values())
    for key, reference in golden.items():
        gradient = ours[key]
        assert gradient is not None, f"{key} got no gradient"
        scale = reference.double().norm()
        error = relative_error(gradient, reference, largest if scale < 1e-3 * largest else scale)
        assert error <= bound, f"gradient of {key}: relative error {error:.2e} > {bound:.0e}"


def assert_model_case_matches(model: torch.nn.Module, case: ModelCase, *, gradient_bound: float | None = None) -> None:
    """Run a model that carries the case's weights; hold output and all gradients against the golden."""
    dtype = case.input.dtype
    image = case.input.clone().requires_grad_()
    output = model(image)
    error = relative_error(output, case.output)
    assert error <= OUTPUT_BOUND[dtype], f"output: relative error {error:.2e}"
    (output * case.loss_weight).sum().backward()
    ours = {key: p.grad for key, p in model.named_parameters()} | {"input": image.grad}
    assert_gradients_match(ours, case.gradients | {"input": case.input_grad}, gradient_bound or GRADIENT_BOUND[dtype])
