"""The options of ``linvision bench``; no torch needed."""

import shlex
from dataclasses import dataclass, fields
from typing import Literal

from linvision.devices import Checkpointing


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
