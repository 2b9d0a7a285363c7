"""The backbones, registered with timm, and creation by name."""

from linvision.models._checkpoints import load_state_dict
from linvision.models._factory import (
    ModelDescription,
    create_model,
    describe,
    list_models,
    load_checkpoint,
    resolve_name,
    to_release,
)
from linvision.models._hub import push_to_hub, save_pretrained
from linvision.models.vil import VisionLSTM, VisionLSTM2

__all__ = [
    "ModelDescription",
    "VisionLSTM",
    "VisionLSTM2",
    "create_model",
    "describe",
    "list_models",
    "load_checkpoint",
    "load_state_dict",
    "push_to_hub",
    "resolve_name",
    "save_pretrained",
    "to_release",
]
