"""Classification: predict an integer label of each network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.tasks._figures import draw_confusion
from weightspace.tasks._registry import Task, register


@register("classification")
class Classification(Task):
    """Cross-entropy with label smoothing, scored by accuracy."""

    monitor = "accuracy"

    def __init__(self, train: ZooDataset, settings: Mapping[str, Any]) -> None:
        super().__init__(train, settings)
        self.label_smoothing = float(settings.get("label_smoothing", 0.0))
        if "classes" in settings:
            self.classes = int(settings["classes"])
            return
        if train.targets.is_floating_point() or int(train.targets.min()) < 0:
            raise TaskError(
                f"task classification: target {train.target!r} should hold class numbers 0, 1, ..., "
                f"found {train.targets.dtype} from {train.targets.min()}"
            )
        self.classes = int(train.targets.max()) + 1
        if self.classes < 2:
            raise TaskError(f"task classification: target {train.target!r} has only one class")

    @property
    def out_features(self) -> int:
        """One logit per class."""
        return self.classes

    def state(self) -> dict[str, Any]:
        """The number of classes."""
        return {"classes": self.classes, "label_smoothing": self.label_smoothing}

    def check(self, dataset: ZooDataset) -> None:
        """Labels must be classes that training knows."""
        if dataset.targets.is_floating_point() or int(dataset.targets.max()) >= self.classes:
            raise TaskError(
                f"task classification: target {dataset.target!r} of split {dataset.split!r} should be below "
                f"{self.classes}, the number of classes in training, found {dataset.targets.max()}"
            )

    def loss(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Cross-entropy; smoothed in training."""
        return cross_entropy(outputs, targets, label_smoothing=self.label_smoothing if training else 0.0)

    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Accuracy over networks, and cross-entropy."""
        accuracy = multiclass_accuracy(outputs.argmax(-1), targets, self.classes, average="micro")
        return {"accuracy": float(accuracy), "loss": float(cross_entropy(outputs, targets))}

    def figure(self, outputs: Tensor, targets: Tensor, path: Path, title: str) -> None:
        """The confusion matrix."""
        counts = multiclass_confusion_matrix(outputs.argmax(-1), targets, self.classes)
        draw_confusion(counts.cpu().numpy(), path, title)

    def predict(self, outputs: Tensor) -> Tensor:
        """The most likely class."""
        return torch.argmax(outputs, dim=-1)
