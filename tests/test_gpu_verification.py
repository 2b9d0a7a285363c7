"""The script that verifies the kernels on a GPU runs here at toy sizes, and outlives what fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

from tests.ops.triton_kernels import runs_kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Let the benchmarks be imported, as they import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@runs_kernels
def test_cheap_sections_run_at_toy_sizes(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu_verification.py", "--smoke", "--only", "correctness,kernels"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["machine"]["smoke"] == "on a CPU: no results"
    assert {row["right"] for row in results["sections"]["correctness"]} == {True}
    assert results["sections"]["kernels"][0]["case"] == "measured peaks"
    assert all(row["ours / floor"] > 0 for row in results["sections"]["kernels"][1:])
    assert "## kernels" in (tmp_path / "gpu.md").read_text()


@runs_kernels
def test_one_case_runs_at_a_toy_size(scripts):
    import gpu_correctness
    import gpu_section

    first = next(iter(gpu_correctness.correctness()))
    rows = list(gpu_section.attempts([first], perf_counter() + 3600))
    assert rows
    assert {row["right"] for row in rows} == {True}


def test_without_a_gpu_the_script_says_so(monkeypatch, scripts, capsys):
    import gpu_verification

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_verification.py"])
    with pytest.raises(SystemExit) as end:
        gpu_verification.main()
    assert end.value.code == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "seconds", "error"),
    [("os.abort()", 60, "exit code -6"), ("time.sleep(60)", 2, "exit code -9, ended after 2 s")],
)
def test_a_section_that_crashes_or_hangs_is_a_row_and_what_came_before_is_saved(scripts, tmp_path, end, seconds, error):
    import gpu_verification

    results = gpu_verification.Results(tmp_path, sections={"graphs": []})
    row = {"case": "one", "right": True}
    program = f"import os, time; print({json.dumps(row)!r}, flush=True); {end}"
    gpu_verification.run_section(
        [sys.executable, "-c", program], lambda row: results.add("graphs", row), seconds=seconds
    )
    rows = gpu_verification.Results.load(tmp_path).sections["graphs"]
    assert rows == [row, {"case": "the section itself", "right": False, "error": error}]


@runs_kernels
def test_a_case_that_fails_is_a_row_and_those_without_time_are_left_out(scripts):
    import gpu_section

    def fail():
        yield {"mode": "forward"}
        raise RuntimeError("an illegal\nmemory access")

    cases = [("one", fail), ("two", lambda: iter([{"right": True}]))]
    rows = list(gpu_section.attempts(cases, perf_counter() + 60))
    assert rows == [
        {"case": "one", "mode": "forward"},
        {"case": "one", "right": False, "error": "RuntimeError: an illegal memory access"},
        {"case": "two", "right": True},
    ]
    assert list(gpu_section.attempts(cases[1:], perf_counter() - 1)) == [{"case": "two", "status": "left out: no time"}]
