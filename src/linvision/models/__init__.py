"""The backbones, registered with timm, and creation by name."""

from linvision.models.checkpoints import load_state_dict
from linvision.models.deit3.model import DeiT3
from linvision.models.forms import use_forms
from linvision.models.hub import push_to_hub, save_pretrained
from linvision.models.l2vit.model import L2ViT
from linvision.models.recompute import set_checkpointing
from linvision.models.registry import (
    ModelDescription,
    architecture_of,
    create_model,
    describe,
    has_weights,
    is_source,
    list_models,
    load_checkpoint,
    own_keys,
    resolve_name,
    size_overrides,
    to_release,
)
from linvision.models.runs import is_run, trained_weights
from linvision.models.vil.model import VisionLSTM, VisionLSTM2
from linvision.models.vim.model import VisionMamba

__all__ = [
    "DeiT3",
    "L2ViT",
    "ModelDescription",
    "VisionLSTM",
    "VisionLSTM2",
    "VisionMamba",
    "architecture_of",
    "create_model",
    "describe",
    "has_weights",
    "is_run",
    "is_source",
    "list_models",
    "load_checkpoint",
    "load_state_dict",
    "own_keys",
    "push_to_hub",
    "resolve_name",
    "save_pretrained",
    "set_checkpointing",
    "size_overrides",
    "to_release",
    "trained_weights",
    "use_forms",
]
