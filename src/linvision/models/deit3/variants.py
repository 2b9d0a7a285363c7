"""The published DeiT-III models: registered names and checkpoint files.

Accuracies are those of Vision-LSTM's paper (arXiv 2406.04303), ImageNet-1K validation, top-1 in %.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from linvision.models.builder import Family, Published, build, classifier_cfg
from linvision.models.deit3.model import DeiT3
from linvision.models.deit3.release import RELEASE

DOWNLOADS = "https://ml.jku.at/research/vision_lstm/download/"  # it was released with ViL


def _cfg(file: str) -> dict[str, Any]:
    return classifier_cfg(url=f"{DOWNLOADS}{file}", paper_ids="arXiv:2204.07118", paper_name="DeiT III")


default_cfgs = generate_default_cfgs(
    {
        "deit3_tiny_patch16_224.e800_in1k": _cfg("vit_tiny16_e800_in1k_deit3reimpl.th"),
        "deit3_tiny_patch16_224.e400_in1k": _cfg("vit_tiny16_e400_in1k_deit3reimpl.th"),
        "test_deit3": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
    }
)

PUBLISHED = {
    "deit3_tiny_patch16_224.e800_in1k": Published(76.2),
    "deit3_tiny_patch16_224.e400_in1k": Published(75.6),
}

# The names of the published hub.
ALIASES = {
    "deit3-tiny": "deit3_tiny_patch16_224.e800_in1k",
    "deit3-tiny-e400": "deit3_tiny_patch16_224.e400_in1k",
}

FAMILY = Family("DeiT-III", RELEASE, default_cfgs, PUBLISHED, ALIASES)


@register_model
def deit3_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """DeiT-III-T: 5.7 M parameters."""
    return build(
        DeiT3,
        "deit3_tiny_patch16_224",
        pretrained,
        family=FAMILY,
        defaults={},
        overrides=overrides,
        out_indices=(3, 5, 7, 11),
    )


@register_model
def test_deit3(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """DeiT-III as small as it gets, for tests: two blocks, 32 channels, patches of 8."""
    own = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build(DeiT3, "test_deit3", pretrained, family=FAMILY, defaults=own, overrides=overrides, out_indices=(0, 1))
