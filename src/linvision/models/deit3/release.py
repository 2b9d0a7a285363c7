"""The layout in which DeiT-III-T was released with ViL; the model's keys are timm's."""

import math

import torch
from torch import Tensor, nn

from linvision.models.checkpoints import KeyTable, Release, StateDict
from linvision.models.deit3.model import DeiT3
from linvision.models.patches import resize_grid

KEYS: KeyTable = {
    "pos_embed.embed": "pos_embed",
    "cls_tokens.tokens": "cls_token",
    "head.0.": "norm.",
    "head.1.": "head.",
}


def is_released(state_dict: StateDict) -> bool:
    """Say whether a state dict has the released keys."""
    return "pos_embed.embed" in state_dict and "cls_tokens.tokens" in state_dict


def fit(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Resize the position table to the model's grid."""
    table = state_dict.get("pos_embed")
    if table is None or not isinstance(model, DeiT3) or table.ndim != 3 or table.shape == model.pos_embed.shape:
        return state_dict
    if table.shape[::2] != model.pos_embed.shape[::2] or not table.numel():
        return state_dict
    grid = model.patch_embed.grid_size
    columns = _columns(table)
    if columns is None:
        return state_dict
    table = resize_grid(table.float().unflatten(1, (-1, columns)), (grid[0], grid[1]))
    return {**state_dict, "pos_embed": table.flatten(1, 2)}


def flat_positions(state_dict: StateDict) -> StateDict:
    """Lay a released position table (1, rows, columns, D) out as timm's, (1, rows * columns, D)."""
    table = state_dict["pos_embed"]
    return {**state_dict, "pos_embed": table.flatten(1, 2)} if table.ndim == 4 else state_dict


def gridded_positions(state_dict: StateDict) -> StateDict:
    """Lay timm's position table out as the released one.

    Raises:
        ValueError: its grid cannot be told.
    """
    table = state_dict["pos_embed"]
    columns = _columns(table)
    if columns is None:
        raise ValueError(f"pos_embed {tuple(table.shape)}: neither a square grid nor sines and cosines of one")
    return {**state_dict, "pos_embed": table.unflatten(1, (-1, columns))}


def _columns(table: Tensor) -> int | None:
    """Count the columns of a flat position table (1, rows * columns, D), or return None where there are none.

    The tokens of a row share the row's half of the sines and cosines; a learned table has to be square.
    """
    num_positions, dim = table.shape[1:]
    rows = table[0, :, : dim // 2].float()
    columns = int(torch.isclose(rows, rows[:1], atol=1e-2).all(dim=1).long().cumprod(0).sum())
    if columns > 1 and num_positions % columns == 0:
        return columns
    side = math.isqrt(num_positions)
    return side if side * side == num_positions else None


RELEASE = Release(
    wrapper="state_dict",
    keys=lambda state_dict: KEYS,
    is_released=is_released,
    fit=fit,
    from_file=flat_positions,
    to_file=gridded_positions,
)
