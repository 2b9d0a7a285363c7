"""Full-size files in their release layouts, made of random weights, loaded by every family's published names."""

import argparse
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from torch import Tensor

import linvision
from linvision.errors import DownloadError
from linvision.models import resolve_name, save_pretrained, to_release

REPOSITORY = Path(__file__).parents[2]
VIM_TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
VIM_TINY_STRIDE = "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
Weights = dict[str, Tensor]


def random_weights(name: str, seed: int = 0) -> Weights:
    """Fill the state dict of a full-size model with numbers that half precision holds exactly."""
    with torch.device("meta"):
        model = linvision.create_model(name)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, x in model.state_dict().items():
        numbers = torch.randint(-8, 9, x.shape, generator=generator)
        weights[key] = numbers.to(x.dtype) / 8 if x.is_floating_point() else numbers.to(x.dtype)
    return weights


def differing(model: torch.nn.Module, weights: Weights) -> list[str]:
    """Name the entries of a model's state dict that are not those of the file, in value, shape or type."""
    own = model.state_dict()
    assert own.keys() == weights.keys()
    return [key for key, x in own.items() if x.dtype != weights[key].dtype or not torch.equal(x, weights[key])]


def halved(weights: Weights) -> Weights:
    return {key: x.half() if x.is_floating_point() else x for key, x in weights.items()}


def training_file(weights: Weights, average: Weights) -> dict[str, Any]:
    """Lay weights out as the published training code of Vim and L2ViT leaves them behind."""
    return {
        "model": {f"module.{key}": x for key, x in halved(weights).items()},
        "model_ema": average,
        "optimizer": {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"t_initial": 300, "warmup_t": 5},
        "epoch": 299,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="published", batch_size=128, input_size=224),
    }


# Name, file in the published list, keys that its release layout has and the model does not.
DOWNLOADED = [
    ("vil2-tiny", "vil2_tiny16_e800_in1k.th", ("xlstm.blocks.23.xlstm.conv1d.weight", "head.0.bias")),
    ("vil-tiny", "vil_tiny16_e800_in1k.th", ("xlstm.blocks.23.xlstm.conv1d.conv.weight", "head.1.weight")),
    ("vil-smallplus-stride8", "vil_smallplus16_e400_in1k_stride8.th", ("xlstm.blocks.25.xlstm_norm.weight",)),
    ("deit3-tiny", "vit_tiny16_e800_in1k_deit3reimpl.th", ("cls_tokens.tokens", "head.1.weight")),
]


@pytest.mark.parametrize(("name", "file", "keys"), DOWNLOADED)
def test_downloaded_files(name, file, keys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = random_weights(name)
    released = to_release(name, weights)
    assert set(keys) <= released["state_dict"].keys()
    released["ctor_kwargs"] = {"kind": "models.single.vislstm"}
    torch.save(released, tmp_path / "checkpoints" / file)
    for model in (
        linvision.create_model(name, pretrained=True),
        timm.create_model(resolve_name(name), pretrained=True),
        linvision.create_model(resolve_name(name), checkpoint_path=tmp_path / "checkpoints" / file),
        torch.hub.load(str(REPOSITORY), name, source="local"),
    ):
        assert differing(model, weights) == []


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The cache of the Hugging Face hub, without a network behind it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_revision(hub_cache: Path, repo_id: str, revision: str) -> Path:
    """Make the folder of a downloaded revision of a repository."""
    repository = hub_cache / f"models--{repo_id.replace('/', '--')}"
    commit = f"{sum(revision.encode()):040x}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


def test_vim_from_the_hugging_face_hub(hub_cache):
    weights, average, stride = random_weights(VIM_TINY), random_weights(VIM_TINY, 1), random_weights(VIM_TINY_STRIDE)
    folder = cached_revision(hub_cache, "hustvl/Vim-tiny-midclstok", "main")
    torch.save(training_file(weights, average), folder / "net_76p1acc.pth")
    torch.save({"model": stride}, folder / "net_ft_78p3acc.pth")
    pinned = cached_revision(hub_cache, "hustvl/Vim-tiny-midclstok", "pinned")
    torch.save({"model": average}, pinned / "net_76p1acc.pth")

    assert differing(linvision.create_model(VIM_TINY, pretrained=True), weights) == []
    assert differing(linvision.create_model(VIM_TINY, pretrained=True, ema=True), average) == []
    assert differing(linvision.create_model(VIM_TINY, pretrained=True, revision="pinned"), average) == []
    assert differing(linvision.create_model(VIM_TINY_STRIDE, pretrained=True), stride) == []
    assert differing(torch.hub.load(str(REPOSITORY), VIM_TINY, source="local", pretrained=True), weights) == []
    # timm's own way takes the same path.
    assert differing(timm.create_model("vim_tiny_patch16_224", pretrained=True), weights) == []
    assert differing(timm.create_model("vim_tiny_patch16_stride8_224", pretrained=True), stride) == []
    maps = timm.create_model("vim_tiny_patch16_224", pretrained=True, features_only=True)
    assert torch.equal(maps.state_dict()["model.patch_embed.proj.weight"], weights["patch_embed.proj.weight"])
    other = timm.create_model("vim_tiny_patch16_224", pretrained=True, num_classes=3, in_chans=1, img_size=160)
    assert differing(other, weights) == ["pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias"]


@pytest.mark.parametrize("name", [VIM_TINY, "L2ViT_Tiny"])
def test_files_of_the_published_training_code(name, tmp_path):
    weights, average = random_weights(name, 0), random_weights(name, 1)
    torch.save(training_file(weights, average), tmp_path / "checkpoint.pth")
    assert differing(linvision.create_model(name, checkpoint_path=tmp_path / "checkpoint.pth"), weights) == []
    model = linvision.create_model(name, checkpoint_path=tmp_path / "checkpoint.pth", ema=True)
    assert differing(model, average) == []


def test_a_table_of_197_rows_in_another_grid(tmp_path):
    weights = random_weights(VIM_TINY)
    weights["pos_embed"] = weights["pos_embed"].new_zeros(1, 197, 192)
    weights["pos_embed"][:, 98] = 1  # the class token's, after half of the 14 x 14 patches
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    model = linvision.create_model(VIM_TINY, checkpoint_path=tmp_path / "checkpoint.pth", img_size=(160, 96))
    expected = torch.zeros(1, 61, 192)
    expected[:, 30] = 1
    assert torch.equal(model.pos_embed, expected)


def test_shared_models_are_read_from_the_hugging_face_hub(hub_cache):
    model = linvision.create_model("vim_mini_patch4_32", num_classes=3)
    save_pretrained(model, cached_revision(hub_cache, "someone/vim", "main"))
    again = linvision.create_model("hf-hub:someone/vim")
    assert differing(again, model.state_dict()) == []
    with pytest.raises(DownloadError, match=r"could not get hf-hub:someone/other from the Hugging Face hub \("):
        linvision.create_model("hf-hub:someone/other")
