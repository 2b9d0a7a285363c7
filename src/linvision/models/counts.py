"""Parameters and multiply-adds of every listed name, counted once, by ``make tables``."""

import json
from functools import cache
from importlib import resources

import timm
import torch
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

TABLE = "counts.json"


def counts(name: str) -> tuple[int, int]:
    """Return the number of parameters, and of multiply-adds for one image at the input size, scans included."""
    arch, _ = split_model_name_tag(name)
    found = _table().get(arch)
    return (found[0], found[1]) if found else count(arch)


def count(name: str) -> tuple[int, int]:
    """Count them on a model without memory."""
    cfg = get_pretrained_cfg(name)
    channels, height, width = (3, 224, 224) if cfg is None else cfg.input_size
    with torch.device("meta"), torch.inference_mode():
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, channels, height, width))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@cache
def _table() -> dict[str, list[int]]:
    return json.loads((resources.files("linvision.models") / TABLE).read_text(encoding="utf-8"))
