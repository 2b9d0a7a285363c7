"""Vim: golden cases, release files, class tokens and tables, experiments, half precision, compile and export."""

import math

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

from linvision.errors import CheckpointError
from linvision.models.checkpoints import load_state_dict, load_weights
from linvision.models.vim.layers import MambaMixer, RotaryEmbedding
from linvision.models.vim.model import VisionMamba, class_rows, insert_rows, remove_rows, resize_positions
from linvision.models.vim.release import RELEASE
from linvision.models.vim.variants import (
    ALIASES,
    FUNCTION_ARGUMENTS,
    PUBLISHED,
    default_cfgs,
    from_published_arguments,
    published_options,
)
from tests import goldens

CLASS_TOKENS = ["middle", "first", "random", "double", "none"]


def small(**options) -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(
        **{"img_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "num_classes": 5, "d_state": 4} | options
    )


def golden_model(name: str, dtype: torch.dtype = torch.float64) -> tuple[VisionMamba, goldens.ModelCase]:
    case = goldens.load_model_case(name, dtype)
    model = from_published_arguments(**case.config).to(dtype).eval()
    model.load_state_dict(case.state_dict, strict=True)
    return model, case


def silence(model: VisionMamba) -> VisionMamba:
    """Let no layer put anything out, so that every token stays what it was."""
    for module in model.modules():
        if isinstance(module, MambaMixer):
            nn.init.zeros_(module.out_proj.weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", goldens.names("vim_"))
def test_golden(name, dtype):
    goldens.assert_model_case_matches(*golden_model(name, dtype))


def load(model: VisionMamba, path, **options) -> VisionMamba:
    load_weights(model, load_state_dict(path, **options), path.name, release=RELEASE)
    return model


def test_release_file():
    case = goldens.load_model_case("vim_classifier", torch.float32)
    path = goldens.FOLDER / "vim_classifier_release.pth"
    model = load(from_published_arguments(**case.config).eval(), path)
    assert goldens.relative_error(model(case.input), case.output) <= goldens.OUTPUT_BOUND[torch.float32]
    released = torch.load(path, weights_only=True)["model"]
    back = RELEASE.released(model.state_dict())["model"]
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in released)


def test_training_file_with_optimiser_arguments_prefixes_average_and_half_precision(tmp_path):
    model = small()
    weights = {f"module.{key}": x.half() for key, x in model.state_dict().items()}
    average = {key: x + 1 for key, x in model.state_dict().items()}
    content = {"model": weights, "model_ema": average, "optimizer": {"state": {}}, "args": {"lr": 1e-3}, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth")
    loaded = load(small(layer_scale=None), tmp_path / "checkpoint.pth")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)
    loaded = load(small(), tmp_path / "checkpoint.pth", ema=True)
    torch.testing.assert_close(loaded.state_dict(), average)
    headless = load(small(num_classes=0), tmp_path / "checkpoint.pth")
    torch.testing.assert_close(headless.pos_embed, model.pos_embed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
def test_table_of_another_grid_keeps_its_class_rows(class_token):
    # 197 rows and the like: a 14 x 14 grid and its class tokens, into 3 x 5.
    old, new = small(img_size=112, class_token=class_token), small(img_size=(24, 40), class_token=class_token)
    with torch.no_grad():
        old.pos_embed.zero_()
        for count, row in enumerate(class_rows(class_token, 196)):
            old.pos_embed[:, row] = count + 1.0
    load_weights(new, old.state_dict(), "file", release=RELEASE)
    rows = class_rows(class_token, 15)
    torch.testing.assert_close(new.pos_embed[:, rows, 0], torch.arange(1.0, len(rows) + 1)[None])
    assert (remove_rows(new.pos_embed, rows) == 0).all()
    assert len(rows) == {"none": 0, "double": 2}.get(class_token, 1)
    # Resized on loading, for good or at run time: one model.
    image = torch.randn(2, 3, 24, 40)
    nn.init.normal_(old.pos_embed)
    load_weights(new, old.state_dict(), "file", release=RELEASE)
    old.eval(), new.eval()
    torch.testing.assert_close(new(image), old(image))
    old.set_input_size((24, 40))
    assert old.pos_embed.shape == new.pos_embed.shape
    torch.testing.assert_close(old(image), new(image))


def test_a_table_that_fits_no_square_grid_is_refused():
    model = small()
    weights = model.state_dict() | {"pos_embed": torch.zeros(1, 20, 16)}
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 20, 16\) in the file, \(1, 17, 16\) in the model"):
        load_weights(model, weights, "file", release=RELEASE)


def test_rows_are_inserted_where_they_are_removed():
    patches, values = torch.randn(2, 6, 3), [torch.zeros(2, 1, 3), torch.ones(2, 1, 3)]
    for rows in ((0, 7), (0, 1), (2, 5), (6, 7)):
        x = insert_rows(patches, rows, values)
        torch.testing.assert_close(x[:, rows], torch.cat(values, dim=1))
        torch.testing.assert_close(remove_rows(x, rows), patches)
    assert resize_positions(patches, "none", (2, 3), (2, 3)) is patches


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize("size", [(32, 32), (16, 56), (8, 8), (72, 40)])
def test_any_size_that_the_patch_divides(class_token, size):
    for stride in (8, 4):
        model = small(class_token=class_token, stride=stride)
        images = torch.randn(2, 3, *size)
        assert model(images).shape == (2, 5)
        final, maps = model.eval().forward_intermediates(images, norm=True)
        rows, columns = ((side - 8) // stride + 1 for side in size)
        assert [tuple(x.shape) for x in maps] == 2 * [(2, 16, rows, columns)]
        patches = remove_rows(final, class_rows(class_token, rows * columns))
        torch.testing.assert_close(maps[-1].flatten(2).mT, patches)


def test_rotary_tables_follow_the_grid():
    rope = RotaryEmbedding(8, (2, 3), reference=14).double()
    rope.set_grid((2, 3))
    angles = torch.zeros(2, 3, 8, dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            for pair, frequency in enumerate((1.0, 10000 ** (-2 / 4))):
                angles[row, column, 2 * pair : 2 * pair + 2] = row / 2 * 14 * frequency
                angles[row, column, 4 + 2 * pair : 6 + 2 * pair] = column / 3 * 14 * frequency
    # The tables are float32 when they are built, as those of the checkpoints are.
    torch.testing.assert_close(rope.freqs_cos, angles.cos().flatten(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(rope.freqs_sin, angles.sin().flatten(0, 1), rtol=0, atol=1e-6)
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    other = RotaryEmbedding(8, (3, 4), reference=14).double()
    other.set_grid((3, 4))
    rotated = rope(x, (3, 4))
    torch.testing.assert_close(rotated, other(x, (3, 4)))
    torch.testing.assert_close(rotated[:, 0], x[:, 0])
    pairs = x.unflatten(-1, (4, 2)), rotated.unflatten(-1, (4, 2))
    torch.testing.assert_close(pairs[1].norm(dim=-1), pairs[0].norm(dim=-1))


@pytest.mark.parametrize("options", [{"rotary": "both", "class_token": "first"}, {"directions": "paired"}])
def test_checkpointing_and_other_grids_with_every_kind_of_carry(options):
    model, images, gradients = small(**options).double(), torch.randn(2, 3, 24, 48, dtype=torch.float64), []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    moved = small(**options, img_size=(24, 48)).double()
    load_weights(moved, model.state_dict(), "file", release=RELEASE)
    torch.testing.assert_close(moved(images), model(images))


def test_a_branch_from_the_end_runs_on_the_reversed_sequence():
    torch.manual_seed(0)
    options = {"d_state": 4, "halve": True, "layer_scale": None}
    forward, backward = (MambaMixer(16, directions=way, **options).double() for way in ("forward", "backward"))
    both, shared = (MambaMixer(16, directions=way, **options).double() for way in ("v2", "v1"))
    for mixer in (forward, backward, both, shared):
        mixer.initialise(depth=1)
    backward.load_state_dict(forward.state_dict())
    renamed = {key.replace(".", "_b.", 1): x for key, x in forward.state_dict().items() if "." in key}
    renamed |= {"A_b_log": forward.A_log, "D_b": forward.D} | forward.state_dict()
    both.load_state_dict({key: x for key, x in renamed.items() if key in both.state_dict()})
    tokens = torch.randn(2, 9, 16, dtype=torch.float64)
    reversed_run = forward(tokens.flip(1)).flip(1)
    torch.testing.assert_close(backward(tokens), reversed_run)
    torch.testing.assert_close(both(tokens), (forward(tokens) + reversed_run) / 2)
    both.halve = False
    torch.testing.assert_close(both(tokens), forward(tokens) + reversed_run)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in forward.parameters()) + 32 * 4


@pytest.mark.parametrize("experiment", [{"class_token": "random"}, {"shuffle_tokens": True}, {"flip_probability": 1.0}])
def test_experiments_move_tokens_in_training_and_bring_them_back(experiment):
    model = small(**experiment)
    images = torch.randn(2, 3, 32, 64)
    plain = model.eval().forward_features(images)
    torch.testing.assert_close(small().eval().forward_features(images), plain)
    seen = [model.train().forward_features(images) for _ in range(8)]
    assert any((x - plain).abs().max() > 1e-3 for x in seen)
    # Without layers nothing but the order could change the tokens, and nothing does.
    nn.init.zeros_(silence(model).pos_embed)
    kept = model.eval().forward_features(images)
    for _ in range(4):
        final, maps = model.train().forward_intermediates(images, norm=True)
        torch.testing.assert_close(final, kept)
        torch.testing.assert_close(maps[-1].flatten(2).mT, remove_rows(kept, class_rows("middle", 32)))


def test_a_flipped_sequence_ends_with_its_first_token():
    model = silence(small(class_token="none", global_pool="last", flip_probability=1.0))
    images = torch.randn(2, 3, 32, 32)
    tokens = model.eval().forward_features(images)
    torch.testing.assert_close(model(images), model.head(tokens[:, -1]))
    torch.testing.assert_close(model.train()(images), model.head(tokens[:, 0]))


@pytest.mark.parametrize("class_token", ["middle", "double", "none"])
def test_poolings(class_token):
    model = small(class_token=class_token).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    rows = class_rows(class_token, 16)
    patches = remove_rows(tokens, rows)
    if rows:
        assert model.global_pool == "token"
        torch.testing.assert_close(model(images), model.head(tokens[:, rows].mean(1)))
    for pooling, expected in {
        "avg": lambda: model.head(patches.mean(1)),
        "max": lambda: model.head(patches).amax(1),
        "last": lambda: model.head(tokens[:, -1]),
        "": lambda: model.head(tokens),
    }.items():
        model.reset_classifier(3, pooling)
        torch.testing.assert_close(model(images), expected())


def test_initialisation_follows_its_table():
    model = small(dim=64, depth=4, d_state=8)
    mixer = model.layers[1].mixer
    for A_log in (mixer.A_log, mixer.A_b_log):
        torch.testing.assert_close(A_log.exp(), torch.arange(1.0, 9.0).expand(128, 8))
    assert (mixer.D == 1).all()
    assert (mixer.D_b == 1).all()
    for dt_proj in (mixer.dt_proj, mixer.dt_proj_b):
        step = nn.functional.softplus(dt_proj.bias)
        assert 0.0009 < step.min() < 0.002
        assert 0.05 < step.max() < 0.101
        assert dt_proj.weight.abs().max() <= 4**-0.5
        assert dt_proj.weight.std().item() == pytest.approx(4**-0.5 / math.sqrt(3), rel=0.15)
    bounds = {mixer.out_proj.weight: 128**-0.5 / math.sqrt(4), mixer.in_proj.weight: 64**-0.5}
    for weight, bound in bounds.items():
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    stds = {model.head.weight: 0.02, model.pos_embed: 0.02, model.patch_embed.proj.weight: (3 * 64) ** -0.5}
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.15)
    assert (model.patch_embed.proj.bias == 0).all()
    assert (small(layer_scale=0.1).layers[0].mixer.gamma == 0.1).all()


def test_drop_path_is_shifted_by_one_layer():
    model = small(depth=4, drop_path_rate=0.3)
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx([0, 0, 0.1, 0.2])
    assert model.drop_path.drop_prob == pytest.approx(0.3)


def test_no_weight_decay():
    own = {"A_log", "A_b_log", "D", "D_b"}
    layers = {f"layers.{index}.mixer.{name}" for index in range(2) for name in own}
    assert small().no_weight_decay() == layers | {"cls_token", "pos_embed"}
    ends = {"cls_token_head", "cls_token_tail"}
    assert small(class_token="double", pos_embed=False).no_weight_decay() == layers | ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = small(dim=32, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = model(images)
    assert goldens.relative_error(under_autocast.float(), expected) < 0.05
    carry = model.to(dtype).advance(model.embed(images.to(dtype)), 0)
    assert carry.residual.dtype == torch.float32
    assert goldens.relative_error(model(images.to(dtype)).float(), expected) < 0.05


def test_training_in_bfloat16_learns_and_stays_finite():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[:128] / 8 - 1
    labels = torch.tensor(labels)[:128]
    model = small(img_size=8, patch_size=2, in_chans=1, dim=32, num_classes=10, drop_path_rate=0.1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(24):
        batch = slice(32 * (step % 4), 32 * (step % 4) + 32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize("options", [{}, {"class_token": "first", "rotary": "both"}, {"directions": "paired"}])
def test_compile_and_export(options):
    model = small(**options).eval()
    images = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        eager = model(images)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), eager, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.randn(3, 3, 24, 40)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-4)


def test_registered_models_have_the_published_sizes():
    counts = {
        "vim_tiny_patch16_224": 7.15,
        "vim_small_patch16_224": 25.80,
        "vim_small_patch16_stride8_224": 26.00,
        "vim_base_patch16_224": 98,
    }
    with torch.device("meta"):
        for name, millions in counts.items():
            model = timm.create_model(name, drop_path_rate=0.1)
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
            assert model.pretrained_cfg["crop_pct"] == 0.875
            assert model.pretrained_cfg["hf_hub_id"].startswith("hustvl/Vim-")


@pytest.mark.parametrize("alias", ALIASES)
def test_published_functions_have_registered_models(alias):
    name = ALIASES[alias]
    assert name in PUBLISHED
    arch, tag = name.split(".")
    assert tag in default_cfgs[arch].tags
    assert alias.startswith(arch)
    with torch.device("meta"):
        ours = timm.create_model(name)
        published = from_published_arguments(**FUNCTION_ARGUMENTS[alias])
    assert {k: x.shape for k, x in ours.state_dict().items()} == {k: x.shape for k, x in published.state_dict().items()}
    assert published.global_pool == ours.global_pool == "token"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, "height 30 is not a multiple of the patch size 8"),
        ({"class_token": "last"}, "class_token='last': VisionMamba knows 'middle', 'first'"),
        ({"directions": "v3"}, "directions='v3'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"rotary": True}, "rotary=True"),
        ({"rotary": "hidden"}, "rotary embedding needs every token at its place.*not 'middle'"),
        ({"rotary": "hidden", "class_token": "first", "shuffle_tokens": True}, "neither shuffle_tokens"),
        ({"rotary": "hidden", "class_token": "none", "dim": 18}, "a multiple of 4 but is 18"),
        ({"directions": "paired", "depth": 3}, "even depth but depth=3"),
        ({"global_pool": "mean"}, "global_pool='mean'"),
        ({"class_token": "none", "global_pool": "token"}, "needs a class token"),
        ({"flip_probability": 1.5}, "flip_probability=1.5"),
        ({"drop_path_rate": 1.5}, "drop_path_rate=1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final_pool_type": "median"}, "final_pool_type='median': use one of 'none', 'mean'"),
        ({"bimamba_type": "v3"}, "bimamba_type='v3'"),
        ({"if_bidirectional": True}, "it needs bimamba_type='none'"),
        ({"if_rope": True}, "rotary embedding needs every token"),
    ],
)
def test_bad_published_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_published_arguments(**arguments)
    with pytest.raises(TypeError, match="bimamba"):
        published_options(bimamba="v2")


def test_bad_images_are_named():
    model = small()
    with pytest.raises(ValueError, match="width 44 is not a multiple of the patch size 8: resize or pad it, to 48 say"):
        model(torch.randn(1, 3, 32, 44))
    with pytest.raises(ValueError, match=r"takes images of shape \(B, 3, H, W\) but got \(1, 1, 32, 32\).*in_chans=1"):
        model(torch.randn(1, 1, 32, 32))
