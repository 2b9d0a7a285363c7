"""Time the tiny models in two checkouts, each with its own environment, in alternating processes.

    python benchmarks/compare_checkouts.py ../before/.venv/bin/python .venv/bin/python --rounds 5

Prints the fastest time of each in milliseconds, and the median of the rounds' ratios, the second over the first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CASES = [
    (name, mode, batch_size, size)
    for name in ("vil2_tiny_patch16_224", "vim_tiny_patch16_224", "l2vit_tiny")
    for mode, batch_size, size in (
        ("inference", 1, 224),
        ("inference", 8, 224),
        ("bfloat16", 8, 224),
        ("inference", 1, 512),
        ("inference", 1, 1248),
        ("training", 8, 224),
    )
]

# Runs in either checkout, so it uses nothing but what both have.
MEASURE = """
import json, sys, time
import torch
import linvision
from torch.nn.functional import cross_entropy
keep = getattr(linvision.ops, "keep_freed_memory", None)
if keep is not None:  # older checkouts do so when they are imported
    keep()
times = {}
for name, mode, batch_size, size in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = linvision.create_model(name, **({} if name.startswith("l2vit") else {"img_size": size}))
    images, labels = torch.randn(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.long)
    model.train(mode == "training")
    if mode == "bfloat16":
        model, images = model.bfloat16(), images.bfloat16()
    def step():
        if mode == "training":
            model.zero_grad()
            cross_entropy(model(images), labels).backward()
        else:
            with torch.inference_mode():
                model(images)
    step()
    step()
    taken, begun = [], time.perf_counter()
    while len(taken) < 5 or (time.perf_counter() - begun < 2 and len(taken) < 40):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    times[f"{name} {mode}, batch {batch_size}, {size} px"] = min(taken)
print(json.dumps(times))
"""


def measure(python: str, cases: list) -> dict[str, float]:
    """Return the fastest time of each case in a process of a checkout's Python."""
    # Not resolved, which would leave its environment.
    command = [str(Path(python).absolute()), "-c", MEASURE, json.dumps(cases)]
    # Elsewhere than in a checkout, whose source would be imported in place of the installed one.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help='words that a case must have all of, such as "vim 512"')
    options = parser.parse_args()
    cases = [case for case in CASES if all(word in " ".join(map(str, case)) for word in options.only.split())]
    rounds = []
    for index in range(options.rounds):
        pair = [options.first, options.second]
        turn = -1 if index % 2 else 1  # a machine that gets slower is not to count for one of them
        rounds.append([measure(python, cases) for python in pair[::turn]][::turn])
        sys.stderr.write(f"round {index + 1} of {options.rounds}\n")
    sys.stdout.write("| case | first, ms | second, ms | median ratio |\n|---|---|---|---|\n")
    for case in rounds[0][0]:
        first, second = (min(pair[side][case] for pair in rounds) * 1e3 for side in (0, 1))
        ratio = statistics.median(pair[1][case] / pair[0][case] for pair in rounds)
        sys.stdout.write(f"| {case} | {first:.1f} | {second:.1f} | {ratio:.2f} |\n")


if __name__ == "__main__":
    main()
