"""What ``gpu_verification.py`` does with whole models: how fast they are, compiled or not, and what they learn."""

from collections.abc import Callable, Iterator
from itertools import islice
from statistics import mean
from typing import Any

import torch
from gpu_kernels import DEVICE, SMOKE, Case, Row, capture
from mixed_precision import distance, follows, train

from linvision.bench.command import measure_setting
from linvision.bench.contenders import Setting, count_flops
from linvision.bench.machine import synchronize
from linvision.bench.measure import alternate
from linvision.bench.models import model_lineup
from linvision.bench.probe import Probe, gpu_probe

NAMES = ["vil2_tiny_patch16_224", "vim_tiny_patch16_224", "vil2_small_patch16_224", "vim_small_patch16_224"]
SIZES = [224, 1248, 768, 2048, 512]  # pixels, what matters most first
GRAPHED = [32, 224]  # where models, launched kernel by kernel, wait for the host
STEPS = 1 if SMOKE else 300
PRECISIONS = ["float32", "float16"] if SMOKE else ["float32", "bfloat16", "float16"]


def models() -> Iterator[Case]:
    """Time whole models and take their memory."""
    for size in [32] if SMOKE else SIZES:
        for mode in ("inference", "training"):
            for name in ["vil2_mini_patch4_32"] if SMOKE else NAMES:
                # Attention matrices where the papers have them; in training at 1248 they are beyond any memory.
                explicit = size in (32, 224) or (size == 1248 and mode == "inference")
                peers = ["fused", "explicit"] if explicit else ["fused"]
                yield f"{name}, {size} px, {mode}", lambda n=name, s=size, m=mode, p=peers: compare(n, s, m, p)
                if size in GRAPHED:
                    case = f"{name}, {size} px, {mode}, as a CUDA graph"
                    yield case, lambda n=name, s=size, m=mode: compare(n, s, m, ["fused"], graphed=True)


def compiled() -> Iterator[Case]:
    """Do so once more for tiny models, they and their DeiT compiled."""
    for size in [32] if SMOKE else [224, 1248]:
        for mode in ["inference", "training"]:
            for name in ["vil2_mini_patch4_32"] if SMOKE else NAMES[:2]:
                case = f"{name}, {size} px, {mode}, compiled"
                yield case, lambda n=name, s=size, m=mode: compare(n, s, m, ["fused"], compile=True)


def compare(
    name: str, size: int, mode: str, peers: list[str], *, compile: bool = False, graphed: bool = False
) -> Iterator[Row]:
    """Time a model and its DeiTs in turns, in bfloat16: weights in inference, by autocast in training."""
    torch.compiler.reset()
    lineup = model_lineup([name], peers)
    setting = Setting(
        size=size,
        batch_size=1 if SMOKE else 32,
        dtype="bfloat16",
        mode=mode,
        device=DEVICE,
        autocast=mode == "training",
        compile=compile,
        backend="triton" if SMOKE else "auto",
    )
    measured = measure_setting(
        lineup,
        setting,
        probe=(lambda contender, setting: Probe("ok")) if SMOKE else gpu_probe,
        take_times=lambda steps: alternate(
            replays(steps) if graphed else steps,
            rounds=3 if SMOKE else 7,
            seconds=0 if SMOKE else 2,
            synchronize=lambda: synchronize(DEVICE),
        ),
        flops={contender.label: count_flops(contender, setting) for contender in lineup.contenders},
    )
    for one in measured:
        row: Row = {"contender": one.contender, "status": one.status}
        if one.seconds is not None:
            row["ms/image"] = 1e3 * one.seconds.median / setting.batch_size
        if one.peak_memory is not None:
            row["GB"] = one.peak_memory / 1e9
        for kind, ratio in one.ratios.items():
            row |= {f"time / {kind}": ratio.time.median} if ratio.time is not None else {}
            row |= {f"memory / {kind}": ratio.memory} if ratio.memory is not None else {}
        yield row


def replays(steps: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """Capture steps into CUDA graphs, which take no time of the host; a CPU has none."""
    return steps if SMOKE else {label: capture(step)[0].replay for label, step in steps.items()}


def training() -> Iterator[Case]:
    """Learn in several precisions and compare the losses."""
    for name in ("vil2_mini_patch4_32", "vim_mini_patch4_32"):
        yield name, lambda name=name: learn_in_precisions(name)


def learn_in_precisions(name: str) -> Iterator[Row]:
    """Hold the losses of half precision against those of float32."""
    overrides: dict[str, Any] = {"img_size": 8, "depth": 1, "batch_size": 1} if SMOKE else {}
    reference: list[float] = []
    for precision in PRECISIONS:
        losses = list(islice(train(name, precision, "triton", **overrides), STEPS))
        reference = reference or losses
        yield {
            "precision": precision,
            "first loss": losses[0],
            "last losses": mean(losses[-50:]),
            "furthest from float32": distance(losses, reference),
            "right": follows(losses, reference),
            "losses": [round(loss, 4) for loss in losses[::10]],
        }
