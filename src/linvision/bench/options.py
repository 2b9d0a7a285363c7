"""The options of ``linvision bench`` and the plan of measurements that they stand for."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import product
from typing import Literal

import torch

from linvision.bench.contenders import Lineup, Setting
from linvision.bench.models import model_lineup
from linvision.bench.ops import op_lineup
from linvision.errors import UsageError, nearest
from linvision.ops import backend_names
from linvision.tasks.options import Checkpointing

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("inference", "training")
MODEL_PEERS = ("fused", "explicit", "plain", "parallel", "sequential")
OP_PEERS = {
    "mlstm": ("parallel", "plain", "sequential", "attention"),
    "selective_scan": ("sequential", "plain", "attention"),
}


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure, beside what.

    Attributes:
        models: names of models, of linvision or timm, separated by commas
        op: measure one op by sequence length instead of models by image size
        sizes: image sides in pixels, or with --op numbers of tokens, separated by commas; default 224,512,1248, or
            196,1024,6084,16384,65536
        batch_sizes: images or sequences in a call, separated by commas
        dtypes: float32, bfloat16 and, on a GPU, float16, separated by commas
        modes: inference and training, separated by commas; training is a whole step (forward, backward, AdamW) of a
            model, forward and backward of an op
        peers: what runs beside, separated by commas, or none. For models: fused and explicit, DeiT of the same width
            with PyTorch's fused attention and with explicit attention matrices; plain, the model without compiled
            kernels; parallel and sequential, the model with its op in that form. With --op: plain, parallel (of mlstm),
            sequential, and attention (PyTorch's, fused). Default fused,explicit; with --op parallel, or sequential
            where there is no parallel form
        width: channels of an op
        rounds: alternating runs of each contender, after the warm-up
        seconds: no further round is begun after this time on one setting, but there are three at least
        device: auto takes a GPU if there is one
        threads: of the CPU; default PyTorch's own choice
        max_memory: GiB that a contender may take on a CPU, its weights included; default 80 % of what is free
        autocast: keep float32 weights and let autocast choose where the type applies, instead of casting all
        compile: compile the models with torch.compile, on a GPU with CUDA graphs
        checkpointing: of activations in training: selective recomputes in the backward pass what is cheap, full
            everything
        backend: of the ops: auto (the fastest that can run), a backend (triton, cpp, plain), or reference, parallel or
            sequential, forms of the ops in PyTorch
        tf32: let a GPU round float32 matrix products to TF32
        seed: of weights and inputs
        out: folder to create for bench.json, bench.csv and the picture bench.png
        overwrite: replace these files in a folder that exists
        json: write the result as JSON instead of tables
        markdown: write the tables as Markdown
    """

    models: str = "vil2-tiny"
    op: Literal["mlstm", "selective_scan"] | None = None
    sizes: str | None = None
    batch_sizes: str = "1"
    dtypes: str = "float32"
    modes: str = "inference"
    peers: str | None = None
    width: int = 384
    rounds: int = 10
    seconds: float = 20.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    max_memory: float | None = None
    autocast: bool = False
    compile: bool = False
    checkpointing: Checkpointing = "none"
    backend: str = "auto"
    tf32: bool = False
    seed: int = 0
    out: str | None = None
    overwrite: bool = False
    json: bool = False
    markdown: bool = False

    def command(self) -> str:
        """Return the command that measures this again."""
        words = ["linvision bench"]
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value != field.default and field.name not in ("out", "overwrite", "json", "markdown"):
                words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
        return " ".join(words)


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
