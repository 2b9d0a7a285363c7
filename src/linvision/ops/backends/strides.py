"""How kernels want tensors to lie in memory, whatever they run on."""

from torch import Tensor


def with_unit_stride(x: Tensor) -> Tensor:
    """Return a tensor whose last axis is contiguous: x itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def leading_strides(*tensors: Tensor) -> list[int]:
    """List the strides of each tensor's axes but the last, which kernels take for contiguous."""
    return [stride for x in tensors for stride in x.stride()[:-1]]


def contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    """Return parameters as kernels read them that take no strides; those that are None stay so."""
    return [None if parameter is None else parameter.contiguous() for parameter in parameters]
