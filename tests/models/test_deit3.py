"""DeiT-III: the golden case and its release file through timm's ViT, the fixed positions, sizes, bad input."""

import math

import pytest
import torch

import linvision
from linvision.models import load_checkpoint
from linvision.models.checkpoints import load_weights
from linvision.models.deit3.layers import sine_cosine_table
from linvision.models.deit3.model import DeiT3
from linvision.models.deit3.release import RELEASE
from linvision.models.weight_files import unwrap
from tests import goldens

NAME = "deit3_classifier"


@pytest.fixture
def model() -> DeiT3:
    config = goldens.INDEX[NAME]["config"]
    return DeiT3(
        config["input_shape"][1:],
        config["patch_size"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=config["num_outputs"],
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(model, dtype):
    case = goldens.load_model_case(NAME, dtype)
    load_weights(model.to(dtype), case.state_dict, "file", release=RELEASE)
    image = case.input.clone().requires_grad_()
    output = model(image)
    assert goldens.relative_error(output, case.output) <= goldens.OUTPUT_BOUND[dtype]
    (output * case.loss_weight).sum().backward()
    # The released names of the gradients, which hold no table: it is fixed.
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    gradients["pos_embed"] = torch.zeros_like(model.pos_embed)
    ours = RELEASE.released(gradients)["state_dict"] | {"input": image.grad}
    golden = case.gradients | {"input": case.input_grad}
    goldens.assert_gradients_match(ours, golden, goldens.GRADIENT_BOUND[dtype])


def test_release_file_and_back(model):
    case = goldens.load_model_case(NAME, torch.float32)
    model.pretrained_cfg = {"architecture": "deit3_tiny_patch16_224"}
    load_checkpoint(model, goldens.FOLDER / f"{NAME}_release.th")
    assert goldens.relative_error(model(case.input), case.output) <= goldens.OUTPUT_BOUND[torch.float32]
    released = torch.load(goldens.FOLDER / f"{NAME}_release.th", weights_only=True)["state_dict"]
    back = RELEASE.released(model.state_dict())["state_dict"]
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)


def test_positions_are_sines_and_cosines_and_stay_fixed(model):
    table = sine_cosine_table(48, (3, 5))
    row, column, frequency = 2, 4, 10000 ** (-2 * 7 / 24)
    assert table.shape == (1, 3, 5, 48)
    for index, half in ((row, table[0, row, column, :24]), (column, table[0, row, column, 24:])):
        assert half[7].item() == pytest.approx(math.sin(index * frequency), abs=1e-6)
        assert half[12 + 7].item() == pytest.approx(math.cos(index * frequency), abs=1e-6)
    assert torch.equal(model.pos_embed, sine_cosine_table(48, (4, 4)).flatten(1, 2))
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (40, 24)])
def test_any_size_that_the_patch_divides(model, size):
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)


def test_a_table_of_another_grid_is_resized_on_loading(model):
    larger = DeiT3(64, 8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    released = torch.load(goldens.FOLDER / f"{NAME}_release.th", weights_only=True)
    load_weights(larger, unwrap(released, "file"), "file", release=RELEASE)
    assert larger.pos_embed.shape == (1, 64, 48)


@pytest.mark.parametrize("size", [(32, 64), (64, 16)])
def test_a_changed_input_size_keeps_the_table_fixed_and_convertible(model, size):
    images = torch.randn(1, 3, *size)
    before = model(images)
    model.set_input_size(size)
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model(images), before)
    released = RELEASE.released(model.state_dict())["state_dict"]
    assert released["pos_embed.embed"].shape == (1, size[0] // 8, size[1] // 8, 48)
    again = DeiT3(size, 8, embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    load_weights(again, released, "file", release=RELEASE)
    assert torch.equal(again(images), model(images))


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="height 30 is not a multiple of the patch size 8"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, H, W\) but got \(1, 1, 32, 32\)"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="embed_dim=50"):
        DeiT3(32, 8, embed_dim=50)
    with pytest.raises(ValueError, match="neither a square grid"):
        RELEASE.released({"pos_embed": torch.randn(1, 6, 8)})
    with pytest.raises(ValueError, match="width 30 is not a multiple"):
        model.set_input_size((32, 30))


def test_parameters_of_the_published_size():
    assert linvision.models.describe("deit_tiny_patch16_224").parameters == pytest.approx(5.72e6, rel=0.01)
    with torch.device("meta"):
        count = sum(p.numel() for p in DeiT3().parameters())
    assert count == pytest.approx(5.72e6, rel=0.01)
