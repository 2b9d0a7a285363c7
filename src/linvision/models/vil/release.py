"""The layout in which ViL's weights were released: layers in one flat list, other names for norms and head.

Both generations share it. They differ in the convolution, whose weights are ``conv1d.conv.weight`` in the first and
``conv1d.weight`` in the second, and in the second two layers of the list are one block of the model.
"""

import re

from torch import nn

from linvision.errors import CheckpointError
from linvision.models.checkpoints import KeyTable, Release, StateDict
from linvision.models.patches import resize_grid
from linvision.models.vil.model import VisionLSTM2

NUMBER = re.compile(r"blocks\.(\d{1,4})\.")
PAIR = ("rowwise_from_top_left", "rowwise_from_bot_right")


def is_released(state_dict: StateDict) -> bool:
    """Say whether a state dict has the released keys."""
    return any(key.startswith("xlstm.") for key in state_dict)


def is_second_generation(state_dict: StateDict) -> bool:
    """Say whether a state dict, in either naming, is that of a second-generation model."""
    if is_released(state_dict):
        return not any(".conv1d.conv." in key for key in state_dict)
    return any(name in key for key in state_dict for name in PAIR)


def keys(state_dict: StateDict) -> KeyTable:
    """Return the table of keys for a state dict in either naming."""
    second = is_second_generation(state_dict)
    layers = {int(found[1]) for key in state_dict if (found := NUMBER.search(key))}
    if second and not is_released(state_dict):
        layers = {2 * block + half for block in layers for half in (0, 1)}
    table: KeyTable = {"head.1.": "head."}
    if second:
        table |= {"xlstm.post_blocks_norm.": "norm.", "head.0.": "legacy_norm."}
    else:
        table |= {"xlstm.post_blocks_norm.": "legacy_norm.", "head.0.": "norm."}
    for j in layers:
        layer, block = f"xlstm.blocks.{j}.", f"blocks.{j // 2}.{PAIR[j % 2]}." if second else f"blocks.{j}."
        table |= {f"{layer}xlstm.": f"{block}layer.", f"{layer}xlstm_norm.": f"{block}norm."}
        if second:
            table[f"{layer}xlstm.conv1d."] = f"{block}layer.conv."
    return table


def fit(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Resize the position table to the model's grid.

    Raises:
        CheckpointError: the weights are those of the other generation.
    """
    second = isinstance(model, VisionLSTM2)
    if any(key.endswith(".learnable_skip") for key in state_dict) and is_second_generation(state_dict) != second:
        own, other = ("second", "first") if second else ("first", "second")
        raise CheckpointError(f"the file holds a {other}-generation ViL but the model is of the {own} generation")
    table, own_table = state_dict.get("pos_embed.embed"), model.state_dict()["pos_embed.embed"]
    if table is None or table.ndim != 4 or table.shape[::3] != own_table.shape[::3] or not table.numel():
        return state_dict
    return {**state_dict, "pos_embed.embed": resize_grid(table.float(), (own_table.shape[1], own_table.shape[2]))}


RELEASE = Release(wrapper="state_dict", keys=keys, is_released=is_released, fit=fit)
