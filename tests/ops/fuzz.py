"""Random calls of the ops: ``python -m tests.ops.fuzz --calls 100000 --seed 1``.

``--level raw`` calls the registered operators, backward ones included, ``public`` the functions above them. A call is
drawn from its seed: sizes, strides, types, and often something wrong with a tensor or a number. It must compute what
plain PyTorch computes and the meta kernels promise, or be refused by an exception. Calls run in forked processes, a
batch in each, so that one that dies by a signal, or waits for ever, is named by its seed. ``--replay`` runs one in this
process.
"""

import argparse
import logging
import mmap
import os
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor

from linvision.errors import BackendError
from linvision.ops import use_backend
from tests.ops.random_calls import BACKWARD, FORWARD, Arguments, Draw, Public

LEVELS = "raw", "public"
BATCH = 500  # calls of a process
TEXT = 4096  # bytes in which a process says what it is doing
LIMIT = 120.0  # seconds for a call
TYPES = (torch.float32,) * 6 + (torch.bfloat16,) * 2 + (torch.float16, torch.float64)
OTHER_TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2, 3, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
BOUND = {torch.float64: 1e-6, torch.float32: 2e-2, torch.bfloat16: torch.inf, torch.float16: torch.inf}
MODES = ("gradients", "inference", "no gradients", "no gradients", "autocast")
REFUSALS = (ValueError, TypeError, BackendError)
FROM_TORCH = (  # in its own words: what an operator's schema does not take, and what no memory is left for
    "Expected a value of type",
    "expected",
    "allocate memory",
    "overflow",
    "no autograd formula",
    "NestedTensor",
    "Could not run",
    "version_counter",
    "autocast::prioritize",
)


@dataclass
class Call:
    """A call of an op, right as it was drawn, or hurt."""

    op: str
    arguments: Arguments
    public: Public
    mode: str

    def run(self) -> list[Tensor]:
        """Call the op, and its gradients where the mode asks for them."""
        torch.set_autocast_enabled("cpu", False)  # torch leaves it on where it fails to print what it refuses
        operator = getattr(torch.ops.linvision, self.op) if self.public is None else self.public
        if self.mode == "gradients":
            leaves = [_leaf(x) for x in self.arguments]
            outputs = _tensors(operator(*leaves))
            sums = [y.float().sum() for y in outputs if y.requires_grad and y.is_floating_point()]
            if sums:
                torch.stack(sums).sum().backward()
            return [y.detach() for y in outputs]
        autocast = torch.autocast("cpu", torch.bfloat16) if self.mode == "autocast" else nullcontext()
        with autocast, torch.inference_mode(self.mode == "inference"), torch.no_grad():
            return _tensors(operator(*self.arguments))

    def __str__(self) -> str:
        return f"{self.op} ({self.mode}): " + ", ".join(map(_described, self.arguments))


def draw_call(seed: int, level: str) -> Call:
    """Draw the call of a seed."""
    draw = Draw(seed)
    torch.manual_seed(seed)
    make = draw.choice(FORWARD if level == "public" else FORWARD + BACKWARD)
    arguments, public = None, None
    while arguments is None:
        dtype = draw.choice(TYPES)
        with suppress(RuntimeError):  # sizes whose product overflows
            arguments, public = make(draw, dtype)
        if dtype == torch.float64 and _longest(arguments) > 1 << 20:  # plain PyTorch counts them, in Python
            arguments = None
    places = range(len(arguments))
    for place in places:
        if draw.random() < 0.3:
            arguments[place] = _somewhere(draw, arguments[place], relaid)
    for _ in range(draw.choice([0, 0, 1, 1, 2, 3])):
        place = draw.choice(places)
        changed = _somewhere(draw, arguments[place], damaged)
        if level == "raw" or type(changed) is type(arguments[place]):  # annotations say it, above operators
            arguments[place] = changed
    modes = MODES if make in FORWARD else MODES[1:]
    return Call(make.__name__, arguments, public if level == "public" else None, draw.choice(modes))


