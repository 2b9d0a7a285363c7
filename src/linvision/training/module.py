"""What every task's Lightning module shares: the model that is kept, its moving average, optimiser and schedule."""

import math
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from linvision.errors import UsageError, did_you_mean
from linvision.training.settings import Settings

END_LR = 1e-6


class TrainingModule(pl.LightningModule):
    """Trains ``model`` as its settings say.

    A task's subclass defines ``training_step``, which logs "train_loss", and ``validation_step``.

    Args:
        model: what is trained.
        settings: how.
        steps_per_epoch: batches in one epoch.

    Raises:
        UsageError: ``settings.freeze`` names no parameter, or all.
    """

    def __init__(self, model: nn.Module, settings: Settings, *, steps_per_epoch: int):
        super().__init__()
        freeze(model, settings.freeze)
        self.model = model
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema else None

    @property
    def final_model(self) -> nn.Module:
        """The model that is measured and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def train(self, mode: bool = True) -> "TrainingModule":
        """Set the mode of all modules but frozen ones, whose statistics stay and which drop nothing."""
        super().train(mode)
        for module in self.model.modules():
            parameters = list(module.parameters())
            if mode and parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Run the model that is kept."""
        return self.final_model(x)

    def progress(self) -> str:
        """Say how the epoch goes so far, beside the loss."""
        return ""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average towards the new weights."""
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step)

    def configure_optimizers(self) -> Any:
        """Return the optimiser with the model's parameter groups, and its learning rate's course, step by step."""
        settings = self.settings
        optimizer = create_optimizer_v2(
            self.model,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        )
        total = settings.epochs * self.steps_per_epoch
        warmup = min(round(settings.warmup_epochs * self.steps_per_epoch), total // 2)
        end = min(END_LR / settings.lr, 1.0)
        # timm leaves layer decay to its own schedulers, as a factor in each group.
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]

        def course(scale: float):
            return lambda step: scale * cosine_with_warmup(step, total=total, warmup=warmup, end=end)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [course(scale) for scale in scales])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def freeze(model: nn.Module, patterns: str) -> None:
    """Freeze parameters by patterns of their names, separated by commas; "backbone" is all but the classifier.

    Raises:
        UsageError: a pattern fits no name, or nothing is left to train.
    """
    head = {id(parameter) for parameter in classifier_parameters(model)}
    named = dict(model.named_parameters())
    for pattern in filter(None, patterns.split(",")):
        names = [
            name
            for name, parameter in named.items()
            if (id(parameter) not in head if pattern == "backbone" else fnmatchcase(name, pattern))
        ]
        if not names:
            near = did_you_mean(pattern, named) or f"; its first is {next(iter(named))}"
            raise UsageError(f"--freeze {pattern}: no parameter of {type(model).__name__} has such a name{near}")
        for name in names:
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise UsageError(f"--freeze {patterns} leaves nothing to train")


def classifier_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model's classifier, as timm names it; none where there is no such thing."""
    get = getattr(model, "get_classifier", None)
    found = get() if get is not None else None
    parts = found if isinstance(found, tuple | list) else [found]
    return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]


def check_optimizer(name: str) -> None:
    """Raise UsageError unless timm has an optimiser of that name."""
    if name.lower() not in list_optimizers():
        raise UsageError(f"--opt {name}: timm has no such optimiser{did_you_mean(name, map(str, list_optimizers()))}")


def cosine_with_warmup(step: int, *, total: int, warmup: int, end: float) -> float:
    """Return the factor on the peak learning rate: a linear rise in ``warmup`` steps, half a cosine to ``end``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))
