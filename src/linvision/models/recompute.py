"""Activation checkpointing of a block: what is computed again in the backward pass instead of being kept.

Full checkpointing (arXiv 1604.06174) keeps a block's inputs alone. Selective activation checkpointing (arXiv
2205.05198) also keeps what is dear to compute and recomputes what is cheap: norms, activations, gates, casts, depthwise
convolutions and block-diagonal projections.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import linvision.ops  # noqa: F401 - registers the ops that are named below
from linvision.devices import Checkpointing
from linvision.errors import UsageError

MIN_INNER = 64  # products of a smaller inner dimension cost no more than moving their result
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
MIXERS = {
    torch.ops.linvision.mlstm.default,
    torch.ops.linvision.selective_scan.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def keep_the_dear(context: SelectiveCheckpointContext, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    """Keep results of sequence mixers, and of matrix products unless they have a tiny rank or narrow the tokens.

    A product to fewer channels mostly ends a residual branch, where nobody asks for its result again.
    """
    if op in MIXERS:
        return CheckpointPolicy.MUST_SAVE
    if op in PRODUCTS:
        inner, outputs = args[-1].shape
        return CheckpointPolicy.MUST_SAVE if MIN_INNER <= inner <= outputs else CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = partial(create_selective_checkpoint_contexts, keep_the_dear)


def run_recomputed(
    block: Callable[..., Any],
    *args: Any,
    selective: bool,
    again: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """Run a block so that its backward pass recomputes it: all of it, or with ``selective`` what is cheap.

    Args:
        block: called with ``args``; random numbers are the same ones when it is recomputed.
        args: passed on; tensors among them are kept.
        selective: keep the results that ``keep_the_dear`` names.
        again: context in which the block is recomputed; compiled graphs do without.
    """
    if torch.compiler.is_compiling():
        options: dict[str, Any] = {"context_fn": SELECTIVE} if selective else {}
        return checkpoint(block, *args, use_reentrant=False, **options)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, second = SELECTIVE() if selective else (nullcontext(), nullcontext())
        return first, _Together(lambda: second, again)

    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


class _Together(ExitStack):
    """Contexts that are made and entered whenever this one is entered, which may be several times."""

    def __init__(self, *makers: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.makers = makers

    def __enter__(self) -> "_Together":
        for make in self.makers:
            self.enter_context(make())
        return self


def set_checkpointing(model: nn.Module, checkpointing: Checkpointing) -> None:
    """Let a model recompute activations in the backward pass of its training.

    Raises:
        UsageError: the model does not have this kind; "selective" is for the package's own.
    """
    if checkpointing == "none":
        return
    enable: Any = getattr(model, "set_grad_checkpointing", None)
    try:
        enable(**({"selective": True} if checkpointing == "selective" else {}))
    except (TypeError, AssertionError) as error:  # timm's way to say so
        raise UsageError(f"--checkpointing {checkpointing}: {type(model).__name__} does not have it") from error
