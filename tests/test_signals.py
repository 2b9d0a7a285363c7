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


def ended(code: str) -> subprocess.CompletedProcess:
    """Run code that is to end by a signal in a process of its own, as the command line, which needs no torch."""
    begin = (
        "import signal, sys, threading; sys.argv[0] = 'linvision'\nfrom linvision.interruption import interruptible\n"
    )
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_at_once_where_nothing_is_lost(number):
    done = ended(f"with interruptible():\n    signal.raise_signal({int(number)})\n    print('went on')")
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_a_signal_waits_for_the_end_of_a_step(capfd):
    steps: list[str] = []

    def work():
        with interruptible() as interruption:
            interruption.advice = "continue with that"
            with interruption.patience():
                signal.raise_signal(signal.SIGTERM)
                steps.append("to the end of the step")
            steps.append("further")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        work()
    assert steps == ["to the end of the step"]
    assert capfd.readouterr().err == "continue with that\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process_though_a_lock_is_held():
    """What a handler raised in there would leave the lock held, for which the end in order would wait for ever."""
    done = ended("""
lock = threading.Lock()

class Door:
    def __enter__(self):
        lock.acquire()

    def __exit__(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        lock.release()

try:
    with interruptible() as interruption, interruption.patience():
        interruption.advice = "continue with that"
        with Door():
            pass
finally:
    lock.acquire()
""")
    assert (done.returncode, done.stderr) == (143, "continue with that\n")


def test_a_signal_inside_a_finaliser_is_obeyed():
    """Python would drop what a handler raised in there."""
    done = ended("""
class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

with interruptible() as interruption:
    with interruption.patience():
        Finalised()
        print("to the end of the step")
    print("went on")
""")
    assert (done.returncode, done.stdout, done.stderr) == (130, "to the end of the step\n", "")


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
