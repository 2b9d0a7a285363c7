"""Where a model's time goes on a CPU, operator by operator, beside the floor that counted operations set.

The floor of an operator is its counted FLOPs (a multiply-add is two) over the rate of a large matrix product measured
here; operators without counted FLOPs have none, as they should cost nothing beside the products.

    python benchmarks/profile_model.py --model vil2-tiny --size 224 --batch 8
    python benchmarks/profile_model.py --model vim_tiny_patch16_224 --size 1248 --batch 1 --backend plain
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
from collections import Counter

import torch
from linvision.tasks.loading import size_overrides
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import linvision
from linvision.bench.machine import describe_machine, measure_peaks
from linvision.ops import use_backend

SHOWN = 0.005  # share of the time from which an operator has a row of its own


def main() -> None:
    """Profile one model and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vil2-tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--backend", default="auto", choices=("auto", "cpp", "plain"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    peak = measure_peaks("cpu", [options.dtype])["flops_per_second"][options.dtype]
    overrides = size_overrides(options.model, options.size)
    model = linvision.create_model(options.model, **overrides).eval().to(dtype)
    image = torch.randn(options.batch, 3, options.size, options.size).to(dtype)
    with torch.inference_mode(), use_backend(options.backend):
        with FlopCounterMode(display=False) as counter:
            counter.mod_tracker.__exit__(None, None, None)  # hooked modules are called where else an op stands for them
            model(image)
            counter.mod_tracker.__enter__()
        for _ in range(3):
            model(image)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(options.passes):
                model(image)
    flops = Counter({operator_name(op): count for op, count in counter.get_flop_counts()["Global"].items()})
    times, calls = Counter(), Counter()
    for event in profiled.key_averages():
        times[event.key] += event.self_cpu_time_total / options.passes / 1000
        calls[event.key] += round(event.count / options.passes)
    print_table(options, times, calls, flops, peak)


def operator_name(op: object) -> str:
    """Return an operator's name as the profiler gives it."""
    namespace, name = str(op).split(".")[:2]
    return f"{namespace}::{'mkldnn_convolution' if name == 'convolution' else name}"


def print_table(options: argparse.Namespace, times: Counter, calls: Counter, flops: Counter, peak: float) -> None:
    """Print operators by their own time, the longest first."""
    total = sum(times.values())
    machine = describe_machine("cpu")
    print(f"**{options.model}, {options.size} px, batch {options.batch}, {options.dtype}: {total:.0f} ms a pass**\n")
    print("| operator | calls | ms | share | GFLOP | floor, ms |\n|---|---:|---:|---:|---:|---:|")
    shown = [name for name, time in times.most_common() if time >= SHOWN * total]
    for name in shown:
        counted = f"{flops[name] / 1e9:.1f} | {1000 * flops[name] / peak:.1f}" if flops[name] else "|"
        print(f"| {name} | {calls[name]} | {times[name]:.1f} | {times[name] / total:.0%} | {counted} |")
    rest = total - sum(times[name] for name in shown)
    print(f"| all others | | {rest:.1f} | {rest / total:.0%} | | |")
    print(f"| **together** | | {total:.1f} | | {flops.total() / 1e9:.1f} | {1000 * flops.total() / peak:.1f} |")
    print(
        f"\n{machine['cpu']}, {machine['threads']} threads, {machine['kernels']}, torch {machine['torch']}; matrix "
        f"product {peak / 1e9:.0f} GFLOP/s {options.dtype}; load before {machine['load']}.\n"
    )


if __name__ == "__main__":
    main()
