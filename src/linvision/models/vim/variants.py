"""The published Vim models: registered names, published function names and constructor arguments, checkpoint files.

Accuracies are those of the paper (arXiv 2401.09417), ImageNet-1K validation, top-1 in %.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from linvision.errors import UnknownOptionError, did_you_mean
from linvision.models.builder import Family, Published, build, classifier_cfg
from linvision.models.vim.model import ClassToken, Directions, VisionMamba
from linvision.models.vim.release import RELEASE


def from_published_arguments(**arguments: Any) -> VisionMamba:
    """Build a model from the published constructor's arguments; see ``published_options``."""
    return VisionMamba(**published_options(**arguments))


# The published constructor's arguments and their defaults.
PUBLISHED_ARGUMENTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "stride": 16,
    "depth": 24,
    "embed_dim": 192,
    "d_state": 16,
    "channels": 3,
    "num_classes": 1000,
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "norm_epsilon": 1e-5,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pt_hw_seq_len": 14,
    "if_bidirectional": False,
    "final_pool_type": "none",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "flip_img_sequences_ratio": -1.0,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "if_divide_out": True,
    "init_layer_scale": None,
    "use_double_cls_token": False,
    "use_middle_cls_token": True,
}
# Those that only have another name here.
RENAMED = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "stride": "stride",
    "channels": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "dim",
    "depth": "depth",
    "d_state": "d_state",
    "if_divide_out": "halve_output",
    "init_layer_scale": "layer_scale",
    "norm_epsilon": "norm_eps",
    "if_abs_pos_embed": "pos_embed",
    "pt_hw_seq_len": "rotary_reference",
    "drop_rate": "drop_rate",
    "drop_path_rate": "drop_path_rate",
}
POOLINGS = {"none": "last", "mean": "avg", "max": "max", "all": ""}


def published_options(**arguments: Any) -> dict[str, Any]:
    """Translate the published constructor's arguments, with their published defaults, into those of ``VisionMamba``.

    ``fused_add_norm`` and ``residual_in_fp32`` change nothing: how the norm is computed is no part of the model, and
    the residual is always float32 or wider.

    Raises:
        UnknownOptionError: for arguments that the published constructor does not have.
        ValueError: for values that the published code does not know, and where ``VisionMamba`` refuses them.
    """
    for name in arguments:
        if name not in PUBLISHED_ARGUMENTS:
            raise UnknownOptionError(f"Vim has no argument {name!r}{did_you_mean(name, PUBLISHED_ARGUMENTS)}")
    given = PUBLISHED_ARGUMENTS | arguments
    scan, paired, pool = given["bimamba_type"], given["if_bidirectional"], given["final_pool_type"]
    if pool not in POOLINGS:
        raise ValueError(f"final_pool_type={pool!r}: use one of {', '.join(map(repr, POOLINGS))}")
    if scan not in ("v1", "v2", "none", None):
        raise ValueError(f"bimamba_type={scan!r}: use 'v2', 'v1' or 'none'")
    if paired and scan in ("v1", "v2"):
        raise ValueError("if_bidirectional=True pairs one-way layers: it needs bimamba_type='none'")
    class_token: ClassToken = "none"
    if given["if_cls_token"]:
        middle = "middle" if given["use_middle_cls_token"] else "first"
        class_token = "double" if given["use_double_cls_token"] else middle
    one_way: Directions = "paired" if paired else "one-way"
    return {
        **{own: given[name] for name, own in RENAMED.items()},
        "global_pool": "token" if given["if_cls_token"] else POOLINGS[pool],
        "class_token": class_token,
        "directions": scan if scan in ("v1", "v2") else one_way,
        "norm": "rms" if given["rms_norm"] else "layer",
        "rotary": False if not given["if_rope"] else "both" if given["if_rope_residual"] else "hidden",
        "flip_probability": max(0.0, given["flip_img_sequences_ratio"]),
    }


