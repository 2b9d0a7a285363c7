"""L2ViT: golden cases, gradients at batch size 1, windows, maps of dense tasks, checkpoints, bad input."""

import copy

import pytest
import timm
import torch

import linvision
from linvision.errors import CheckpointError
from linvision.models.checkpoints import load_weights
from linvision.models.l2vit.model import L2ViT
from linvision.models.l2vit.release import RELEASE
from tests import goldens

SMALL = {"depths": (2, 2, 2, 1), "dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "num_classes": 5}


def build(name: str) -> L2ViT:
    """Build a golden case's model; its block type and stem are the only ones there are."""
    config = {key: x for key, x in goldens.INDEX[name]["config"].items() if key not in ("block_type", "conv_stem")}
    return L2ViT(**config).train("train" in name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", goldens.names("l2vit"))
def test_golden(name, dtype):
    case = goldens.load_model_case(name, dtype)
    model = build(name).to(dtype)
    model.load_state_dict(case.state_dict, strict=True)
    goldens.assert_model_case_matches(model, case)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_at_batch_size_1_are_the_numeric_ones(training):
    # PyTorch misreads strides that a batch norm followed by a layer norm over channels leaves behind at batch size 1.
    torch.manual_seed(0)
    model = L2ViT((2, 1), (8, 16), num_heads=(1, 2), window_size=3, num_classes=3).double().train(training)
    torch.nn.init.normal_(model.head.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # each evaluation must see the same statistics
    image = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    loss_weight = torch.randn(1, 3, dtype=torch.float64)
    loss = (model(image) * loss_weight).sum()
    loss.backward()
    largest = max(p.grad.norm() for p in model.parameters())
    step = 1e-5
    for key, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += step * direction
            above = (model(image) * loss_weight).sum()
            parameter -= 2 * step * direction
            below = (model(image) * loss_weight).sum()
            parameter += step * direction
        numeric = (above - below) / (2 * step)
        actual = (parameter.grad * direction).sum()
        assert abs(numeric - actual) <= 1e-4 * max(abs(actual), 1e-3 * largest), key


def test_checkpointing_counts_batch_statistics_once():
    torch.manual_seed(0)
    plain, checkpointed = L2ViT(**SMALL), L2ViT(**SMALL)
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.set_grad_checkpointing()
    images = torch.randn(2, 3, 64, 64)
    for model in (plain, checkpointed):
        model.train()(images).sum().backward()
    for (key, expected), actual in zip(plain.state_dict().items(), checkpointed.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, msg=key)


@pytest.mark.parametrize("size", [(64, 96), (67, 90), (33, 129)])
def test_any_size_and_window(size):
    torch.manual_seed(0)
    model = L2ViT(**SMALL).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(images)
        assert expected.shape == (2, 5)
        model.set_input_size(window_size=4)
        assert model.window_size == 4
        assert not torch.equal(model(images), expected)
        again = L2ViT(**SMALL, window_size=4).eval()
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(images), again(images))


def test_maps_of_dense_tasks_have_their_own_norms():
    backbone = timm.create_model("l2vit_tiny", features_only=True).eval()
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]
    for x in maps:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(x.var(1, unbiased=False), torch.ones_like(x[:, 0]), rtol=0, atol=0.1)
    assert not any(key.startswith("norm0") for key in timm.create_model("l2vit_tiny").state_dict())


def test_maps_of_a_pruned_model():
    torch.manual_seed(0)
    model = L2ViT(**SMALL, feature_norms=True).eval()
    torch.nn.init.normal_(model.norm1.weight)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
        normed = model.forward_intermediates(images, indices=[1], norm=True, intermediates_only=True)[0]
        torch.testing.assert_close(normed.permute(0, 2, 3, 1), model.norm1(plain.permute(0, 2, 3, 1)))
        assert model.prune_intermediate_layers([1]) == [1]
    pruned = model.forward_intermediates(images, indices=[1], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(pruned, normed)
    pruned.square().sum().backward()
    # What is left is used: unused parameters stop distributed training.
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_a_classifiers_last_map_has_its_norm():
    torch.manual_seed(0)
    model = L2ViT(**SMALL).eval()
    images = torch.randn(1, 3, 64, 64)
    features, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(maps[-1], features.permute(0, 3, 1, 2))
    torch.testing.assert_close(maps[:-1], model.forward_intermediates(images)[1][:-1])


def test_autocast_computes_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    model = L2ViT(**SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded = model(images)
        with torch.no_grad():
            assert torch.equal(model(images), recorded)
    assert recorded.dtype == torch.bfloat16
    torch.testing.assert_close(recorded.float(), model(images), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_step(checkpointing):
    torch._dynamo.reset()  # sizes that other tests have compiled for would make these dynamic, and slow
    torch.manual_seed(0)
    model = L2ViT((2,), (8,), num_heads=(2,), window_size=3, num_classes=3).train()
    expected = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    images = torch.randn(2, 3, 24, 28)
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).square().sum().backward()
    expected(images).square().sum().backward()
    for (key, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=key)
    for (key, ours), theirs in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_export_with_any_batch_size():
    torch.manual_seed(0)
    model = L2ViT(**SMALL).eval()
    with torch.no_grad():
        images = torch.randn(2, 3, 67, 90)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        images = torch.randn(3, 3, 67, 90)
        torch.testing.assert_close(program.module()(images), model(images))


def test_layer_groups_follow_the_depth():
    with torch.device("meta"):
        groups = timm.models.group_parameters(L2ViT(**SMALL, feature_norms=True), L2ViT(**SMALL).group_matcher())
    depth = {key: number for number, keys in groups.items() for key in keys}
    order = [
        "downsample_layers.0.norm.weight",
        "stages.0.0.norm1.weight",
        "stages.0.1.local_mp.bn.weight",
        "stages.1.0.norm1.weight",
        "stages.3.0.norm1.weight",
        "head.weight",
    ]
    numbers = [depth[key] for key in order]
    assert numbers == sorted(set(numbers))
    assert depth["downsample_layers.1.proj.weight"] == depth["stages.1.0.norm1.weight"]
    assert depth["norm0.weight"] == depth["norm.weight"] == depth["stages.3.0.norm1.weight"]


def test_image_size_is_told_to_what_feeds_the_model():
    with torch.device("meta"):
        assert timm.create_model("l2vit_tiny", img_size=(160, 96), in_chans=1).default_cfg["input_size"] == (1, 160, 96)
        assert timm.create_model("l2vit_base_384").window_size == 12


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [("l2vit_tiny", 28.60, 4.7), ("l2vit_small", 50, 9.0), ("l2vit_base", 89, 15.9), ("l2vit_base_384", 88.58, 47.5)],
)
def test_published_size_and_cost(name, millions, billions):
    described = linvision.models.describe(name)
    assert described.parameters == pytest.approx(millions * 1e6, rel=0.005)
    assert described.macs == pytest.approx(billions * 1e9, rel=0.02)


def test_a_classifiers_checkpoint_loads_for_dense_tasks(tmp_path):
    source = linvision.create_model("l2vit_tiny", num_classes=3)
    torch.save(RELEASE.released({key: x.half() for key, x in source.state_dict().items()}), tmp_path / "l2vit.pth")
    backbone = linvision.create_model(
        "l2vit_tiny", checkpoint_path=tmp_path / "l2vit.pth", num_classes=3, features_only=True
    )
    key = "stages.0.0.attn.qkv.weight"
    torch.testing.assert_close(backbone.state_dict()[f"model.{key}"], source.state_dict()[key], rtol=1e-3, atol=1e-4)


def test_files_of_the_published_training_code(tmp_path):
    source = L2ViT(**SMALL)
    weights = {f"module.{key}": x for key, x in source.state_dict().items()}
    averaged = {key: x + 1 if x.is_floating_point() else x for key, x in weights.items()}
    torch.save({"model": weights, "model_ema": averaged, "epoch": 3}, tmp_path / "trained.pth")
    for ema in (False, True):
        model = L2ViT(**SMALL)
        state_dict = linvision.models.load_state_dict(tmp_path / "trained.pth", ema=ema)
        load_weights(model, state_dict, "file", release=RELEASE)
        torch.testing.assert_close(model.head.bias, source.head.bias + ema)


def test_initialisation():
    torch.manual_seed(0)
    model = L2ViT(**SMALL)
    assert model.stages[3][0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.stages[0][0].mlp.fc1.bias.abs().max() == 0
    torch.testing.assert_close(model.stages[1][1].attn.temperature, torch.full((2, 1, 1), 16**-0.5))
    rates = [m.drop_prob for m in L2ViT(**SMALL, drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"no weights were ever published.*checkpoint_path"):
        timm.create_model("l2vit_tiny", pretrained=True)
    with pytest.raises(ValueError, match=r"no .*published"):
        linvision.create_model("L2ViT_Tiny", pretrained=True)
    with pytest.raises(ValueError, match="window_size=0"):
        L2ViT(**SMALL, window_size=0)
    with pytest.raises(ValueError, match="heads do not divide"):
        L2ViT((1,), (10,), num_heads=(3,))
    with pytest.raises(ValueError, match=r"got \(1, 1, 64, 64\)"):
        L2ViT(**SMALL)(torch.randn(1, 1, 64, 64))


def test_another_models_file_is_refused(tmp_path):
    torch.save(linvision.create_model("vil2_mini_patch4_32").state_dict(), tmp_path / "vil.pth")
    with pytest.raises(CheckpointError, match="does not fit L2ViT"):
        linvision.create_model("l2vit_tiny", checkpoint_path=tmp_path / "vil.pth")
