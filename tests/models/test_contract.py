"""timm's model contract: deeply at small sizes of every family, and over every listed name without memory.

Nothing is guessed from a name: sizes come from a model's own description, so that a new family is tested by itself.
"""

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import linvision
from linvision.errors import UnknownOptionError
from linvision.models import load_checkpoint
from linvision.ops import use_backend
from tests.models.sizes import LISTED, TEST_SIZES

# The call that timm's, DeiT's and Vim's training scripts make for every model.
SCRIPT = {
    "pretrained": False,
    "in_chans": 3,
    "num_classes": 10,
    "drop_rate": 0.0,
    "drop_path_rate": None,
    "drop_block_rate": None,
    "global_pool": None,
    "bn_momentum": None,
    "bn_eps": None,
    "scriptable": False,
    "checkpoint_path": "",
}


def image_size(name: str) -> tuple[int, int]:
    """Return a size that is not square: half of the model's own, and that itself."""
    _, height, width = get_pretrained_cfg(name).input_size
    return height // 2, width


def images(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *image_size(name), generator=torch.Generator().manual_seed(0))


def infos(model: nn.Module) -> list[dict]:
    return model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=TEST_SIZES)
def name(request) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("listed", [*TEST_SIZES, *LISTED])
def test_names_give_logits_maps_and_layer_groups(listed):
    with torch.device("meta"), torch.inference_mode():
        model = timm.create_model(listed, num_classes=7).eval()
        batch = torch.empty(1, 3, *image_size(listed))
        assert model(batch).shape == (1, 7)
        check_maps(model, model.forward_intermediates(batch, intermediates_only=True), image_size(listed))
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(dict(model.named_parameters()))
    assert model.no_weight_decay() <= set(model.state_dict())
    assert get_pretrained_cfg(listed).architecture == listed


def check_maps(model: nn.Module, maps: list[torch.Tensor], size: tuple[int, int]) -> None:
    assert len(maps) == len(infos(model))
    for feature_map, info in zip(maps, infos(model), strict=True):
        step = info["reduction"]
        assert feature_map.shape[1] == info["num_chs"]
        for side, cells in zip(size, feature_map.shape[2:], strict=True):
            # Overlapping patches begin every ``step`` pixels, but the last one ends with the image.
            assert -(-side // step) - cells in ((0, 1) if "patch_embed" in dict(model.named_children()) else (0,))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("listed", LISTED)
def test_full_size_models_compute(listed):
    model = timm.create_model(listed, num_classes=7).eval()
    with torch.inference_mode():
        logits = model(images(listed, batch=1))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


def test_features_head_and_classifier(name):
    model, batch = timm.create_model(name, num_classes=5).eval(), images(name)
    with torch.no_grad():
        features = model.forward_features(batch)
        torch.testing.assert_close(model.forward_head(features), model(batch))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(pooled), model(batch))
        model.reset_classifier(3)
        assert model(batch).shape == (2, 3)
        model.reset_classifier(0)
        torch.testing.assert_close(model(batch), pooled)
    headless = timm.create_model(name, num_classes=0).eval()
    assert headless(batch).shape == (2, headless.head_hidden_size)


