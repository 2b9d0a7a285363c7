"""What a training step keeps between its forward and its backward pass, with and without activation checkpointing.

Counted are storages that operators allocate in the forward pass and that are alive at its end; weights do not count.
Peaks are of tensors alive at once in forward and backward, on a GPU the allocator's. Beside each model stands timm's
DeiT of the same width with fused attention. Counts are exact and need no quiet machine; times (--rounds) do.

    python benchmarks/activation_memory.py --models vil2-tiny,vim_tiny_patch16_224,l2vit_tiny --size 224 --batch-size 8
    python benchmarks/activation_memory.py --models vil2-tiny --dtype bfloat16 --rounds 5
    python benchmarks/activation_memory.py --models vim_tiny_patch16_224 --details
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import get_args

from linvision.tasks.options import Checkpointing

from linvision.bench.activations import Activations, count_activations
from linvision.bench.contenders import Lineup, Setting
from linvision.bench.machine import describe_machine, synchronize
from linvision.bench.measure import alternate, ratios, spread
from linvision.bench.models import ModelContender, model_lineup
from linvision.bench.probe import gpu_probe
from linvision.bench.tables import Grid

SHOWN = 0.01  # share of the bytes from which a kind of storage has a row of its own


def main() -> None:
    """Count, and time if asked to, and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vil2-tiny,vim_tiny_patch16_224,l2vit_tiny", help="separated by commas")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16 is by autocast")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=0, help="time whole training steps in so many alternating rounds")
    parser.add_argument("--details", action="store_true", help="list what is kept, by operator, shape and type")
    options = parser.parse_args()

    setting = Setting(
        size=options.size,
        batch_size=options.batch_size,
        dtype=options.dtype,
        mode="training",
        device=options.device,
        autocast=options.dtype != "float32",
    )
    lineup = model_lineup(options.models.split(","), ["fused"])
    counted: dict[tuple[str, str], Activations] = {}
    times = {}
    for contender in lineup.contenders:
        settings = {name: replace(setting, checkpointing=name) for name in get_args(Checkpointing)}
        counted |= {(contender.label, name): count(contender, one) for name, one in settings.items()}
        if options.rounds:
            steps: dict[str, Callable[[], None]] = {name: contender.prepare(one) for name, one in settings.items()}
            taken = alternate(
                steps, rounds=options.rounds, seconds=60, synchronize=partial(synchronize, options.device)
            )
            times |= {(contender.label, name): (taken[name], taken["none"]) for name in steps}
    print(summary(counted, times, setting, lineup).markdown())
    if options.details:
        for (label, name), activations in counted.items():
            print(details(f"{label}, checkpointing {name}", activations).markdown())
    machine = describe_machine(options.device)
    print(f"{machine['gpu'] or machine['cpu']}, {machine['threads']} threads, {machine['kernels']}, torch", end=" ")
    print(f"{machine['torch']}; load before {machine['load']}.")


def count(contender: ModelContender, setting: Setting) -> Activations:
    """Count what a model keeps; on a GPU with the allocator's peak of a whole step."""
    model, image = contender.build(setting)
    activations = count_activations(model, image, autocast=setting.torch_dtype if setting.autocast else None)
    if setting.device == "cuda":
        activations = replace(activations, peak=gpu_probe(contender, setting).peak or 0)
    return activations


def summary(counted: dict[tuple[str, str], Activations], times: dict, setting: Setting, lineup: Lineup) -> Grid:
    """Lay out the totals: a row a model and kind of checkpointing."""
    rows = []
    for (label, name), activations in counted.items():
        deit = counted[lineup.references[label].get("fused", label), "none"]
        cells = [label, name, f"{activations.total / 1e6:.1f}", f"{activations.total / deit.total:.2f}"]
        cells += [f"{activations.total / counted[label, 'none'].total:.2f}", f"{activations.peak / 1e6:.1f}"]
        cells.append(block_sizes(activations))
        if times:
            own, none = times[label, name]
            ratio = ratios(own, none)
            cells += [f"{1e3 * spread(own).median:.0f}", f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"]
        rows.append(tuple(cells))
    header = ("model", "checkpointing", "kept, MB", "of DeiT's", "of its own", "peak, MB", "kept a block, MB")
    header += ("ms a step", "time of its own") if times else ()
    title = f"training step, {setting.size} px, batch {setting.batch_size}, {setting.dtype}"
    return Grid(title, header, tuple(rows), left=2)


def block_sizes(activations: Activations) -> str:
    """List the megabytes of the blocks, equal ones in a row once."""
    sizes = [f"{size / 1e6:.1f}" for name, size in activations.by_block().items() if name]
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    return ", ".join(size if number == 1 else f"{number} x {size}" for size, number in runs)


def details(title: str, activations: Activations) -> Grid:
    """Lay out what is kept: a row an operator, shape and type, the most bytes first."""
    rows = [
        (kind.op, " x ".join(map(str, kind.shape)), str(kind.dtype)[6:], number, kind.bytes * number)
        for kind, number in activations.by_kind()
        if kind.bytes * number >= SHOWN * activations.total
    ]
    rest = activations.total - sum(row[-1] for row in rows)
    cells = [(*row[:3], str(row[3]), f"{row[4] / 1e6:.1f}", f"{row[4] / activations.total:.0%}") for row in rows]
    cells.append(("all others", "", "", "", f"{rest / 1e6:.1f}", f"{rest / activations.total:.0%}"))
    return Grid(title, ("operator", "result", "type", "number", "MB", "share"), tuple(cells), left=3)


if __name__ == "__main__":
    main()
