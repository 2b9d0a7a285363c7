"""Train small models on scikit-learn's digits in float32, bfloat16 and float16, and hold their losses side by side.

    python benchmarks/mixed_precision.py --out mixed                 # 300 steps each, on a GPU where there is one
    TRITON_INTERPRET=1 python benchmarks/mixed_precision.py --out mixed --models vil2_mini_patch4_32

Half precision is autocast's, with loss scaling for float16; weights are float32. A run whose losses lie in OUT is not
trained again; OUT/losses.png shows the curves. The exit code says whether all losses are finite and none strays from
float32's.

With ``TRITON_INTERPRET=1`` the GPU's kernels compute bfloat16 and float16 in Triton's interpreter, on a CPU and at
toy sizes: tens of seconds a step.
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
import json
import math
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

from linvision import create_model
from linvision.ops import use_backend
from linvision.ops.backends.triton import mlstm, selective_scan
from linvision.ops.backends.triton.device import interpreted

DEVICE = "cuda" if torch.cuda.is_available() and not interpreted() else "cpu"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELS = ("vil2_mini_patch4_32", "vim_mini_patch4_32")
SIDE, BATCH_SIZE, OVERRIDES = 32, 64, dict[str, Any]()
if interpreted():
    SIDE, BATCH_SIZE, OVERRIDES = 20, 6, {"img_size": 20, "dim": 48, "depth": 1}
WINDOW = 25  # steps whose mean loss is compared
BOUND = 0.25  # between these means in float32 and in half precision: batches differ by as much
Losses = list[float]


def train(
    name: str, precision: str, backend: str, *, batch_size: int = BATCH_SIZE, **overrides: Any
) -> Iterator[float]:
    """Train with AdamW for as long as losses are asked for."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    side = overrides.get("img_size", SIDE)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = interpolate(images, size=side, mode="bilinear").expand(-1, 3, -1, -1).to(DEVICE)
    targets = torch.tensor(labels).to(DEVICE)
    model = create_model(name, num_classes=10, **overrides).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "float16")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first = 0
    while True:
        batch = order[torch.arange(first, first + batch_size, device=DEVICE) % len(order)]
        with torch.autocast(DEVICE, TYPES[precision], enabled=precision != "float32"), use_backend(backend):
            loss = cross_entropy(model(images[batch]).float(), targets[batch])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        first += batch_size
        yield loss.item()


def losses_of(file: Path, name: str, precision: str, backend: str, steps: int) -> Losses:
    """Read the losses of a run that is there, or train; what has been trained so far is saved now and then."""
    losses: Losses = json.loads(file.read_text()) if file.is_file() else []
    if len(losses) >= steps:
        return losses
    losses = []
    for loss in islice(train(name, precision, backend, **OVERRIDES), steps):
        losses.append(loss)
        if len(losses) % WINDOW == 0 or len(losses) == steps:
            file.write_text(json.dumps(losses))
            print(f"{name} {precision} step {len(losses)}: loss {mean(losses[-WINDOW:]):.4f}", flush=True)
    return losses


def distance(losses: Losses, reference: Losses) -> float:
    """Return the largest difference between mean losses of the same ``WINDOW`` steps."""
    firsts = range(0, len(losses), WINDOW)
    return max(abs(mean(losses[n : n + WINDOW]) - mean(reference[n : n + WINDOW])) for n in firsts)


def follows(losses: Losses, reference: Losses) -> bool:
    """Tell whether losses are finite and nowhere far from those of float32."""
    return all(map(math.isfinite, losses)) and distance(losses, reference) < BOUND


def draw(path: Path, curves: dict[str, dict[str, Losses]], title: str) -> None:
    """Draw running means of the losses, a panel a model."""
    figure = Figure(figsize=(4.6 * len(curves), 3.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, (name, by_precision) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        for (precision, losses), style in zip(by_precision.items(), ("-", "--", ":"), strict=False):
            means = [mean(losses[max(0, n - WINDOW) : n]) for n in range(1, len(losses) + 1)]
            axes.plot(range(1, len(losses) + 1), means, style, label=precision)
        axes.set(title=name, xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Train what has not been trained yet, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--precisions", default=",".join(TYPES), help="float32 first, separated by commas")
    parser.add_argument("--backend", default="triton" if interpreted() else "auto", help="of half precision's ops")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("mixed_precision"), help="folder of the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    right = True
    curves: dict[str, dict[str, Losses]] = {}
    for name in options.models.split(","):
        for precision in options.precisions.split(","):
            # The interpreter cannot be hurried: float32, which it is held against, is plain PyTorch's there.
            backend = "plain" if interpreted() and precision == "float32" else options.backend
            losses = losses_of(options.out / f"{name}-{precision}.json", name, precision, backend, options.steps)
            curves.setdefault(name, {})[precision] = losses
            first, reference = next(iter(curves[name].items()))
            right &= follows(losses, reference)
            print(
                f"{name} {precision}: {len(losses)} steps, {sum(map(math.isfinite, losses))} finite losses, the last "
                f"{WINDOW} {mean(losses[-WINDOW:]):.4f}, furthest from {first} {distance(losses, reference):.4f}",
                flush=True,
            )
    draw(options.out / "losses.png", curves, f"{options.backend} kernels{', interpreted' * interpreted()}, {DEVICE}")
    return 0 if right else 1


if __name__ == "__main__":
    if interpreted():  # chunks of a few tokens so that states are handed on; a sequence's channels in one program
        mlstm.CHUNK, selective_scan.CHANNELS = 16, 128
    sys.exit(main())
