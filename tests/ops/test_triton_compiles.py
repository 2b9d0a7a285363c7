"""The Triton kernels compile for GPUs that are not there, as models launch them, and take no more than is recorded.

``python benchmarks/compile_kernels.py`` does so for every type, head width and number of states. What the kernels of
the tiny models take is recorded for some versions of Triton in ``compiled_kernels.json``: another compiler, other
figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
RECORDED = json.loads(Path(__file__).with_name("compiled_kernels.json").read_text())
VERSION = ".".join(triton.__version__.split(".")[:2])
KIB = 1024
SLACK = {"shared": 0, "registers": 8, "stack": 32, "loop": 16}  # beside 10 %
SCAN = ["--widths", "", "--kernels", ""]
TINY = ["--widths", "96", "--stateless"]


def compiled(target: str, chosen: list[str], folder: Path) -> list[dict]:
    command = [sys.executable, SCRIPT, "--targets", target, "--types", "bfloat16", "--states", "16", "--json", *chosen]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr  # and so all fit into the card's shared memory
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_as_recorded(target: str, rows: list[dict]) -> None:
    """Allow no more than 10 % above what is recorded; less is no fault."""
    if VERSION not in RECORDED:
        pytest.skip(f"no figures are recorded for Triton {VERSION}, only for {', '.join(RECORDED)}")
    for row in rows:
        recorded = RECORDED[VERSION][target][f"{row['case']}: {row['kernel']}"]
        for figure, most in recorded.items():
            taken = row[figure] or 0
            assert taken <= 1.1 * most + SLACK[figure], f"{row['case']} {row['kernel']}: {figure} {taken}, not {most}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_scan_compiles_for_a_gpu_that_is_not_there(tmp_path):
    rows = compiled("sm_90", SCAN, tmp_path)
    assert {row["kernel"] for row in rows} == {"forward_kernel", "backward_kernel"}
    assert_as_recorded("sm_90", rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_kernels_of_the_tiny_models_fit_into_a_gpu(target, tmp_path):
    rows = compiled(target, TINY, tmp_path)
    assert max(row["shared"] for row in rows) <= 99 * KIB  # what a block gets on sm_86 and sm_89, the least of all
    if VERSION in RECORDED:
        assert {f"{row['case']}: {row['kernel']}" for row in rows} == RECORDED[VERSION][target].keys()
    assert_as_recorded(target, rows)
