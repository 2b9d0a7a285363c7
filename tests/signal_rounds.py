"""Training runs that get a signal at a random moment: ``python -m tests.signal_rounds --rounds 200``.

Each has to end within seconds by itself, with 128 and the signal's number, and to become the undisturbed run when it is
resumed, or to have finished. Moments reach from the start of the interpreter to the end of the run; signals go to the
process alone or, as Ctrl-C does, to its data-loader workers as well; some are sent twice. Most runs are forked from a
process that has imported everything, every fifth is a new one.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.data.samples import write_folder
from tests.tasks.runs import TINY, metrics, same_weights

LIMIT = 30.0  # seconds that a run may take to end after its signal, on a busy machine; it needs one or two
EPOCHS = 4
RUN = ("--epochs", str(EPOCHS), "--mixup", "0.5", "--ema", "0.5", "--drop-path", "0.3")
FRESH = 5  # every how many rounds the interpreter starts anew
BEFORE, AFTER = "before the run", "after it"


@dataclass
class Run:
    """A run in a process of its own, which leads a group of its own."""

    pid: int
    ends: IO[bytes]  # of a line with its exit status

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None where the run goes on; a negative one is that of a signal's default action."""
        ready, _, _ = select.select([self.ends], [], [], seconds)
        return answered(self.ends.readline()) if ready else None

    def signal(self, number: int, group: bool) -> None:
        """Send a signal to the run, with its workers if ``group``."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)


def answered(line: bytes) -> int:
    """Read a number that the process that starts the runs has written."""
    assert line, "the process that starts the runs has ended"
    return int(line)


class Server:
    """Starts runs: forks of a process that has imported everything, or new interpreters."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def start(self, arguments: list[str], log: Path, *, fresh: bool) -> Run:
        """Start ``linvision`` with these arguments, its output going to ``log``."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, str(log), fresh]).encode() + b"\n")
        self.process.stdin.flush()
        return Run(answered(self.process.stdout.readline()), self.process.stdout)


@contextmanager
def server() -> Iterator[Server]:
    """Run the process that starts runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.signal_rounds", "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        yield Server(process)
        process.terminate()