def _cfg(hub: str, **changes: Any) -> dict[str, Any]:
    # The paper does not name the files; each repository also holds those of the stride-8 model.
    paper = {"paper_ids": "arXiv:2401.09417", "paper_name": "Vision Mamba"}
    return classifier_cfg(hf_hub_id=f"hustvl/{hub}", crop_pct=0.875, **paper, **changes)


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg("Vim-tiny-midclstok"),
        "vim_tiny_patch16_stride8_224.in1k": _cfg("Vim-tiny-midclstok"),
        "vim_small_patch16_224.in1k": _cfg("Vim-small-midclstok"),
        "vim_small_patch16_stride8_224.in1k": _cfg("Vim-small-midclstok"),
        "vim_base_patch16_224.in1k": _cfg("Vim-base-midclstok"),
        "vim_mini_patch4_32": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
        "test_vim": classifier_cfg(num_classes=10, input_size=(3, 32, 32)),
    }
)

PUBLISHED = {
    "vim_tiny_patch16_224.in1k": Published(76.1),
    "vim_tiny_patch16_stride8_224.in1k": Published(78.3),
    "vim_small_patch16_224.in1k": Published(80.5),
    "vim_small_patch16_stride8_224.in1k": Published(81.6),
    "vim_base_patch16_224.in1k": Published(81.9),
}

# The published functions.
_SUFFIX = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
ALIASES = {
    f"vim_tiny_patch16_224_{_SUFFIX}": "vim_tiny_patch16_224.in1k",
    f"vim_tiny_patch16_stride8_224_{_SUFFIX}": "vim_tiny_patch16_stride8_224.in1k",
    f"vim_small_patch16_224_{_SUFFIX}": "vim_small_patch16_224.in1k",
    f"vim_small_patch16_stride8_224_{_SUFFIX}": "vim_small_patch16_stride8_224.in1k",
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2": (
        "vim_base_patch16_224.in1k"
    ),
}


# What these functions pass to the published constructor, beside the options that all released models share.
FUNCTION_ARGUMENTS = {
    alias: {
        "embed_dim": {"tiny": 192, "small": 384, "base": 768}[name.split("_")[1]],
        "stride": 8 if "stride8" in name else 16,
        "final_pool_type": "mean",
    }
    for alias, name in ALIASES.items()
}

FAMILY = Family("Vim", RELEASE, default_cfgs, PUBLISHED, ALIASES)


def _build(variant: str, pretrained: bool, overrides: dict[str, Any], **defaults: Any) -> nn.Module:
    depth = overrides.get("depth", defaults.get("depth", 24))
    return build(
        VisionMamba,
        variant,
        pretrained,
        family=FAMILY,
        defaults=defaults,
        overrides=overrides,
        # A quarter, a half, three quarters and all of the depth.
        out_indices=tuple(sorted({max(depth * quarter // 4, 1) - 1 for quarter in (1, 2, 3, 4)})),
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-Ti: 7.1 M parameters."""
    return _build("vim_tiny_patch16_224", pretrained, overrides, dim=192)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-Ti fine-tuned on 729 overlapping patches."""
    return _build("vim_tiny_patch16_stride8_224", pretrained, overrides, dim=192, stride=8)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-S: 25.8 M parameters."""
    return _build("vim_small_patch16_224", pretrained, overrides, dim=384)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-S fine-tuned on 729 overlapping patches."""
    return _build("vim_small_patch16_stride8_224", pretrained, overrides, dim=384, stride=8)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim-B: 98 M parameters."""
    return _build("vim_base_patch16_224", pretrained, overrides, dim=768)


@register_model
def vim_mini_patch4_32(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim for small images such as digits: 32x32 pixels, patches of 4, four layers. No published weights."""
    own = {"img_size": 32, "patch_size": 4, "depth": 4}
    return _build("vim_mini_patch4_32", pretrained, overrides, dim=192, **own)


@register_model
def test_vim(pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Vim as small as it gets, for tests: four layers, 32 channels, patches of 8."""
    own = {"img_size": 32, "patch_size": 8, "depth": 4}
    return _build("test_vim", pretrained, overrides, dim=32, **own)
