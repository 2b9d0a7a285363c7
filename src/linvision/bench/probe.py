"""How much memory one run takes.

On a CPU every measurement has a process of its own, forked from a server that has imported everything and run nothing:
it reads pickled requests and answers in JSON. The figure is the peak of the resident
set during the run, above what was resident once model and input were there. Pages of program code are left out, which
the first call maps in whatever it calculates. A limit on the address space turns running out of memory into an
answer, and the end of the forked process is one as well. On a GPU the figures are the allocator's.
"""

import contextlib
import ctypes
import gc
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self, cast

import torch

from linvision.bench.contenders import Contender, Setting, Step, TrafficCounter
from linvision.bench.measure import is_out_of_memory
from linvision.errors import RunError
from linvision.ops import keep_freed_memory

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Probe:
    """The outcome of one run.

    Attributes:
        status: how it ended.
        peak: bytes above model and input; None where it did not end well or the system does not tell.
        traffic: bytes that operators read and wrote; None where they were not counted.
        note: what is to be known about another end than "ok".
    """

    status: Literal["ok", "out of memory", "crashed"]
    peak: int | None = None
    traffic: int | None = None
    note: str = ""


class CPUProbes:
    """The server of forked processes; a context manager, as it must be ended."""

    def __init__(self, *, max_memory: int, threads: int) -> None:
        self.max_memory, self.threads = max_memory, threads
        command = [sys.executable, "-c", "from linvision.bench.probe import serve; serve()"]
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.requests, self.answers = cast(IO[bytes], self.server.stdin), cast(IO[bytes], self.server.stdout)

    def __call__(self, contender: Contender, setting: Setting) -> Probe:
        """Run a contender in a fresh process.

        Raises:
            RunError: the run failed for another reason than memory.
        """
        line = b""
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((contender, setting, self.max_memory, self.threads), self.requests)
            self.requests.flush()
            line = self.answers.readline()
        if not line:
            raise RunError(f"the process that measures memory ended early, before {contender.label} was measured")
        answer = json.loads(line)
        if "failure" in answer:
            raise RunError(f"{contender.label} failed: {answer['failure']}")
        return Probe(**answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.kill()
        self.server.communicate()


def gpu_probe(contender: Contender, setting: Setting) -> Probe:
    """Run a contender on the GPU in this process."""
    try:
        step = contender.prepare(setting)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        traffic = run_counted(step, contender, setting)
        torch.cuda.synchronize()
        probe = Probe("ok", torch.cuda.max_memory_allocated() - before, traffic)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        probe = Probe("out of memory", note="the GPU's memory is too small")
    step = None
    gc.collect()
    torch.cuda.empty_cache()
    return probe


def run_counted(step: Step, contender: Contender, setting: Setting) -> int | None:
    """Run once and count the bytes that operators read and write; None where they cannot be told apart.

    In training it runs twice, as gradients and the optimiser's state are there together from the second step on only.
    """
    if setting.mode == "training":
        step()
    if setting.compile or contender.token_by_token:
        step()
        return None
    with TrafficCounter() as counter:
        step()
    return counter.bytes


def available_memory() -> int | None:
    """Return the bytes that may still be taken on this machine, or in this container; None where neither tells."""
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free.append(_bytes(meminfo.read_text(), "MemAvailable"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        files = [Path("/sys/fs/cgroup") / name for name in (limit, used)]
        if all(file.exists() for file in files):
            amounts = [file.read_text().strip() for file in files]
            free += [int(amounts[0]) - int(amounts[1])] if amounts[0].isdecimal() else []
    return min(free, default=None)


def measure_here(contender: Contender, setting: Setting) -> Probe:
    """Run a contender in this process, which should be a fresh one, on the CPU."""
    step = contender.prepare(setting)
    gc.collect()
    _trim()
    if not STATUS.exists():
        return Probe("ok", None, run_counted(step, contender, setting))
    RESET_PEAK.write_text("5")
    before = _bytes(STATUS.read_text(), "RssAnon")
    traffic = run_counted(step, contender, setting)
    after = STATUS.read_text()
    return Probe("ok", max(0, _bytes(after, "VmHWM") - _bytes(after, "RssFile") - before), traffic)


def _bytes(text: str, name: str) -> int:
    """Read a line such as "VmHWM:   1234 kB" and return its bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _trim() -> None:
    """Give back what building the model has freed; else the run would fill it up unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _limit_memory(max_memory: int) -> None:
    """Let no more than this be allocated from here on."""
    size = _bytes(STATUS.read_text(), "VmSize") if STATUS.exists() else 0
    if size:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + max_memory, hard))


def _measure(contender: Contender, setting: Setting, max_memory: int, threads: int) -> Probe:
    torch.set_num_threads(threads)
    # Threads and the matrix library's own memory belong to no contender, and starting them does not fail gracefully.
    (torch.rand(512, 512) @ torch.rand(512, 512)).exp().sum()
    note = f"more than {max_memory / 2**30:.1f} GiB needed"
    try:
        _limit_memory(max_memory)
        return measure_here(contender, setting)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return Probe("out of memory", note=note)


def _forked(measurement: Callable[[], Probe]) -> dict:
    """Run a measurement in a forked process and return its answer, or what its end says."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            answer = asdict(measurement())
            code = 0
        except BaseException as error:  # noqa: BLE001 - this process ends here, and the failure is passed on
            if os.environ.get("LINVISION_TRACEBACK"):
                traceback.print_exc()
            answer = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        os.write(writer, json.dumps(answer).encode())
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else asdict(interpret_end(status))


def interpret_end(status: int) -> Probe:
    """Say what the end of a process means that gave no answer, by its wait status."""
    number = os.waitstatus_to_exitcode(status)
    if number == -signal.SIGKILL:
        return Probe("out of memory", note="killed by the system")
    if number == -signal.SIGABRT:
        return Probe("out of memory", note="aborted when an allocation failed")
    reason = f"signal {signal.Signals(-number).name}" if number < 0 else f"exit code {number}"
    return Probe("crashed", note=f"ended with {reason}")


def serve() -> None:
    """Answer requests until stdin ends."""
    keep_freed_memory()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a contender prints is no answer
    while True:
        try:
            contender, setting, max_memory, threads = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = _forked(lambda request=(contender, setting, max_memory, threads): _measure(*request))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
