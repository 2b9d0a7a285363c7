"""One section of ``gpu_verification.py``: its cases one after the other, each row a line of JSON."""

# ruff: noqa: T201  (it speaks by printing)

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from time import perf_counter

import torch
from gpu_correctness import correctness, graphs, sanitizer
from gpu_kernels import DEVICE, SMOKE, Case, Row, compiled_kernels, kernels
from gpu_models import compiled, models, training

from linvision.bench.machine import describe_machine

SECTIONS: dict[str, Callable[[], Iterable[Case]]] = {
    "correctness": correctness,
    "graphs": graphs,
    "training": training,
    "kernels": kernels,
    "models": models,
    "compiled": lambda: chain(compiled(), compiled_kernels()),
    "sanitizer": sanitizer,
}


def attempts(cases: Iterable[Case], deadline: float) -> Iterator[Row]:
    """Measure case after case until the time has come; one that fails is a row that says why."""
    for name, measure in cases:
        if perf_counter() > deadline:
            yield {"case": name, "status": "left out: no time"}
            continue
        try:
            yield from ({"case": name} | row for row in measure())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other cases are to be measured
            text = " ".join(str(error).split())[:300]
            yield {"case": name, "right": False, "error": f"{type(error).__name__}: {text}"}
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def settings() -> Row:
    """Describe the machine, and what of torch's settings changes results."""
    try:
        triton = version("triton")
    except PackageNotFoundError:  # for AMD it goes by another name
        triton = "of this torch"
    precision = torch.backends.cuda.matmul.fp32_precision
    described = describe_machine(DEVICE) | {"triton": triton, "float32 products": precision}
    return described | ({"smoke": "on a CPU: no results"} if SMOKE else {})


def main() -> int:
    """Run the section named first, for the seconds named second."""
    deadline = perf_counter() + float(sys.argv[2])
    print(json.dumps({"machine": settings()}), flush=True)
    for row in attempts(SECTIONS[sys.argv[1]](), deadline):
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
