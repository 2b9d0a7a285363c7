"""Recurrences over tokens without a loop over them: functional, in linear time, for the ops' reference forms.

A sequence is cut into blocks. Within all blocks at once a few steps double the tokens that each one has heard of
(Hillis and Steele); the ends of the blocks are a sequence themselves, which is scanned in the same way; then each token
is given what came before its block. Products of decays are formed, but nothing is divided by them: decays of at most 1
may vanish, as they do in exact numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 16


def linear_recurrence(decay: Tensor, update: Tensor, start: Tensor | None = None) -> Tensor:
    """Compute x_t = decay_t x_{t-1} + update_t for all t.

    Args:
        decay: (B, T, ...), of axes that broadcast with those of the update.
        update: (B, T, ...).
        start: x before the first one, (B, ...); None for zero.

    Returns:
        all x, (B, T, ...).
    """
    num_tokens = update.shape[1]
    if num_tokens == 1:
        return update if start is None else update + decay * start[:, None]
    length = min(BLOCK, num_tokens)
    missing = -num_tokens % length
    decay, update = (_blocks(x, length, missing, fill) for x, fill in ((decay, 1.0), (update, 0.0)))
    distance = 1
    while distance < length:
        update = update + decay * _delayed(update, distance, 0.0)
        decay = decay * _delayed(decay, distance, 1.0)
        distance *= 2
    if update.shape[1] > 1 or start is not None:
        ends = linear_recurrence(decay[:, :, -1], update[:, :, -1], start)
        first = torch.zeros_like(ends[:, 0]) if start is None else start.expand_as(ends[:, 0])
        update = update + decay * torch.cat([first[:, None], ends[:, :-1]], 1)[:, :, None]
    return update.flatten(1, 2)[:, :num_tokens]


def running_maximum(x: Tensor) -> Tensor:
    """Compute max(x_1, ..., x_t) for all t of (B, T, ...)."""
    num_tokens = x.shape[1]
    if num_tokens == 1:
        return x
    length = min(BLOCK, num_tokens)
    x = _blocks(x, length, -num_tokens % length, -torch.inf)
    distance = 1
    while distance < length:
        x = torch.maximum(x, _delayed(x, distance, -torch.inf))
        distance *= 2
    if x.shape[1] > 1:
        ends = running_maximum(x[:, :, -1])
        x = torch.maximum(x, _padded(ends[:, :-1], 1, 1, 0, -torch.inf)[:, :, None])
    return x.flatten(1, 2)[:, :num_tokens]


def _blocks(x: Tensor, length: int, missing: int, fill: float) -> Tensor:
    """Cut (B, T, ...) into blocks (B, T / length, length, ...), filled up at the end."""
    return _padded(x, 1, 0, missing, fill).unflatten(1, (-1, length))


def _delayed(x: Tensor, distance: int, fill: float) -> Tensor:
    """Move (B, blocks, length, ...) towards the end of its blocks."""
    return _padded(x[:, :, :-distance], 2, distance, 0, fill)


def _padded(x: Tensor, axis: int, before: int, after: int, fill: float) -> Tensor:
    if not (before or after):
        return x
    return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (before, after), value=fill)
