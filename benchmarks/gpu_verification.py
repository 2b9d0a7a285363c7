"""The whole verification of the GPU kernels in one go, in under 10 minutes on one GPU: right, how fast, and in models.

    python benchmarks/gpu_verification.py --out gpu
    python benchmarks/gpu_verification.py --out gpu --only kernels,models     # these again, the others as they were

Sections, each written to OUT/gpu.json and OUT/gpu.md as soon as it has a row:

- correctness: every kernel, forward and backward, against float64 on the GPU, beside plain PyTorch in the same
  type; all head widths and numbers of states, odd lengths, both directions, states; CUDA graphs; over 2^31 elements.
- kernels: time against the floor, the larger of bytes / bandwidth and operations / rate, both rates measured on the
  card; and against fused attention and those peers that can be imported (mlstm_kernels, flash-linear-attention).
- models: ViL and Vim against timm's DeiT of their width with flash attention and with attention matrices, 224 ... 2048.
- training: 300 steps on scikit-learn's digits in bfloat16 and in float16 with scaling beside those in float32.
- compiled, on request: the tiny models and their DeiTs through torch.compile. sanitizer, on request: small launches.

``--smoke`` runs all of it at toy sizes on a CPU, kernels in Triton's interpreter: a check of this script, no result.
Under NVIDIA's compute-sanitizer: ``compute-sanitizer python benchmarks/gpu_verification.py --only sanitizer``.
"""

# ruff: noqa: T201, I001  (a script speaks by printing; gpu_kernels chooses Triton's interpreter before Triton is imported)

from gpu_kernels import DEVICE, SMOKE, TYPES, Row, correctness, kernels, sanitizer

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate

from linvision import create_model
from linvision.bench.command import measure_setting
from linvision.bench.contenders import Setting, count_flops
from linvision.bench.machine import describe_machine, synchronize
from linvision.bench.measure import alternate
from linvision.bench.models import model_lineup
from linvision.bench.probe import Probe, gpu_probe
from linvision.ops import use_backend

COMMAND = "python benchmarks/gpu_verification.py"
SIDE = 8 if SMOKE else 32  # of the digits, in pixels
started = perf_counter()


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"[{perf_counter() - started:5.0f} s] {text}", flush=True)


def models() -> Iterator[Row]:
    """Time whole models."""
    names = ["vil2-tiny"] if SMOKE else ["vil2-tiny", "vil2-small", "vim_tiny_patch16_224", "vim_small_patch16_224"]
    for mode in ("inference",) if SMOKE else ("inference", "training"):
        for size in (32,) if SMOKE else (224, 512, 768, 1248, 2048):
            for name in names:
                # Attention matrices where the papers have them; in training at 1248 they are beyond any memory.
                explicit = size == 224 or (size == 1248 and mode == "inference")
                yield from models_of_a_size(name, size, mode, ["fused", "explicit"] if explicit else ["fused"])


def compiled() -> Iterator[Row]:
    """Time whole models once more, they and their DeiTs compiled: it takes minutes by itself."""
    for name in ["vil2-tiny"] if SMOKE else ["vil2-tiny", "vim_tiny_patch16_224"]:
        for mode in ("inference",) if SMOKE else ("inference", "training"):
            for size in (32,) if SMOKE else (224, 1248):
                yield from models_of_a_size(name, size, mode, ["fused"], compile=True)


def models_of_a_size(name: str, size: int, mode: str, peers: list[str], *, compile: bool = False) -> Iterator[Row]:
    """Time one model and its DeiTs, and take their memory."""
    lineup = model_lineup([name], peers)
    batch_size = 1 if SMOKE else 32
    setting = Setting(
        size=size,
        batch_size=batch_size,
        dtype="bfloat16",
        mode=mode,
        device=DEVICE,
        autocast=mode == "training",
        compile=compile,
    )
    rows = measure_setting(
        lineup,
        setting,
        probe=(lambda contender, setting: Probe("ok")) if SMOKE else gpu_probe,
        take_times=lambda steps: alternate(
            steps, rounds=3 if SMOKE else 7, seconds=0 if SMOKE else 3, synchronize=lambda: synchronize(DEVICE)
        ),
        flops={contender.label: count_flops(contender, setting) for contender in lineup.contenders},
    )
    for row in rows:
        result: Row = {"case": f"{mode}, {size} px, {row.contender}", "status": row.status}
        if row.seconds is not None:
            result["ms/image"] = 1e3 * row.seconds.median / batch_size
        if row.peak_memory is not None:
            result["GB"] = row.peak_memory / 1e9
        for kind, ratio in row.ratios.items():
            if ratio.time is not None:
                result[f"time / {kind}"] = ratio.time.median
            if ratio.memory is not None:
                result[f"memory / {kind}"] = ratio.memory
        yield result
    if not SMOKE:
        torch.cuda.empty_cache()


