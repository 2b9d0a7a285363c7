"""The layout in which the published training code saves L2ViT's weights: the model's own keys, under "model"."""

import re

from torch import nn

from linvision.models.checkpoints import Release, StateDict


def fit(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Leave the norms of dense tasks, which a classifier's file lacks, as they are in the model."""
    if any(re.match(r"norm\d", key) for key in state_dict):
        return state_dict
    return state_dict | {key: x for key, x in model.state_dict().items() if re.match(r"norm\d", key)}


RELEASE = Release(wrapper="model", fit=fit)
