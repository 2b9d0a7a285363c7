"""The whole verification of the GPU kernels in one go, in under 10 minutes on one GPU: right, how fast, and in models.

    python benchmarks/gpu_verification.py --out gpu
    python benchmarks/gpu_verification.py --out gpu --only kernels,models     # these again, the others as they were

Sections, each in a process of its own, so that one that fails or crashes leaves the others be, and each within a share
of the time; OUT/gpu.json and OUT/gpu.md are written after every row:

- correctness: every kernel, forward and backward, against float64 on the GPU, beside plain PyTorch in the same type:
  head widths, numbers of states, odd lengths, both directions, states, three types, more than 2^31 elements.
- graphs: kernels and whole models captured into a CUDA graph.
- training: 300 steps on scikit-learn's digits in bfloat16 and in float16 with scaling beside those in float32.
- kernels: time, of replays of CUDA graphs, against the floor, the largest of bytes / bandwidth, operations / rate and
  exponentials / rate, all rates measured on the card; and against fused attention and those peers that can be imported
  (mlstm_kernels, flash-linear-attention).
- models: ViL and Vim against timm's DeiT of their width with flash attention and with attention matrices, 224 ... 2048
  pixels, inference and training step, time and memory; at 224 also as CUDA graphs, without the host's time.
- compiled: tiny models and their DeiT through torch.compile with CUDA graphs, then our kernels beside what it makes of
  plain PyTorch, for as long as time is left.
- sanitizer, on request: a few small launches, for NVIDIA's compute-sanitizer to watch:
  ``compute-sanitizer --target-processes all python benchmarks/gpu_verification.py --only sanitizer``

``--smoke`` runs all of it at toy sizes on a CPU, kernels in Triton's interpreter: a check of this script, no result.
"""

# ruff: noqa: T201  (a script speaks by printing)

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from time import perf_counter
from typing import Any

import torch

COMMAND = "python benchmarks/gpu_verification.py"
SECONDS = {
    "correctness": 130,
    "graphs": 30,
    "training": 80,
    "kernels": 100,
    "models": 200,
    "compiled": 600,
    "sanitizer": 600,
}
ON_REQUEST = {"sanitizer"}
IN_ALL = 560  # seconds; a case under way may end later than its section should
GRACE = 30
A_DAY = 24 * 3600  # of a check of the script, which is to end by itself on any machine
Row = dict[str, Any]
started = perf_counter()


@dataclass
class Results:
    """What has been found so far, in a folder."""

    folder: Path
    machine: Row = field(default_factory=dict)
    sections: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Take up what an earlier run left."""
        file = folder / "gpu.json"
        return cls(folder, **json.loads(file.read_text())) if file.exists() else cls(folder)

    def add(self, section: str, row: Row) -> None:
        """Take in a row and save everything."""
        if "machine" in row:
            self.machine = row["machine"]
        else:
            self.sections[section].append(row)
            print(
                f"[{perf_counter() - started:5.0f} s] {section}: {', '.join(f'{n} {cell(x)}' for n, x in shown(row))}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(
            json.dumps({"machine": self.machine, "sections": self.sections}, indent=1)
        )
        (self.folder / "gpu.md").write_text(self.as_markdown())

    def as_markdown(self) -> str:
        """Write a table a section, with the columns that its rows have."""
        parts = ["; ".join(f"{name} {value}" for name, value in self.machine.items()), f"`{COMMAND}`"]
        for section, rows in self.sections.items():
            columns = list(dict.fromkeys(name for row in rows for name, _ in shown(row)))
            lines = [columns, ["---"] * len(columns), *([cell(row.get(name, "")) for name in columns] for row in rows)]
            parts += [f"## {section}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
        return "\n\n".join(parts) + "\n"


def shown(row: Row) -> list[tuple[str, Any]]:
    """Leave out what is too long for a table."""
    return [(name, value) for name, value in row.items() if not isinstance(value, list)]


def cell(value: Any) -> str:
    """Write a value for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


def run_section(
    command: list[str], take: Callable[[Row], None], *, seconds: float, environment: dict[str, str] | None = None
) -> None:
    """Run a process that prints rows as lines of JSON, and take them; its untimely end is a row as well."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    watch = Timer(seconds, process.kill)
    watch.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            take(json.loads(line))
        else:
            print(line, end="")
    code = process.wait()
    if code != 0:
        late = "" if watch.is_alive() else f", ended after {seconds:.0f} s"
        take({"case": "the section itself", "right": False, "error": f"exit code {code}{late}"})
    watch.cancel()


def main() -> int:
    """Run the sections asked for; the exit code says whether all is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument(
        "--only", default=",".join(s for s in SECONDS if s not in ON_REQUEST), help="sections, by commas"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU: check the script")
    options = parser.parse_args()
    sections = options.only.split(",")
    if unknown := set(sections) - set(SECONDS):
        parser.error(f"--only does not know {', '.join(sorted(unknown))}: there are {', '.join(SECONDS)}")
    if not options.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke checks the script on a CPU")
    results = Results.load(options.out)
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if options.smoke else {})
    for section in sections:
        results.sections[section] = []
        seconds = A_DAY if options.smoke else min(SECONDS[section], IN_ALL - (perf_counter() - started))
        run_section(
            [sys.executable, str(Path(__file__).parent / "gpu_section.py"), section, str(seconds)],
            lambda row, section=section: results.add(section, row),
            seconds=max(seconds, 0) + GRACE,
            environment=environment,
        )
    wrong = [f"{s}: {row['case']}" for s in sections for row in results.sections[s] if not row.get("right", True)]
    print(f"[{perf_counter() - started:5.0f} s] done; {len(wrong)} wrong" + "".join(f"\n  {case}" for case in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
