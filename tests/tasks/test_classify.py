"""The classification task: parameter groups, schedule, loss."""

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from linvision import create_model
from linvision.commands.train import Options
from linvision.data import Preprocess, class_weights
from linvision.data.batches import ArrayBatches
from linvision.errors import UsageError
from linvision.recipes import load_recipe
from linvision.tasks.classifier import Classifier
from linvision.tasks.classify import class_shares
from linvision.tasks.opened import Mirrored
from linvision.training.module import check_optimizer, cosine_with_warmup
from linvision.training.settings import Settings

MINI = "vil2_mini_patch4_32"


def classifier(model: nn.Module | None = None, **recipe) -> Classifier:
    model = model or create_model(MINI, num_classes=4, img_size=8)
    settings = {"img_size": 8, "epochs": 4, "batch_size": 4, "lr": 1e-2, "warmup_epochs": 1.0, **recipe}
    module = Classifier(model, Settings(model=MINI, **settings), num_classes=4, steps_per_epoch=5)
    module.log = lambda name, value, **options: None
    return module


def counted(metric: MulticlassAccuracy) -> int:
    """Count the images that a metric has seen."""
    return int((metric.tp + metric.fn).sum())


def test_vectors_and_exempt_parameters_have_no_weight_decay():
    module = classifier(weight_decay=0.3)
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        exempt = parameter.ndim == 1 or name in module.model.no_weight_decay()
        assert decay[id(parameter)] == (0 if exempt else 0.3), name


def test_layer_decay_lowers_the_rate_of_early_layers():
    module = classifier(layer_decay=0.5, warmup_epochs=0.0)
    configured = module.configure_optimizers()
    rates = {id(p): group["lr"] for group in configured["optimizer"].param_groups for p in group["params"]}
    model = module.model
    assert rates[id(model.head.weight)] == pytest.approx(1e-2)
    first, second = (next(model.blocks[index].parameters()) for index in (0, 1))
    assert rates[id(first)] == pytest.approx(rates[id(second)] / 2)
    assert rates[id(model.patch_embed.proj.weight)] < rates[id(first)]


def test_learning_rate_rises_and_follows_a_cosine_step_by_step():
    module = classifier()
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([1e-2 * step / 6 for step in range(1, 6)])
    assert max(rates) == rates[5] == pytest.approx(1e-2)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)


def test_cosine_is_halfway_in_the_middle():
    assert cosine_with_warmup(60, total=110, warmup=10, end=0.2) == pytest.approx(0.6)
    assert cosine_with_warmup(999, total=110, warmup=10, end=0.2) == pytest.approx(0.2)
    assert cosine_with_warmup(0, total=1, warmup=0, end=0.0) == 1


def test_loss_is_smoothed_cross_entropy():
    module = classifier(nn.Flatten(), label_smoothing=0.4)
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    loss = module.training_step((logits, torch.tensor([1])), 0)
    log_p = logits.log_softmax(dim=1)[0]
    expected = -(0.1 * log_p).sum() - 0.6 * log_p[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_binary_cross_entropy_decides_class_by_class(mixup):
    module = classifier(nn.Flatten(), label_smoothing=0.4, loss="bce", mixup=mixup)
    logits, labels = torch.tensor([[1.0, 2.0, -1.0, 0.5]]).repeat(2, 1), torch.tensor([1, 1])
    loss = module.training_step((logits[:, :, None, None].expand(-1, -1, 1, 1), labels), 0)
    targets = torch.tensor([[0.1, 0.7, 0.1, 0.1]]).expand(2, -1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_optimisers_are_timms_by_name():
    assert type(classifier(opt="lamb").configure_optimizers()["optimizer"]).__name__ == "Lamb"
    check_optimizer("lamb")
    with pytest.raises(UsageError, match=r"--opt adamv: timm has no such optimiser; did you mean adam"):
        check_optimizer("adamv")


def test_mixup_blends_inputs_and_targets_and_takes_odd_batches():
    module = classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), mixup=0.8, cutmix=1.0)
    pl.seed_everything(0, verbose=False)
    inputs, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    assert math.isfinite(module.training_step((inputs, labels), 0).item())
    assert counted(module.train_top1) == 4


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_an_empty_batch_is_passed_over(mixup):
    module = classifier(nn.Flatten(), mixup=mixup)
    assert module.training_step((torch.empty(0), torch.empty(0, dtype=torch.long)), 0) is None
    module.validation_step((torch.empty(0), torch.empty(0, dtype=torch.long)), 0)
    assert counted(module.val_top1) == 0


def test_recipes_name_every_data_set_and_options_override_them():
    digits = load_recipe("digits").settings
    assert Options(data="digits").settings() == digits
    settings = Options(data="digits", lr=0.5, mixup=0.0, batch_size=7).settings()
    assert (settings.lr, settings.batch_size, settings.epochs) == (0.5, 7, digits.epochs)
    assert Options(data="elsewhere").settings().model == "vil2_tiny_patch16_224"
    assert Options(recipe="mnist").resolved().data == "mnist"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs 0 is out of range: it must be at least 1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": float("inf")}, "--lr inf"),
        ({"weight_decay": -1.0}, "--weight-decay -1.0"),
        ({"drop_path": 1.0}, "at least 0 and below 1"),
        ({"layer_decay": 0.0}, "--layer-decay"),
        ({"seed": -1}, "--seed -1"),
        ({"workers": -1}, "--workers"),
        ({"pretrained": True, "checkpoint": "a"}, "exclude each other"),
        ({"drop_head": True}, "needs --checkpoint"),
        ({"mixup": 0.2, "batch_size": 5}, "must be even"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(UsageError, match=message):
        Options(**values).resolved().settings()


def test_class_weights_make_all_classes_count_alike():
    labels = torch.tensor([0, 0, 0, 2])
    weights = class_weights(labels, 4)
    assert weights[labels].mean() == 1
    assert 3 * weights[0] == weights[2]


def test_sampling_draws_rare_classes_as_often():
    images = torch.zeros(400, 1, 4, 4, dtype=torch.uint8)
    labels = (torch.arange(400) >= 360).long()
    how = Preprocess(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3)
    batches = ArrayBatches(images, labels, preprocess=how, batch_size=100, seed=0, balanced=True)
    drawn = torch.cat([labels for _, labels in batches])
    assert len(drawn) == 400
    assert 0.4 < drawn.float().mean() < 0.6


def test_precision_recall_and_f1():
    precision, recall, f1 = class_shares(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]))
    assert precision.tolist() == pytest.approx([1, 2 / 3, 0])
    assert recall.tolist() == pytest.approx([3 / 4, 1, 0])
    assert f1.tolist() == pytest.approx([6 / 7, 4 / 5, 0])


def test_outputs_for_an_image_and_its_mirror_are_averaged():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(2, 3, 2, 2)
    expected = (model(images) + model(images.flip(-1))) / 2
    assert torch.allclose(Mirrored(model)(images), expected)
