"""What ops ask of their inputs: every op lists its tensors in a table, and faults are told in the same words.

A row of the table: the tensor's name, the tensor, its axes in letters, its shape in numbers, and whether it has the
first tensor's type (``SAME``) or any floating-point type (``ANY``), and may be None (``| OPTIONAL``).

An op checks where kernels are entered: in its registered operator, forward and backward, and in the meta kernels of
these. Its public function leaves the checks to the operator, and calls them only for a form that stands in its place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Row = tuple[str, Tensor | None, str, Sequence[int], int]
SAME, ANY, OPTIONAL = 1, 0, 2
FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

WORDS = {
    "S": "token",
    "H": "head",
    "D": "channel",
    "E": "channel",
    "C": "channel",
    "N": "state",
    "K": "tap",
    "L": "tap",
}


def check_axes(op: str, name: str, x: Tensor, letters: Sequence[str], *, needed: str = "") -> None:
    """Raise ValueError unless x is a tensor of so many axes, with at least one element along those that are needed.

    Args:
        op: name of the op.
        name: of the tensor.
        x: the tensor.
        letters: of its axes.
        needed: the letters of axes that may not be empty.
    """
    if not isinstance(x, Tensor):
        check_tensor(op, name, x)
    shape = x.shape
    if len(shape) != len(letters):
        raise ValueError(f"{op}: {name} must be {_axes(letters)} but has shape {tuple(shape)}")
    for letter in needed:
        if shape[letters.index(letter)] == 0:
            words = list(dict.fromkeys(WORDS[each] for each in needed))
            some = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
            raise ValueError(f"{op}: needs at least one {some} but {name} has shape {tuple(shape)}")


def check_tensor(op: str, name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor, which operators do not see to."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor but is {x!r:.80}")


def check(op: str, name: str, first: Tensor, *rows: Row) -> None:
    """Raise ValueError unless all tensors fit the first one, which is dense and of a floating-point type.

    Args:
        op: name of the op.
        name: of the first tensor.
        first: the tensor that the others are measured against.
        rows: the other tensors (see above).
    """
    dtype, device, strided, floating = first.dtype, first.device, torch.strided, FLOATING
    if dtype not in floating or first.layout is not strided:
        raise ValueError(f"{op}: {name} must be dense and of a floating-point type but is {_kind(first)}")
    for other, x, _, shape, kind in rows:
        if x is None:
            if not kind & OPTIONAL:
                check_tensor(op, other, x)
        elif (
            x.shape != shape
            or x.layout is not strided
            or x.device != device
            or ((own := x.dtype) is not dtype and (kind & SAME or own not in floating))
        ):
            row = next(row for row in rows if row[0] == other)
            raise ValueError(f"{op}: {_fault(name, first, row, x, rows)}")


def _fault(name: str, first: Tensor, row: Row, x: Tensor, rows: tuple[Row, ...]) -> str:
    """Say what is wrong with a tensor that does not fit the first one."""
    other, _, letters, shape, _ = row
    if x.shape != tuple(shape):
        needed = f"{letters} = {tuple(shape)} for {name} of {tuple(first.shape)}"
        return f"{other} must have shape {needed} but has {tuple(x.shape)}"
    if x.device != first.device:
        return f"all tensors must be on one device but {other} is on {x.device} and {name} on {first.device}"
    if x.layout is not torch.strided:
        return f"all tensors must be dense but {other} is {x.layout}"
    fault = f"{other} is {x.dtype}, {name} is {first.dtype}"
    same = [each[0] for each in rows if each[4] & SAME and each[1] is not None]
    if not same:
        return f"tensors must be of floating-point types; {fault}"
    return f"{', '.join([name, *same[:-1]])} and {same[-1]} must have one floating-point type, the others any; {fault}"


def check_together(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all of the tensors are given, or none."""
    missing = [name for name, x in tensors.items() if x is None]
    if 0 < len(missing) < len(tensors):
        raise ValueError(f"{op}: {', '.join(tensors)} must be given together, or none of them; None: {missing}")


def _kind(x: Tensor) -> str:
    kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in FLOATING))
    return str(x.layout) if x.layout is not torch.strided else f"{x.dtype}, not one of {kinds}"


def _axes(letters: Sequence[str]) -> str:
    return f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"