def test_feature_maps(name):
    model, batch = timm.create_model(name).eval(), images(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(batch)
        check_maps(model, maps, image_size(name))
        torch.testing.assert_close(final, model.forward_features(batch))
        last = model.forward_intermediates(batch, indices=1, intermediates_only=True, stop_early=True)
        torch.testing.assert_close(last, maps[-1:])
        getter = timm.create_model(name, features_only=True, out_indices=(0, -1)).eval()
        chosen = getter(batch)
    assert [x.shape for x in chosen] == [maps[0].shape, maps[-1].shape]
    assert getter.feature_info.channels() == [maps[0].shape[1], maps[-1].shape[1]]


def test_feature_maps_with_channels_last(name):
    if name == "test_deit3":
        pytest.skip("timm's ViT has maps (B, C, H, W) alone")
    model, batch = timm.create_model(name).eval(), images(name)
    with torch.no_grad():
        maps, last = (
            model.forward_intermediates(batch, output_fmt=x, intermediates_only=True) for x in ("NCHW", "NHWC")
        )
    torch.testing.assert_close([x.permute(0, 3, 1, 2) for x in last], maps)
    with pytest.raises(ValueError, match="'NCHW' or 'NHWC'"):
        model.forward_intermediates(batch, output_fmt="NLC")


def test_feature_maps_by_hooks(name):
    model = timm.create_model(name, features_only=True, feature_cls="hook", out_indices=(0, -1)).eval()
    with torch.no_grad():
        assert len(model(images(name))) == 2


def test_feature_extractors_take_weights(name, tmp_path):
    model, batch = timm.create_model(name).eval(), images(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    features = linvision.create_model(name, checkpoint_path=tmp_path / "weights.pth", features_only=True).eval()
    known = model.state_dict()
    own = {key.removeprefix("model."): x for key, x in features.state_dict().items()}
    assert all(key.startswith("norm") for key in own.keys() - known.keys())  # those of dense tasks
    assert all(torch.equal(x, known[key]) for key, x in own.items() if key in known)
    with torch.no_grad():
        expected = model.forward_intermediates(batch, indices=list(features.out_indices), intermediates_only=True)
        if not getattr(features, "norm", False):
            torch.testing.assert_close(features(batch), expected)


def test_the_call_of_training_scripts(name):
    model = timm.create_model(name, **SCRIPT)
    assert model(images(name)).shape == (2, 10)
    dropping = timm.create_model(name, drop_rate=0.9).train()
    nn.init.normal_(dropping.get_classifier().weight)
    assert not torch.equal(dropping(images(name)), dropping(images(name)))


def test_gradients_reach_every_parameter_and_checkpointing_changes_none(name):
    model = timm.create_model(name, num_classes=3).train()
    nn.init.normal_(model.get_classifier().weight)
    batch, gradients = images(name), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        model(batch).square().sum().backward()
        missing = [key for key, p in trainable(model).items() if p.grad is None]
        assert missing == []
        gradients.append({key: p.grad.clone() for key, p in trainable(model).items()})
    scale = max(g.norm() for g in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert (gradients[1][key] - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-3 * scale), key


@pytest.mark.parametrize("size", [(16, 16), (64, 16), (48, 80)])
def test_sizes(name, size):
    model = timm.create_model(name, num_classes=2).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, *size)).shape == (1, 2)


def test_state_dict_round_trip(name, tmp_path):
    model = timm.create_model(name, num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = timm.create_model(name, num_classes=4).eval()
    load_checkpoint(again, tmp_path / "weights.pth")
    with torch.inference_mode():
        torch.testing.assert_close(again(images(name)), model(images(name)))


def test_export(name):
    model, batch = timm.create_model(name, num_classes=2).eval(), images(name)
    with torch.no_grad():
        program = torch.export.export(model, (batch,))
        torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-4)


def test_default_types(name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = timm.create_model(name)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_other_channel_counts_and_unknown_options(name):
    model = timm.create_model(name, in_chans=1, num_classes=2).eval()
    with torch.inference_mode():
        assert model(images(name)[:, :1]).shape == (2, 2)
    with pytest.raises(UnknownOptionError, match="did you mean num_classes"):
        timm.create_model(name, num_clases=2)


def test_first_convolutions_take_other_channel_counts_with_weights(name, tmp_path):
    source = timm.create_model(name)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    key = f"{source.pretrained_cfg['first_conv']}.weight"
    weight = source.state_dict()[key]
    for in_chans in (1, 2, 4, 8):
        model = linvision.create_model(name, checkpoint_path=tmp_path / "weights.pth", in_chans=in_chans)
        own = model.state_dict()[key]
        expected = (
            weight.sum(1, keepdim=True) if in_chans == 1 else weight.repeat(1, 3, 1, 1)[:, :in_chans] * 3 / in_chans
        )
        torch.testing.assert_close(own, expected)
        assert model(torch.randn(1, in_chans, 32, 32)).shape == (1, model.num_classes)


@pytest.mark.parametrize("backend", ["auto", "plain", "reference"])
def test_batches_without_images(name, backend):
    nothing = images(name, batch=0)
    model = timm.create_model(name, num_classes=7)
    with use_backend(backend):
        for mode in (False, True):
            logits = model.train(mode)(nothing)
            assert logits.shape == (0, 7)
            model.zero_grad()
            logits.sum().backward()
            assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
        with torch.no_grad():
            final, maps = model.eval().forward_intermediates(nothing)
            _, full = model.forward_intermediates(images(name))
        assert final.shape == model.forward_features(nothing).shape
        assert [x.shape[1:] for x in maps] == [x.shape[1:] for x in full]
        assert all(len(x) == 0 for x in maps)
    model.set_grad_checkpointing(True)
    assert model.train()(nothing).shape == (0, 7)


def busy(name: str, **options) -> nn.Module:
    """Make a model whose logits are not all but zero."""
    model = timm.create_model(name, num_classes=3, **options).eval()
    nn.init.normal_(model.get_classifier().weight)
    return model


def test_torch_fx_follows(name):
    model, batch = busy(name), images(name)
    _, nodes = get_graph_node_names(model)
    inner = [node for node in nodes if node.startswith(infos(model)[-1]["module"])][-1]
    extractor = create_feature_extractor(model, [inner, nodes[-1]])
    with torch.no_grad():
        torch.testing.assert_close(extractor(batch)[nodes[-1]], model(batch))
        larger = torch.randn(1, 3, 64, 48)
        torch.testing.assert_close(extractor(larger)[nodes[-1]], model(larger))


@pytest.mark.filterwarnings("ignore")
def test_torch_jit_traces_what_needs_none_of_our_operators(name):
    model, batch = busy(name), images(name)
    traced = torch.jit.trace(model, batch)
    assert "linvision::" not in str(traced.inlined_graph)
    with torch.no_grad():
        torch.testing.assert_close(traced(batch), model(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_torch_func_derives_as_backward_does(name):
    model, batch = busy(name), images(name)
    parameters = {key: p.detach() for key, p in trainable(model).items()}
    per_image = vmap(grad(lambda p, x: functional_call(model, p, (x[None],)).sum()), in_dims=(None, 0))
    gradients = per_image(parameters, batch)
    model(batch).sum().backward()
    scale = max(p.grad.norm() for p in trainable(model).values())
    for key, p in trainable(model).items():
        assert (gradients[key].sum(0) - p.grad).norm() <= 1e-4 * max(p.grad.norm(), 1e-2 * scale), key


@pytest.mark.parametrize("gradients", [False, True])
def test_forward_mode_is_right(name, gradients):
    if name == "test_deit3":
        pytest.skip("timm's attention is torch's kernel, which refuses forward-mode derivatives")
    model, batch = busy(name).double(), images(name).double()
    tangent = torch.randn_like(batch)
    with torch.set_grad_enabled(gradients):
        expected = (model(batch + 1e-5 * tangent) - model(batch - 1e-5 * tangent)) / 2e-5
        torch.testing.assert_close(jvp(model, (batch,), (tangent,))[1], expected, rtol=1e-5, atol=1e-5)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(batch, tangent)))
        torch.testing.assert_close(dual.tangent, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("training", [False, True])
def test_compiled_graphs_take_any_size(training):
    model = busy("test_l2vit").train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((64, 48), (96, 80)):  # of unequal sides, or a compiler takes them for one number
            batch = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(batch), model(batch))
