"""ViL: golden cases, release files, any size, both directions, initialisation, half precision, compile and export."""

import math

import pytest
import timm
import torch

import linvision
from linvision.errors import CheckpointError
from linvision.models import VisionLSTM, VisionLSTM2, load_checkpoint
from linvision.models.checkpoints import load_weights
from linvision.models.vil.release import RELEASE
from linvision.models.vil.variants import vision_lstm, vision_lstm2
from linvision.models.weight_files import unwrap
from tests import goldens

# The mLSTM holds its stabiliser constant in the backward pass; the goldens' README allows 1e-4 for that.
GRADIENT_BOUND = 1e-4


def build(name: str) -> torch.nn.Module:
    make = vision_lstm2 if goldens.INDEX[name]["reference"] == "VisionLSTM2" else vision_lstm
    return make(**goldens.INDEX[name]["config"]).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in goldens.names("vil") if name != "vil2_resized"])
def test_golden(name, dtype):
    case = goldens.load_model_case(name, dtype)
    model = build(name).to(dtype)
    model.load_state_dict(case.state_dict, strict=True)
    goldens.assert_model_case_matches(model, case, gradient_bound=GRADIENT_BOUND)


def test_position_table_is_resized_on_loading_and_at_run_time():
    weights = goldens.load_model_case("vil2_classifier").state_dict
    case = goldens.load_op_case("vil2_resized")
    loaded = build("vil2_resized").double()
    load_weights(loaded, weights, "file", release=RELEASE)
    small = build("vil2_classifier").double()
    small.load_state_dict(weights)
    for model in (loaded, small):
        bound = 1e-5 if model is loaded else goldens.OUTPUT_BOUND[torch.float64]
        assert goldens.relative_error(model(case["input"]), case["output"]) <= bound
    small.set_input_size((48, 48))
    assert small.pos_embed.embed.shape == (1, 6, 6, 32)
    assert goldens.relative_error(small(case["input"]), case["output"]) <= goldens.OUTPUT_BOUND[torch.float64]


@pytest.mark.parametrize("name", ["vil2_classifier", "vil1_classifier"])
def test_release_file(name):
    case = goldens.load_model_case(name, torch.float32)
    cfg = timm.models.get_pretrained_cfg("vil2_tiny_patch16_224" if "vil2" in name else "vil_tiny_patch16_224")
    model = build(name)
    model.pretrained_cfg = cfg.to_dict()
    load_checkpoint(model, goldens.FOLDER / f"{name}_release.th")
    assert goldens.relative_error(model(case.input), case.output) <= goldens.OUTPUT_BOUND[torch.float32]
    released = torch.load(goldens.FOLDER / f"{name}_release.th", weights_only=True)["state_dict"]
    back = RELEASE.released(model.state_dict())["state_dict"]
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)


def test_generations_are_told_apart():
    released = torch.load(goldens.FOLDER / "vil1_classifier_release.th", weights_only=True)
    with pytest.raises(CheckpointError, match="first-generation"):
        load_weights(build("vil2_classifier"), unwrap(released, "file"), "file", release=RELEASE)
    released = torch.load(goldens.FOLDER / "vil2_classifier_release.th", weights_only=True)
    with pytest.raises(CheckpointError, match="second-generation"):
        load_weights(build("vil1_classifier"), unwrap(released, "file"), "file", release=RELEASE)


@pytest.mark.parametrize("name", ["vil2_classifier", "vil1_classifier"])
def test_classifier_checkpoint_loads_for_features(name):
    config = dict(goldens.INDEX[name]["config"])
    make, mode = (vision_lstm2, "features") if "vil2" in name else (vision_lstm, None)
    model = make(**config | {"mode": mode, "pooling": None}).double().eval()
    case = goldens.load_model_case(name)
    load_weights(model, case.state_dict, "file", release=RELEASE)
    classifier = build(name).double()
    classifier.load_state_dict(case.state_dict)
    tokens = classifier.forward_features(case.input)
    expected = tokens if "vil2" in name else classifier.norm(tokens)
    torch.testing.assert_close(model(case.input), expected)


@pytest.mark.parametrize("model_class", [VisionLSTM2, VisionLSTM])
def test_a_reverse_layer_runs_on_the_reversed_sequence(model_class):
    torch.manual_seed(0)
    model = model_class(32, 8, dim=16, depth=2, num_classes=0).double().eval()
    pair = list(model.blocks[0].children()) if model_class is VisionLSTM2 else list(model.blocks)
    forward, backward = (block.layer for block in pair)
    backward.load_state_dict(forward.state_dict())
    tokens = torch.randn(2, 12, 16, dtype=torch.float64)
    reversed_run = forward(tokens.flip(1), (3, 4)).flip(1)
    torch.testing.assert_close(backward(tokens, (3, 4)), reversed_run)


