"""The layout in which Vim's weights were released: the model's own keys, under "model"."""

import math

from torch import Tensor, nn

from linvision.models.checkpoints import Release, StateDict
from linvision.models.vim.model import VisionMamba, resize_positions


def fit(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Resize the position table to the model's grid; rotary tables are computed, so each model has its own."""
    own = model.state_dict()
    state_dict = state_dict | {key: x for key, x in own.items() if key.startswith("rope.") and key in state_dict}
    table = state_dict.get("pos_embed")
    if isinstance(model, VisionMamba) and table is not None and "pos_embed" in own:
        state_dict["pos_embed"] = _fitted_positions(table, own["pos_embed"], model)
    return state_dict


def _fitted_positions(table: Tensor, own: Tensor, model: VisionMamba) -> Tensor:
    """Resize the table of a square grid to the model's; one that is no such table stays, to be refused by its shape."""
    if table.ndim != 3 or table.shape[1] == own.shape[1] or table.shape[2] != own.shape[2]:
        return table
    num_patches = table.shape[1] - (own.shape[1] - model.grid[0] * model.grid[1])
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        return table
    return resize_positions(table.float(), model.class_token, (side, side), model.grid)


RELEASE = Release(wrapper="model", fit=fit)
