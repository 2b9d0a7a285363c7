"""Classification: loss, metrics, optimiser and schedule as a Lightning module."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from linvision.tasks.options import Recipe

END_LR = 1e-6


class Classifier(pl.LightningModule):
    """Trains ``model`` on batches of (inputs, labels) by cross entropy.

    Logged for each epoch: train_loss, train_top1, test_loss, test_top1, test_top5 (accuracies as fractions; those of
    training are on the augmented images, mixed ones counted for the larger part).

    Args:
        model: (B, 3, H, W) inputs to (B, num_classes) logits.
        recipe: how to train it.
        num_classes: number of labels.
        steps_per_epoch: batches in one epoch.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, *, num_classes: int, steps_per_epoch: int):
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.steps_per_epoch = steps_per_epoch
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.test_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.test_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    @property
    def final_model(self) -> nn.Module:
        """The model that is measured and kept: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def forward(self, x: Tensor) -> Tensor:
        """Classify with the model that is kept."""
        return self.final_model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Return the loss of a batch; an empty one (no file of it could be read) is passed over."""
        inputs, labels = batch
        if self.mixup is not None:
            even = len(labels) // 2 * 2
            inputs, labels = inputs[:even], labels[:even]
        if not len(labels):
            return None
        if self.mixup is None:
            logits = self.model(inputs)
            loss = cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        else:
            inputs, targets = self.mixup(inputs, labels)
            logits = self.model(inputs)
            loss = cross_entropy(logits.float(), targets)
            labels = targets.argmax(dim=1)
        self.train_top1.update(logits.detach(), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("train_top1", self.train_top1, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Move the average towards the new weights."""
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch of test images."""
        inputs, labels = batch
        if not len(labels):
            return
        logits = self(inputs).float()
        self.test_top1.update(logits, labels)
        self.test_top5.update(logits, labels)
        self.log("test_loss", cross_entropy(logits, labels), batch_size=len(labels))
        self.log("test_top1", self.test_top1, batch_size=len(labels))
        self.log("test_top5", self.test_top5, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """Return AdamW with the model's parameter groups, and its learning rate's course, step by step."""
        recipe = self.recipe
        optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        )
        total = recipe.epochs * self.steps_per_epoch
        warmup = min(round(recipe.warmup_epochs * self.steps_per_epoch), total // 2)
        end = min(END_LR / recipe.lr, 1.0)
        # timm leaves layer decay to its own schedulers, as a factor in each group.
        scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]

        def course(scale: float):
            return lambda step: scale * cosine_with_warmup(step, total=total, warmup=warmup, end=end)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [course(scale) for scale in scales])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cosine_with_warmup(step: int, *, total: int, warmup: int, end: float) -> float:
    """Return the factor on the peak learning rate: a linear rise in ``warmup`` steps, half a cosine to ``end``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done))
