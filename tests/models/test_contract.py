"""timm's model contract over every registered name: small images, full-size models."""

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, split_model_name_tag

from linvision.errors import UnknownOptionError
from linvision.models import list_models, load_checkpoint

ARCHITECTURES = sorted({split_model_name_tag(name)[0] for name in list_models()})
# One of each family and generation is gone through at full depth; the others with a few layers of their full width.
REPRESENTATIVES = [
    name
    for name in ARCHITECTURES
    if "mini" in name or (("tiny" in name) and "stride8" not in name and "plus" not in name)
]


def create(name: str, **options) -> torch.nn.Module:
    if name not in REPRESENTATIVES:
        options |= {"depths": (2, 2, 2, 2)} if name.startswith("l2vit") else {"depth": 2}
    return timm.create_model(name, **options)


def small_size(name: str) -> tuple[int, int]:
    return (8, 12) if "patch4" in name else (32, 48)


def small_images(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *small_size(name), generator=torch.Generator().manual_seed(0))


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {key: p for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_name_gives_logits_of_small_images(name):
    model = timm.create_model(name, num_classes=7).eval()
    with torch.inference_mode():
        logits = model(small_images(name, batch=1))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()
    assert get_pretrained_cfg(name).architecture == name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_belongs_to_a_layer_group(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(dict(model.named_parameters()))
    assert model.no_weight_decay() <= set(model.state_dict())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_head_and_classifier(name):
    torch.manual_seed(0)
    model = create(name, num_classes=5).eval()
    images = small_images(name)
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(features), model(images))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(pooled), model(images))
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), pooled)
    headless = create(name, num_classes=0).eval()
    assert headless(images).shape == (2, headless.head_hidden_size)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_feature_maps(name):
    torch.manual_seed(0)
    model = create(name).eval()
    images, (height, width) = small_images(name), small_size(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        infos = model.feature_info if isinstance(model.feature_info, list) else model.feature_info.info
        assert len(maps) == len(infos)
        for feature_map, info in zip(maps, infos, strict=True):
            step = info["reduction"]
            # Overlapping patches of 16 begin every 8 pixels, but the last one ends with the image.
            grid = [side // 8 - 1 if "stride8" in name else -(-side // step) for side in (height, width)]
            assert feature_map.shape == (2, info["num_chs"], *grid)
        torch.testing.assert_close(final, model.forward_features(images))
        last = model.forward_intermediates(images, indices=1, intermediates_only=True, stop_early=True)
        torch.testing.assert_close(last, maps[-1:])
        getter = create(name, features_only=True, out_indices=(0, -1)).eval()
        chosen = getter(images)
    assert [x.shape for x in chosen] == [maps[0].shape, maps[-1].shape]
    assert getter.feature_info.channels() == [maps[0].shape[1], maps[-1].shape[1]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(name):
    torch.manual_seed(0)
    model = create(name, num_classes=3).train()
    torch.nn.init.normal_(model.get_classifier().weight)
    images, gradients = small_images(name), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(1)
        model(images).square().sum().backward()
        missing = [key for key, p in trainable(model).items() if p.grad is None]
        assert missing == []
        gradients.append({key: p.grad.clone() for key, p in trainable(model).items()})
    scale = max(g.norm() for g in gradients[0].values())
    for key, gradient in gradients[0].items():
        assert (gradients[1][key] - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-3 * scale), key


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", [(16, 16), (64, 16), (48, 80)])
def test_sizes(name, size):
    model = create(name, num_classes=2).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, *size)).shape == (1, 2)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_state_dict_round_trip(name, tmp_path):
    torch.manual_seed(0)
    model = create(name, num_classes=4).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    again = create(name, num_classes=4).eval()
    load_checkpoint(again, tmp_path / "weights.pth")
    images = small_images(name)
    with torch.inference_mode():
        torch.testing.assert_close(again(images), model(images))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export(name):
    torch.manual_seed(0)
    model = create(name, num_classes=2).eval()
    images = small_images(name)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_channel_counts_and_unknown_options(name):
    model = create(name, in_chans=1, num_classes=2).eval()
    with torch.inference_mode():
        assert model(small_images(name)[:, :1]).shape == (2, 2)
    with pytest.raises(UnknownOptionError, match="did you mean num_classes"):
        create(name, num_clases=2)
