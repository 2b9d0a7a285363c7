"""Loading files: every layout, and damaged, foreign and hostile ones answered with one clear error."""

from pathlib import Path

import pytest
import torch

import linvision
from linvision.errors import CheckpointError
from linvision.models import load_checkpoint, load_state_dict, own_keys, save_pretrained
from linvision.models.registry import FAMILIES
from tests.goldens import FOLDER
from tests.models.sizes import TEST_SIZES

MINI = "vil2_mini_patch4_32"


def test_another_class_count_offers_to_drop_the_head(tmp_path):
    source = linvision.create_model(MINI, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "seven.pth")
    with pytest.raises(CheckpointError) as error:
        linvision.create_model(MINI, num_classes=10, checkpoint_path=tmp_path / "seven.pth")
    message = str(error.value)
    assert "head.weight (7, 384) in the file, (10, 384) in the model" in message
    assert "drop_head=True" in message
    assert "\n" not in message
    model = linvision.create_model(MINI, num_classes=10, checkpoint_path=tmp_path / "seven.pth", drop_head=True)
    assert model.head.weight.shape == (10, 384)
    assert torch.equal(model.pos_embed.embed, source.pos_embed.embed)


def test_a_checkpoint_of_another_model_names_keys(tmp_path):
    torch.save(linvision.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"keys are missing: .*keys are unknown to the model: .*blocks\.0\.attn"):
        linvision.create_model(MINI, checkpoint_path=tmp_path / "vit.pth")


# The smallest models of the families that have names of their own for everything.
SMALL = {
    "vil_tiny_patch16_224": {"depth": 1, "img_size": 32},
    "vim_mini_patch4_32": {"depth": 1},
    "l2vit_tiny": {"depths": (1, 1), "dims": (16, 32), "num_heads": (1, 2)},
    "deit3_tiny_patch16_224": {"depth": 1, "img_size": 32},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_family_names_what_does_not_fit(name, tmp_path):
    source = linvision.create_model(name, num_classes=7, **SMALL[name])
    torch.save(linvision.models.to_release(name, source.state_dict()), tmp_path / "seven.pth")
    options = {"num_classes": 10, "checkpoint_path": tmp_path / "seven.pth", **SMALL[name]}
    with pytest.raises(CheckpointError, match=r"head\.weight \(7, .*\) in the file, \(10, .*drop_head=True"):
        linvision.create_model(name, **options)
    assert linvision.create_model(name, drop_head=True, **options).head.out_features == 10
    torch.save(linvision.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth does not fit .*keys are missing: .*unknown to the model: "):
        linvision.create_model(name, checkpoint_path=tmp_path / "other.pth", **SMALL[name])


def test_half_precision_files_other_channels_and_other_grids(tmp_path):
    source = linvision.create_model(MINI)
    torch.save({key: x.half() for key, x in source.state_dict().items()}, tmp_path / "half.pth")
    model = linvision.create_model(MINI, checkpoint_path=tmp_path / "half.pth", in_chans=1, img_size=48)
    assert model.head.weight.dtype == torch.float32
    assert model.pos_embed.embed.shape == (1, 12, 12, 192)
    summed = source.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, summed, rtol=0.01, atol=0.01)


def test_features_only_takes_a_classifier_checkpoint(tmp_path):
    source = linvision.create_model(MINI).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    features = linvision.create_model(
        MINI, checkpoint_path=tmp_path / "weights.pth", features_only=True, out_indices=(0,)
    )
    images = torch.randn(1, 3, 32, 32)
    expected = source.forward_intermediates(images, [0], intermediates_only=True)
    torch.testing.assert_close(features.eval()(images), expected)


@pytest.mark.parametrize("name", ["convnext_atto", "edgenext_xx_small", "test_vit"])
def test_feature_extractors_of_timm_take_every_weight(name, tmp_path):
    source = linvision.create_model(name).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(1)
    features = linvision.create_model(name, checkpoint_path=tmp_path / "weights.pth", features_only=True)
    known = {tuple(x.shape): [] for x in source.state_dict().values()}
    for x in source.state_dict().values():
        known[tuple(x.shape)].append(x)
    assert all(any(torch.equal(x, y) for y in known[tuple(x.shape)]) for x in features.state_dict().values())
    del (lacking := source.state_dict())[next(key for key in source.state_dict() if key.endswith("weight"))]
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match="1 keys are missing"):
        linvision.create_model(name, checkpoint_path=tmp_path / "lacking.pth", features_only=True)