@pytest.mark.parametrize("model_class", [VisionLSTM2, VisionLSTM])
@pytest.mark.parametrize("size", [(32, 32), (16, 64), (8, 8), (72, 40)])
def test_any_size_that_the_patch_divides(model_class, size):
    model = model_class(32, 8, dim=16, depth=2, num_classes=5)
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


def test_overlapping_patches_in_the_second_generation():
    model = VisionLSTM2((32, 48), 8, stride=4, dim=16, depth=1, num_classes=5, global_pool="to_image")
    assert model.pos_embed.embed.shape == (1, 4, 6, 16)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 16, 7, 11)
    _, maps = model.forward_intermediates(torch.randn(1, 3, 32, 48))
    assert [tuple(x.shape) for x in maps] == [(1, 16, 7, 11)]


@pytest.mark.parametrize("model_class", [VisionLSTM2, VisionLSTM])
def test_maps_are_the_tokens_after_each_block_laid_out_by_rows(model_class):
    torch.manual_seed(0)
    model = model_class(32, 8, dim=16, depth=2, num_classes=5, legacy_norm=True).eval()
    images = torch.randn(2, 3, 32, 48)
    final, maps = model.forward_intermediates(images)
    x, grid = model.embed(images)
    for block, feature_map in zip(model.blocks, maps, strict=True):
        x = block(x, grid)
        torch.testing.assert_close(feature_map, x.mT.reshape(2, 16, 4, 6))
    torch.testing.assert_close(model.finish((x, grid)), final)
    normed = model.forward_intermediates(images, norm=True)[1][-1]
    tokens = final if model_class is VisionLSTM2 else model.norm(final)
    torch.testing.assert_close(normed, tokens.mT.reshape(2, 16, 4, 6))


def test_initialisation_follows_its_table():
    torch.manual_seed(0)
    model = VisionLSTM2(64, 16, dim=64, depth=2, init_weights="original-fixed")
    layer = model.blocks[1].rowwise_from_bot_right.layer
    expected = {
        layer.proj_up.weight: math.sqrt(2 / (5 * 64)),
        layer.q_proj.weight: math.sqrt(2 / (5 * 64)),
        layer.v_proj.weight: math.sqrt(2 / (5 * 64)),
        layer.proj_down.weight: 2 / (4 * math.sqrt(64)),
        model.head.weight: 2e-5,
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    torch.testing.assert_close(layer.mlstm_cell.fgate.bias, torch.tensor([3.0, 4.0, 5.0, 6.0]))
    zero = [layer.mlstm_cell.fgate.weight, layer.mlstm_cell.igate.weight, layer.proj_up.bias, layer.proj_down.bias]
    zero += [layer.q_proj.bias, model.norm.weight, model.head.bias, model.patch_embed.proj.bias]
    assert all((x == 0).all() for x in zero)
    assert (layer.learnable_skip == 1).all()
    plain = VisionLSTM2(64, 16, dim=64, depth=2).blocks[0].rowwise_from_top_left.layer.proj_down.weight
    assert plain.std().item() == pytest.approx(2 / math.sqrt(64), rel=0.1)


@pytest.mark.parametrize("decay", [False, True])
def test_drop_path_rates(decay):
    model = VisionLSTM2(32, 8, dim=16, depth=3, drop_path_rate=0.2, drop_path_decay=decay)
    rates = [block.drop_path.drop_prob for pair in model.blocks for block in pair.children()]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2] if decay else [0.2] * 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    torch.manual_seed(0)
    model = VisionLSTM2(32, 8, dim=32, depth=2, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = model(images)
    assert goldens.relative_error(under_autocast.float(), expected) < 0.05
    assert goldens.relative_error(model.to(dtype)(images.to(dtype)).float(), expected) < 0.05


def test_parameter_counts_are_the_published_ones():
    counts = {"vil2-tiny": 6.39, "vil2-small": 23.40, "vil-tiny": 6.09, "vil-smallplus-stride8": 24.63}
    for name, millions in counts.items():
        assert linvision.models.describe(name).parameters / 1e6 == pytest.approx(millions, abs=0.006)


def test_vil2_compiles_and_exports():
    torch.manual_seed(0)
    model = linvision.create_model("test_vil2").eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        eager = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), eager, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.randn(3, 3, 64, 96)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "height 30 is not a multiple of the patch size 8"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"conv_kind": "3d"}, "conv_kind='3d'"),
        ({"init_weights": "fixed"}, "init_weights='fixed'"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VisionLSTM2(**{"img_size": 32, "patch_size": 8, "dim": 16, "depth": 1} | options)


def test_bad_images_are_named():
    model = VisionLSTM2(32, 8, dim=16, depth=1)
    with pytest.raises(ValueError, match="width 44 is not a multiple of the patch size 8: resize or pad it, to 48 say"):
        model(torch.randn(1, 3, 32, 44))
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, H, W\) but got \(1, 1, 32, 32\).*in_chans=1"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="mode='feature'"):
        vision_lstm2(mode="feature")
    with pytest.raises(ValueError, match="alternation='none'"):
        vision_lstm(alternation="none")
