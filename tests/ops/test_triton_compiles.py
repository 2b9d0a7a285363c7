"""The Triton kernels compile for GPUs that are not there, as models launch them, and fit into their shared memory.

``python benchmarks/compile_kernels.py`` does so for every type, head width and number of states.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compile_kernels.py"
KIB = 1024
KERNELS = {
    "mlstm": {
        "gates_kernel",
        "states_kernel",
        "queries_kernel",
        "norms_kernel",
        "keys_kernel",
        "gate_gradients_kernel",
    },
    "scan": {"forward_kernel", "backward_kernel"},
    "convolution": {"forward_kernel", "sums_kernel"},
    "projections": {"forward_kernel", "backward_kernel"},
    "gated norm": {"forward_kernel", "backward_kernel"},
}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_kernels_of_the_tiny_models_fit_into_a_gpu(target, tmp_path):
    chosen = ["--targets", target, "--types", "bfloat16", "--widths", "96", "--states", "16", "--stateless", "--json"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, SCRIPT, *chosen], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for op, kernels in KERNELS.items():
        assert {row["kernel"] for row in rows if row["case"].startswith(op)} == kernels
    assert max(row["shared"] for row in rows) <= 99 * KIB  # what a block gets on sm_86 and sm_89, the least of all
    assert max(row["registers"] for row in rows) <= 255
    scan = {row["kernel"]: row for row in rows if row["case"].startswith("scan")}
    assert {row["shared"] for row in scan.values()} == {0}  # threads have channels of their own, and exchange no more
    # Four tokens; more where strides vary or states are spread over threads.
    assert scan["forward_kernel"]["loop"] < 750
    assert {row["stack"] for row in rows if row["case"].startswith(("scan", "convolution", "gated norm"))} == {0}