def training() -> Iterator[Row]:
    """Learn in three precisions and compare the losses."""
    common = {"img_size": SIDE, "num_classes": 10}
    choices = {
        "vil2_mini_patch4_32": common | ({"depth": 1} if SMOKE else {}),
        "vim_tiny_patch16_224": common | {"patch_size": 4, "depth": 1 if SMOKE else 4},
    }
    for name, overrides in choices.items():
        curves = {}
        for precision in TYPES:
            losses = curves[precision] = learn_digits(name, overrides, precision)
            row: Row = {"case": f"{name}, {precision}", "first loss": losses[0], "last losses": mean(losses[-50:])}
            reference = curves["float32"]
            away = [abs(mean(losses[n : n + 25]) - mean(reference[n : n + 25])) for n in range(0, len(losses), 25)]
            row["furthest from float32, means of 25"] = max(away)
            row["right"] = all(map(math.isfinite, losses)) and max(away) < 0.25
            yield row | {"losses": [round(loss, 4) for loss in losses[::10]]}


def learn_digits(name: str, overrides: dict[str, Any], precision: str) -> list[float]:
    """Train 300 steps of AdamW; float16 with loss scaling, weights always float32."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = interpolate(images, size=SIDE, mode="bilinear").expand(-1, 3, -1, -1).to(DEVICE)
    targets = torch.tensor(labels).to(DEVICE)
    model = create_model(name, **overrides).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "float16")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    steps, batch_size, losses = (1, 1, []) if SMOKE else (300, 64, [])
    for step in range(steps):
        batch = order[torch.arange(step * batch_size, (step + 1) * batch_size, device=DEVICE) % len(order)]
        with torch.autocast(DEVICE, TYPES[precision], enabled=precision != "float32"), use_backend("triton"):
            loss = cross_entropy(model(images[batch]).float(), targets[batch])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "correctness": correctness,
    "kernels": kernels,
    "models": models,
    "training": training,
    "compiled": compiled,
    "sanitizer": sanitizer,
}


def as_markdown(results: dict[str, Any]) -> str:
    """Write a table a section, with the columns that its rows have."""
    machine = results["machine"]
    parts = [f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}, triton {machine['triton']}; `{COMMAND}`"]
    if results.get("smoke"):
        parts.insert(0, "A smoke run on a CPU: no results.")
    for section, rows in results["sections"].items():
        columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "losses"]
        lines = [columns, ["---"] * len(columns), *([cell(row.get(name, "")) for name in columns] for row in rows)]
        parts += [f"## {section}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def cell(value: Any) -> str:
    """Write a value for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run the sections asked for; the exit code says whether all is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", default="correctness,kernels,models,training", help="sections, by commas")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU: check the script")
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only does not know {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    if not SMOKE and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke checks the script on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu.json"
    results = json.loads(file.read_text()) if file.exists() else {"sections": {}}
    results |= {"machine": describe_machine(DEVICE) | {"triton": version("triton"), "backend": "auto"}, "smoke": SMOKE}
    for section in sections:
        rows = results["sections"][section] = []
        for row in SECTIONS[section]():
            rows.append(row)
            say(f"{section}: " + ", ".join(f"{name} {cell(x)}" for name, x in row.items() if name != "losses"))
            file.write_text(json.dumps(results, indent=1))
            (options.out / "gpu.md").write_text(as_markdown(results))
    wrong = [row["case"] for name in sections for row in results["sections"][name] if not row.get("right", True)]
    say(f"done; {len(wrong)} wrong" + "".join(f"\n  {case}" for case in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
