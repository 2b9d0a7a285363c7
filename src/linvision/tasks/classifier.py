"""Classification as a Lightning module: the loss of a batch, and the accuracies."""

from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchmetrics.classification import MulticlassAccuracy

from linvision.training.module import TrainingModule
from linvision.training.settings import Settings


class Classifier(TrainingModule):
    """Trains ``model`` on batches of (inputs, labels) by cross entropy, or as one binary decision a class.

    Logged for each epoch: train_loss, train_top1, val_loss, val_top1, val_top5 (accuracies as fractions; those of
    training are on the augmented images, mixed ones counted for the larger part).

    Args:
        model: (B, 3, H, W) inputs to (B, num_classes) logits.
        settings: how to train it.
        num_classes: number of labels.
        steps_per_epoch: batches in one epoch.
        class_weights: of each class in the loss, (num_classes,); None for equal ones.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        num_classes: int,
        steps_per_epoch: int,
        class_weights: Tensor | None = None,
    ):
        super().__init__(model, settings, steps_per_epoch=steps_per_epoch)
        self.num_classes = num_classes
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mixup = None
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(
                mixup_alpha=settings.mixup,
                cutmix_alpha=settings.cutmix,
                label_smoothing=settings.label_smoothing,
                num_classes=num_classes,
            )
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))

    def progress(self) -> str:
        """Say how the epoch goes so far, beside the loss."""
        return f"accuracy {float(self.train_top1.compute()):.1%}"

    class_weights: Tensor | None

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
            loss = self._loss(logits.float(), labels)
        else:
            inputs, targets = self.mixup(inputs, labels)
            logits = self.model(inputs)
            loss = self._loss(logits.float(), targets, smoothed=True)
            labels = targets.argmax(dim=1)
        self.train_top1.update(logits.detach(), labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(labels))
        self.log("train_top1", self.train_top1, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch of validation images."""
        inputs, labels = batch
        if not len(labels):
            return
        logits = self(inputs).float()
        self.val_top1.update(logits, labels)
        self.val_top5.update(logits, labels)
        self.log("val_loss", cross_entropy(logits, labels), batch_size=len(labels))
        self.log("val_top1", self.val_top1, batch_size=len(labels))
        self.log("val_top5", self.val_top5, batch_size=len(labels))

    def _loss(self, logits: Tensor, targets: Tensor, *, smoothed: bool = False) -> Tensor:
        """Compute the loss of logits (B, classes) for labels (B,) or shares of classes (B, classes)."""
        smoothing = 0.0 if smoothed else self.settings.label_smoothing
        if self.settings.loss == "cross-entropy":
            return cross_entropy(logits, targets, self.class_weights, label_smoothing=smoothing)
        if targets.ndim == 1:
            targets = one_hot(targets, self.num_classes).to(logits.dtype)
            targets = targets * (1 - smoothing) + smoothing / self.num_classes
        return binary_cross_entropy_with_logits(logits, targets, self.class_weights)
