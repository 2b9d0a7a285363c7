"""Whether autocast is at work, and what ops do about it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def autocasts(x: Tensor) -> bool:
    """Say whether autocast chooses types where this tensor is."""
    device = x.device.type
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


def casts(x: Tensor) -> bool:
    """Say whether autocast casts this tensor for a matrix product: it leaves float64 alone."""
    return x.dtype != torch.float64 and autocasts(x)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def cast_once(x: Tensor) -> Tensor:
    """Cast x as autocast does for a matrix product, so that several products of x share, and keep, one copy."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if casts(x) else x


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function, whose first argument is a tensor, compute in the types that it chooses itself."""

    @wraps(function)
    def computed(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        x = next(iter((*arguments, *options.values())))
        if isinstance(x, Tensor) and autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return function(*arguments, **options)
        return function(*arguments, **options)

    return computed
