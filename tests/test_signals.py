"""Signals at random moments of training runs; ``python -m tests.signal_rounds`` plays as many rounds as one likes."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from linvision.interruption import interruptible
from tests.signal_rounds import play
from tests.tasks.runs import TINY, metrics


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_run_ends_after_its_signal_and_resumes():
    assert play(30, seed=0).total() == 30


def test_a_signal_leaves_a_run_that_resumes(colours, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "linvision", "train", "--data", str(colours), *TINY, "--epochs", "2000"]
    with subprocess.Popen([*command, "--out", str(out)], stdout=-1, stderr=-1, text=True) as process:
        while not (out / "state.ckpt").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 143, errors
    assert output == ""
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"stopped; continue with: linvision train --resume {out}"
    assert not list(out.glob(".*.tmp"))
    state = torch.load(out / "state.ckpt", weights_only=True)
    assert len(metrics(out)) in {state["epoch"] + 1, state["epoch"] + 2}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_at_once_where_nothing_is_lost(number):
    def work():
        with interruptible():
            signal.raise_signal(number)
            raise AssertionError("went on")

    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(128 + number)):
        work()
    assert signal.getsignal(number) is before


def test_a_signal_waits_for_the_end_of_a_step_and_a_second_one_does_not(capfd):
    def work(*signals: int):
        with interruptible() as interruption:
            interruption.advice = "continue with that"
            with interruption.patience():
                for number in signals:
                    signal.raise_signal(number)
                steps.append("to the end of the step")
            steps.append("further")

    steps: list[str] = []
    with pytest.raises(SystemExit, match="143"):
        work(signal.SIGTERM)
    assert steps.pop() == "to the end of the step"
    assert capfd.readouterr().err == "continue with that\n"
    with pytest.raises(SystemExit, match="130"):
        work(signal.SIGTERM, signal.SIGINT)
    assert steps == []


class InterruptedFinaliser:
    """Gets a signal while it is finalised, where Python drops what a handler raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_obeyed_later():
    def work():
        with interruptible() as interruption:
            InterruptedFinaliser()
            steps.append("went on")
            with interruption.patience():
                steps.append("trained on")

    steps: list[str] = []
    with pytest.raises(SystemExit, match="130"):
        work()
    assert steps == ["went on"]


def test_an_error_after_a_signal_is_its_consequence(capfd):
    def work(*signals: int):
        with interruptible() as interruption:
            interruption.advice = "continue with that"
            with interruption.patience():
                for number in signals:
                    signal.raise_signal(number)
                raise RuntimeError("a worker is gone")

    with pytest.raises(SystemExit, match="143"):
        work(signal.SIGTERM)
    assert capfd.readouterr().err == "continue with that\n"
    with pytest.raises(RuntimeError, match="a worker is gone"):
        work()
    assert capfd.readouterr().err == ""