def relaid(draw: Draw, x: Any) -> Any:
    """Return a tensor of the same shape that lies otherwise in memory; other arguments as they are."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.ndim == 0 or x.numel() > 1 << 22:
        return x
    kind = draw.randrange(7)
    if kind == 0:
        order = draw.sample(range(x.ndim), x.ndim)
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    if kind == 1 and x.numel():
        return torch.nn.functional.pad(x, (1, 2) * x.ndim)[tuple(slice(1, 1 + size) for size in x.shape)]
    if kind == 2 and x.numel():
        axis = draw.randrange(x.ndim)
        return x.narrow(axis, 0, 1).expand(x.shape)
    if kind == 3 and x.numel():
        return x.repeat_interleave(2, -1)[..., ::2]
    if kind == 4 and x.numel():
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    if kind == 5 and x.numel():  # elements share memory
        return torch.randn(sum(x.shape) + 1).to(x.dtype).as_strided(x.shape, [1] * x.ndim)
    # The strides of axes with one element mean nothing.
    strides = [draw.choice([0, 1 << 40]) if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides) if kind == 6 and x.numel() else x


def damaged(draw: Draw, x: Any) -> Any:
    """Return an argument with something wrong."""
    if isinstance(x, bool) or x is None:
        return draw.choice([None, x, True])
    if isinstance(x, int):
        return draw.choice(NUMBERS)
    if isinstance(x, float):
        return draw.choice([0.0, -1.0, float("nan"), float("inf"), None])
    if isinstance(x, Tensor) and not x.is_nested and x.numel() > 1 << 22:
        return x  # it has not so much memory
    if isinstance(x, list):
        return draw.choice([x[:-1], [*x, x[0]], []])
    kinds = (_wrong_shape, _wrong_shape, _wrong_shape, _wrong_type, _wrong_kind, _wrong_values)
    return draw.choice(kinds)(draw, x)


def _wrong_shape(draw: Draw, x: Tensor) -> Tensor | None:
    kind = draw.randrange(11 if x.ndim and x.layout == torch.strided else 3)
    if kind == 0:
        return None
    if kind == 1:
        return torch.randn(())
    if kind == 2:
        return torch.empty(draw.choice([(0,), (0, 0, 0), (1 << 62, 0, 4), (0, 1 << 40, 4, 4)]))
    axis = draw.randrange(x.ndim)
    if kind == 3:
        return x[..., None]
    if kind == 4:
        return x.sum(axis)
    if kind == 5:
        return x.narrow(axis, 0, 0)
    if kind == 6:
        return x.narrow(axis, 0, max(0, x.shape[axis] - draw.randrange(1, 4)))
    if kind == 7 and x.numel() < 1 << 20:
        return torch.cat([x] * 2, axis)
    if kind == 8:
        return x.transpose(axis, -1)
    if kind == 9:
        return x.reshape(-1)
    sizes = list(x.shape)
    sizes[axis] = 1 << 46
    return x.new_zeros(1).expand(sizes) if x.numel() else x


def _wrong_type(draw: Draw, x: Tensor) -> Tensor:
    return x.to(draw.choice(OTHER_TYPES))


def _wrong_kind(draw: Draw, x: Tensor) -> Tensor:
    """Return a tensor that has no memory, or is not what it seems."""
    kind = draw.randrange(8)
    if kind == 0:
        return x.to("meta")
    if kind == 1:
        return x.to_sparse()
    if kind == 2:
        return x.float().contiguous().to_mkldnn()
    if kind == 3:
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    if kind == 4 and x.dtype in BOUND:
        return torch._neg_view(x)
    if kind == 5:
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    if kind == 6:
        return torch.complex(x.float(), x.float()).conj()
    return torch.nested.nested_tensor([x, x])


def _wrong_values(draw: Draw, x: Tensor) -> Tensor:
    return x * draw.choice([float("nan"), float("inf"), 0.0, 1e30])


def _somewhere(draw: Draw, x: Any, change: Any) -> Any:
    """Change an argument, or one tensor of a list; what cannot be built stays as it is."""
    try:
        if isinstance(x, list) and x and draw.random() < 0.7:
            place = draw.randrange(len(x))
            return [*x[:place], change(draw, x[place]), *x[place + 1 :]]
        return change(draw, x)
    except (RuntimeError, NotImplementedError, IndexError):
        return x


def fault(call: Call) -> str | None:
    """Run a call and say what is wrong about how it ended, or return None."""
    refused = None
    outputs: list[Tensor] = []
    try:
        outputs = call.run()
    except REFUSALS as error:
        refused = error
    except (RuntimeError, NotImplementedError) as error:
        if not any(words in str(error) for words in FROM_TORCH):
            return f"odd exception: {error!r:.200}"
        return None
    except Exception as error:  # noqa: BLE001 - it is what is looked for
        return f"odd exception: {error!r:.200}"
    if call.mode != "no gradients" or not all(map(_is_plain, _tensors(call.arguments))):
        return None
    return _differs_from_meta(call, outputs, refused) or (None if refused else _differs_from_plain(call, outputs))


def _differs_from_meta(call: Call, outputs: list[Tensor], refused: Exception | None) -> str | None:
    """Compare with what the meta kernel promises of the results to compilers, or refuses."""
    if call.public is not None or isinstance(refused, BackendError):
        return None
    try:
        promised = _tensors(getattr(torch.ops.linvision, call.op)(*_each(call.arguments, lambda x: x.to("meta"))))
    except REFUSALS as error:
        return None if refused else f"the meta kernel alone refuses: {error}"
    if refused:
        return f"the meta kernel accepts what is refused: {refused}"
    pairs = [((*y.shape, y.dtype), (*x.shape, x.dtype)) for y, x in zip(outputs, promised, strict=True)]
    return next((f"results {got}, the meta kernel promises {said}" for got, said in pairs if got != said), None)


def _differs_from_plain(call: Call, outputs: list[Tensor]) -> str | None:
    """Compare with plain PyTorch, where numbers are moderate."""
    inputs = _tensors(call.arguments)
    if (
        call.op.endswith("_backward")
        or _longest(inputs) > 1 << 20
        or any(x.numel() and not x.abs().max() < 1e3 for x in inputs)
    ):
        return None
    try:
        with use_backend("plain"):
            expected = call.run()
    except RuntimeError as error:
        return f"plain PyTorch alone refuses: {error!r:.200}"
    bound = max(BOUND[x.dtype] for x in inputs)
    for y, x in zip(outputs, expected, strict=True):
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            return f"{tuple(y.shape)}, {y.dtype} but plain PyTorch gives {tuple(x.shape)}, {x.dtype}"
        finite = x.isfinite() & y.isfinite()
        ours, theirs = y[finite].double(), x[finite].double()
        error = (ours - theirs).abs().max().item() if finite.any() else 0.0
        if error > bound * (1 + (theirs.abs().max().item() if finite.any() else 0.0)):
            return f"differs by {error:.2g} from plain PyTorch"
    return None


def _longest(x: Any) -> int:
    return max((size for each in _tensors(x) for size in each.shape), default=0)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for each in x for y in _tensors(each)] if isinstance(x, list | tuple) else []


def _each(x: Any, change: Any) -> Any:
    if isinstance(x, Tensor):
        return change(x)
    return [_each(each, change) for each in x] if isinstance(x, list | tuple) else x


def _is_plain(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type == "cpu" and x.dtype in BOUND and not x._is_zerotensor()


def _leaf(x: Any) -> Any:
    follows = isinstance(x, Tensor) and x.is_floating_point() and x.device.type == "cpu" and not x.is_nested
    return x.detach().requires_grad_() if follows else x


def _described(x: Any) -> str:
    if isinstance(x, list):
        return f"[{', '.join(map(_described, x))}]"
    if not isinstance(x, Tensor) or x.is_nested:
        return "nested" if isinstance(x, Tensor) else repr(x)
    strides = x.stride() if x.layout == torch.strided else x.layout
    return f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)} by {strides} on {x.device}"


def run_batch(first: int, last: int, level: str, progress: mmap.mmap, findings: IO[str]) -> None:
    """Run calls of consecutive seeds; note the one that runs, and what is wrong."""
    for seed in range(first, last):
        progress[:] = struct.pack("q", seed) + b"drawing".ljust(TEXT - 8)
        call = draw_call(seed, level)
        progress[8:] = str(call).encode()[: TEXT - 8].ljust(TEXT - 8)
        text = fault(call)
        if text:
            findings.write(f"seed {seed}: {text}: {call}\n")
            findings.flush()
    progress[:8] = struct.pack("q", last)


def batches(first: int, last: int, level: str) -> Iterator[str]:
    """Run calls in forked processes, and yield what is wrong."""
    progress = mmap.mmap(-1, TEXT)
    while first < last:
        end = min(first + BATCH, last)
        with TemporaryFile("w+") as findings:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    run_batch(first, end, level, progress, findings)
                    code = 0
                except BaseException:  # noqa: BLE001 - a fork must not go on in its parent's place
                    traceback.print_exc()
                os._exit(code)
            ended = _wait(pid, progress)
            findings.seek(0)
            yield from map(str.strip, findings)
        first = struct.unpack("q", progress[:8])[0]
        if ended:
            yield f"seed {first}: {ended}: {progress[8:].decode(errors='replace').strip()}"
            first += 1


def _wait(pid: int, progress: mmap.mmap) -> str | None:
    """Wait for a process to end; say why where it was not by itself."""
    at, since = progress[:8], time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"ended with {code}"
        if progress[:8] != at:
            at, since = progress[:8], time.monotonic()
        elif time.monotonic() - since > LIMIT:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"not done after {LIMIT:.0f} s"
        time.sleep(0.02)


def main() -> int:
    """Run what the command line asks for; returns whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="calls have the seeds from 10^7 times this number on")
    parser.add_argument("--level", choices=LEVELS, help="both unless it is given")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run the call of a seed in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("linvision").setLevel(logging.ERROR)
    if options.replay is not None:
        call = draw_call(options.replay, options.level or LEVELS[0])
        sys.stdout.write(f"{call}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{fault(call)}\n")
        return 0
    found, first = 0, options.seed * 10**7
    levels = [options.level] if options.level else LEVELS
    for text in chain(*(batches(first, first + options.calls, level) for level in levels)):
        found += 1
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{options.calls} calls of {' and '.join(levels)}, {found} findings\n")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
