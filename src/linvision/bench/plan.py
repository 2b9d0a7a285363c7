"""The plan of measurements that options stand for."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch

from linvision.bench.contenders import Lineup, Setting
from linvision.bench.models import model_lineup
from linvision.bench.ops import op_lineup
from linvision.bench.options import BenchOptions
from linvision.errors import UsageError, nearest
from linvision.ops import backend_names

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("inference", "training")
MODEL_PEERS = ("fused", "explicit", "plain", "parallel", "sequential")
OP_PEERS = {
    "mlstm": ("parallel", "plain", "sequential", "attention"),
    "selective_scan": ("sequential", "plain", "attention"),
}


@dataclass(frozen=True)
class Plan:
    """Every contender meets every other one in every setting.

    Attributes:
        lineup: the contenders and which of them are whose peers.
        settings: in the order of the measurement.
        unit: what a batch consists of, "image" or "sequence".
    """

    lineup: Lineup
    settings: tuple[Setting, ...]
    unit: str


def make_plan(options: BenchOptions) -> Plan:
    """Turn options into measurements.

    Raises:
        UsageError: an option is out of range or names something that does not exist.
        UnknownNameError: a model does not exist; the nearest ones are named.
    """
    _check_ranges(options)
    if _choices("--backend", options.backend, backend_names()) != [options.backend]:
        raise UsageError(f"--backend {options.backend}: give one name")
    device = _choose_device(options.device)
    dtypes = _choices("--dtypes", options.dtypes, DTYPES)
    if device == "cpu" and "float16" in dtypes:
        raise UsageError("--dtypes float16 needs a GPU: use float32 or bfloat16 on the CPU")
    if options.op and options.compile:
        raise UsageError("--compile is for models: ops run as they are")
    if options.checkpointing != "none" and (options.op or options.modes != "training"):
        raise UsageError("--checkpointing is for models in training: give --modes training")
    if options.op and options.autocast:
        raise UsageError("--autocast is for models: an op's state is float32 in any case")
    if options.op is None:
        peers = _choices("--peers", "fused,explicit" if options.peers is None else options.peers, MODEL_PEERS)
        if options.compile and "sequential" in peers:
            raise UsageError("--peers sequential cannot be compiled: a loop over tokens unrolls; leave out --compile")
        lineup = model_lineup(_split("--models", options.models), peers)
        sizes = _numbers("--sizes", options.sizes or "224,512,1248")
    else:
        known = OP_PEERS[options.op]
        peers = _choices("--peers", known[0] if options.peers is None else options.peers, known)
        lineup = op_lineup(options.op, peers, options.width)
        sizes = _numbers("--sizes", options.sizes or "196,1024,6084,16384,65536")
    settings = tuple(
        Setting(
            size=size,
            batch_size=batch_size,
            dtype=dtype,
            mode=mode,
            device=device,
            autocast=options.autocast,
            compile=options.compile,
            backend=options.backend,
            checkpointing=options.checkpointing,
            seed=options.seed,
        )
        for mode, dtype, batch_size, size in product(
            _choices("--modes", options.modes, MODES),
            dtypes,
            _numbers("--batch-sizes", options.batch_sizes),
            sorted(sizes),
        )
    )
    return Plan(lineup, settings, "sequence" if options.op else "image")


def _check_ranges(options: BenchOptions) -> None:
    ranges = (
        ("rounds", options.rounds >= 3, "at least 3, for a spread"),
        ("seconds", options.seconds >= 0, "at least 0"),
        ("threads", options.threads is None or options.threads >= 1, "at least 1"),
        ("max_memory", options.max_memory is None or options.max_memory > 0, "above 0"),
        ("width", options.width > 0 and options.width % 4 == 0, "a multiple of 4, the number of heads"),
        ("seed", 0 <= options.seed < 2**31, "at least 0 and below 2^31"),
    )
    for name, holds, needed in ranges:
        if not holds:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {getattr(options, name)} is out of range: it must be {needed}")
    if options.json and options.markdown:
        raise UsageError("--json and --markdown exclude each other: give one")


def _choose_device(device: str) -> str:
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if gpu and device != "cpu" else "cpu"


def _split(flag: str, text: str) -> list[str]:
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise UsageError(f"{flag} names nothing: give one or more, separated by commas")
    return parts


def _choices(flag: str, text: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    chosen = [] if flag == "--peers" and text.strip() == "none" else _split(flag, text)
    for name in chosen:
        if name not in known:
            near = nearest(name, known, 2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
            raise UsageError(f"{flag} does not know {name}; {hint}")
    return chosen


def _numbers(flag: str, text: str) -> list[int]:
    numbers = _split(flag, text)
    for number in numbers:
        if not number.isdecimal() or int(number) == 0:
            raise UsageError(f"{flag} takes whole numbers above 0, separated by commas, not {number}")
    return list(map(int, numbers))