def serve() -> None:
    """Start the runs that stdin asks for, one after the other; write the number and the exit code of each process.

    A forked run leaves by returning from here, so that it ends as every interpreter does.
    """
    import torch

    from linvision.tasks import get_task
    from linvision.training import engine, plan  # noqa: F401 - what a run imports

    get_task("classify")

    torch.set_num_threads(1)
    while request := sys.stdin.buffer.readline():
        arguments, log, fresh = json.loads(request)
        child = os.fork()
        if child == 0:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["linvision", *arguments]
            if fresh:
                os.execv(sys.executable, [sys.executable, "-m", "linvision", *arguments])
            return
        os.write(1, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


class Rounds:
    """Rounds on one data set beside undisturbed runs."""

    def __init__(self, folder: Path, server: Server, seed: int):
        self.folder, self.server = folder, server
        self.random = random.Random(seed)
        self.data = write_folder(folder / "data")
        self.whole = {workers: self._undisturbed(workers) for workers in (0, 1)}

    def _arguments(self, out: Path, workers: int) -> list[str]:
        return ["train", "--data", str(self.data), *TINY, *RUN, "--workers", str(workers), "--out", str(out)]

    def _undisturbed(self, workers: int) -> Path:
        """Make a run without a signal."""
        out = self.folder / f"whole-{workers}"
        log = out.with_suffix(".log")
        code = self.server.start(self._arguments(out, workers), log, fresh=False).wait(10 * LIMIT)
        assert code == 0, log.read_text()
        return out

    def play(self, index: int) -> str:
        """Play a round and say in which part of the run the signal came.

        Raises:
            AssertionError: the run did not end, ended otherwise, or was not the undisturbed one when it was resumed.
        """
        number = self.random.choice([signal.SIGINT, signal.SIGTERM])
        group, twice = self.random.random() < 0.5, self.random.random() < 0.2
        workers, fresh = int(self.random.random() < 0.3), index % FRESH == 0
        moment = self.random.choice(list(MOMENTS))
        spread = (5.0 if fresh else 0.5) if moment == "start" else 0.3
        delay = self.random.uniform(0, spread)
        out, log = self.folder / f"run-{index}", self.folder / f"run-{index}.log"
        run = self.server.start(self._arguments(out, workers), log, fresh=fresh)
        code = self._wait_for(moment, run, out)
        code = run.wait(delay) if code is None else code
        if code is None:
            run.signal(number, group)
            if twice and (code := run.wait(self.random.uniform(0, 0.1))) is None:
                run.signal(number, group)
        code = run.wait(LIMIT) if code is None else code
        told = f"round {index}: {number.name} {delay:.2f} s after {moment}, {group=} {twice=} {fresh=} {workers=}: "
        if code is None:
            run.signal(signal.SIGKILL, True)
            run.wait(LIMIT)
            raise AssertionError(f"{told}went on after its signal\n{log.read_text()}")
        place = self._check(index, f"{told}exit code {code}\n{log.read_text()}", code, number, self.whole[workers])
        shutil.rmtree(out, ignore_errors=True)
        return place

    def _wait_for(self, moment: str, run: Run, out: Path) -> int | None:
        """Wait until the run has written what tells the moment; returns its exit code if it ends before."""
        deadline = time.monotonic() + 10 * LIMIT
        while not MOMENTS[moment](out):
            assert time.monotonic() < deadline, f"{out} does not get as far as {moment}"
            if (code := run.wait(0.005)) is not None:
                return code
        return None

    def _check(self, index: int, told: str, code: int, number: int, whole: Path) -> str:
        out, log = self.folder / f"run-{index}", self.folder / f"run-{index}.log"
        place = _place(out)
        begun, over = place != BEFORE, place == AFTER
        # By its default action a signal ends what is no run yet, or none any more.
        outside = not begun or over or "twice=True" in told
        assert code == 128 + number or (code == -number and outside) or (code == 0 and over), told
        # Python reports what a handler raises inside a finaliser; and the interpreter's own start is not ours.
        assert told.count("Traceback") <= told.count("Exception ignored in") or outside, told
        if begun and not over:
            assert f"stopped; continue with: linvision train --resume {out}" in told, told
            at_once = "twice=True" in told or place == "in its results"
            assert at_once or not list(out.glob(".*.tmp")), told
            again = self.server.start(["train", "--resume", str(out)], log, fresh=False).wait(10 * LIMIT)
            assert again == 0, f"{told}\nresumed:\n{log.read_text()}"
        if begun:
            assert (out / "summary.json").is_file(), told
            assert metrics(out) == metrics(whole), told
            assert all(same_weights(out, whole, which) for which in ("last", "best")), told
        return place


def _epochs(out: Path) -> int:
    """Count the epochs that a run has recorded."""
    return len(metrics(out)) if (out / "metrics.csv").is_file() else 0


def _place(out: Path) -> str:
    """Say how far a run has come."""
    if not (out / "model.json").is_file():
        return BEFORE
    if (out / "summary.json").is_file():
        return AFTER
    return "in its results" if _epochs(out) == EPOCHS else f"in epoch {_epochs(out) + 1}"


# By what a run has written one knows that it has got there; the signal comes a random while later.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "start": lambda out: True,
    "folder": lambda out: (out / "config.yaml").is_file(),
    "state": lambda out: (out / "state.ckpt").is_file(),
    "second epoch": lambda out: _epochs(out) >= 2,
    "third epoch": lambda out: _epochs(out) >= 3,
    "last epoch": lambda out: _epochs(out) == EPOCHS,
    "curves": lambda out: (out / "curves.png").is_file(),
}


def play(rounds: int, seed: int, *, tell: IO[str] | None = None) -> Counter[str]:
    """Play rounds and count where their signals came."""
    places: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, server() as starter:
        game = Rounds(Path(folder), starter, seed)
        for index in range(rounds):
            place = game.play(index)
            places[place] += 1
            if tell is not None:
                tell.write(f"{index + 1}/{rounds}: {place}\n")
                tell.flush()
    return places


def main() -> None:
    """Play the rounds that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        from linvision.cli import main as linvision

        raise SystemExit(linvision())
    places = play(options.rounds, options.seed, tell=sys.stderr)
    for place, count in sorted(places.items()):
        sys.stdout.write(f"{count:4}  {place}\n")
    sys.stdout.write(f"{places.total():4}  runs ended and became the undisturbed one\n")


if __name__ == "__main__":
    main()
