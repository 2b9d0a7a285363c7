"""The published names and arguments through torch.hub."""

import importlib.util
from pathlib import Path

import pytest
import torch

import linvision
from linvision.models.registry import FAMILIES
from tests import goldens

REPOSITORY = str(Path(__file__).parents[1])
# As the papers' repositories list them: 16 of ViL and its DeiT-III, 5 of Vim, 4 of L2ViT.
PUBLISHED = [
    *("vil2-tiny", "vil2-small", "vil2-base", "vil2-tiny-e400"),
    *("vil-tiny", "vil-small", "vil-base", "vil-tinyplus", "vil-smallplus", "vil-tiny-e400", "vil-tinyplus-e400"),
    *("vil-tinyplus-stride8", "vil-smallplus-stride8", "vil-base-stride8"),
    *("deit3-tiny", "deit3-tiny-e400"),
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_small_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2",
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2",
    *("L2ViT_Tiny", "L2ViT_Small", "L2ViT_Base", "L2ViT_Base_384"),
]


def load(name, **arguments):
    return torch.hub.load(REPOSITORY, name, source="local", **arguments)


def test_every_published_name_is_listed():
    spec = importlib.util.spec_from_file_location("hubconf", Path(REPOSITORY) / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    listed = {name for name, entry in vars(hubconf).items() if callable(entry) and entry.__doc__}
    assert {"VisionLSTM", "VisionLSTM2", "VisionMamba", *PUBLISHED} <= listed
    assert set(PUBLISHED) == {alias for family in FAMILIES for alias in family.aliases}


@pytest.mark.parametrize("name", ["vil2_classifier", "vil1_stride", "vim_classifier"])
def test_constructors_take_the_published_arguments(name):
    case = goldens.load_model_case(name, torch.float32)
    model = load(goldens.INDEX[name]["reference"], **case.config).eval()
    model.load_state_dict(case.state_dict)
    assert goldens.relative_error(model(case.input), case.output) <= goldens.OUTPUT_BOUND[torch.float32]


def test_names_take_the_published_arguments():
    with torch.no_grad():
        maps = load("vil2-tiny", pretrained=False, mode="features", pooling="to_image", input_shape=(3, 32, 48))
        assert maps(torch.randn(1, 3, 32, 48)).shape == (1, 192, 2, 3)
        few = load("vil-tiny", pretrained=False, output_shape=(5,), drop_path_rate=0.1)
        assert few(torch.randn(1, 3, 32, 32)).shape == (1, 5)
        deit = load("deit3-tiny", pretrained=False, num_classes=2)
        assert deit(torch.randn(1, 3, 32, 32)).shape == (1, 2)
        l2vit = load("L2ViT_Tiny", num_classes=3).eval()
        assert l2vit(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_vim_names_take_the_published_arguments():
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    model = load(name, img_size=64, channels=1, num_classes=4, depth=2).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 64, 64)).shape == (1, 4)


def test_published_weights_are_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    source = linvision.create_model("vil2-tiny")
    released = linvision.models.to_release("vil2-tiny", source.state_dict())
    torch.save(released, tmp_path / "checkpoints" / "vil2_tiny16_e800_in1k.th")
    model = load("vil2-tiny")
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in model.state_dict().items())


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="dims"):
        load("VisionLSTM2", dims=32)
    with pytest.raises(ValueError, match="mode='feature'"):
        load("VisionLSTM2", mode="feature")