@pytest.mark.parametrize("file", ["vil1_classifier", "vil2_classifier", "vim_classifier", "deit3_classifier"])
def test_tables_of_keys_serve_both_ways(file):
    path = next(FOLDER.glob(f"{file}_release.*"))
    released = load_state_dict(path)
    own = own_keys(released)
    family = next(family for family in FAMILIES if file.startswith(family.label.lower().replace("-iii", "3")))
    assert not family.release.is_released(own)
    assert own_keys(own).keys() == own.keys()
    back = family.release.released(own)[family.release.wrapper]
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key].reshape(x.shape), x) for key, x in released.items())


def test_shared_models_of_every_family_come_back(tmp_path):
    for name in TEST_SIZES:
        model = linvision.create_model(name, num_classes=5)
        save_pretrained(model, tmp_path / name)
        again = linvision.create_model(f"local-dir:{tmp_path / name}")
        assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
        features = linvision.create_model(f"local-dir:{tmp_path / name}", features_only=True, out_indices=(0,))
        assert len(features(torch.randn(1, 3, 32, 32))) == 1


def test_own_weights_at_another_size(tmp_path):
    for name in TEST_SIZES:
        model = linvision.create_model(name)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        larger = linvision.create_model(name, checkpoint_path=tmp_path / "weights.pth", img_size=(64, 48))
        assert larger(torch.randn(1, 3, 64, 48)).shape == (1, model.num_classes)


def test_load_checkpoint_fills_a_model_of_timm(tmp_path):
    source = linvision.create_model("vit_tiny_patch16_224", depth=1)
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    model = linvision.create_model("vit_tiny_patch16_224", depth=1)
    load_checkpoint(model, tmp_path / "vit.pth")
    assert torch.equal(model.head.weight, source.head.weight)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_pretrained_reads_the_hub_cache_and_frees_the_head_for_other_classes(hub_cache):
    source = linvision.create_model("vil2-tiny")
    hub_cache.mkdir()
    torch.save(linvision.models.to_release("vil2-tiny", source.state_dict()), hub_cache / "vil2_tiny16_e800_in1k.th")
    model = linvision.create_model("vil2-tiny", pretrained=True)
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in model.state_dict().items())
    other = linvision.create_model("vil2-tiny", pretrained=True, num_classes=3)
    assert other.head.weight.shape == (3, 384)
    assert torch.equal(other.norm.weight, source.norm.weight)


def test_what_is_asked_of_published_weights_is_heeded(hub_cache, tmp_path):
    source = linvision.create_model("vil2-tiny")
    torch.nn.init.normal_(source.head.weight)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save(linvision.models.to_release("vil2-tiny", source.state_dict()), elsewhere / "vil2_tiny16_e800_in1k.th")
    model = linvision.create_model("vil2-tiny", pretrained=True, cache_dir=elsewhere)
    assert torch.equal(model.head.weight, source.head.weight)
    fresh = linvision.create_model("vil2-tiny", pretrained=True, cache_dir=elsewhere, drop_head=True)
    assert not torch.equal(fresh.head.weight, source.head.weight)
    assert torch.equal(fresh.norm.weight, source.norm.weight)
    with pytest.raises(CheckpointError, match="has no EMA weights"):
        linvision.create_model("vil2-tiny", pretrained=True, cache_dir=elsewhere, ema=True)
    assert not hub_cache.exists()
    assert linvision.create_model("test_vit", ema=True, drop_head=True).num_classes == 1000  # of timm's, without a file
