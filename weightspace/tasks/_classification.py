"""Classification: predict an integer label of each network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.tasks._figures import draw_confusion
from weightspace.tasks._registry import TASKS, Task


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy with label smoothing, scored by accuracy."""

    monitor = "accuracy"

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    @classmethod
    def from_data(cls, train: ZooDataset, settings: Mapping[str, Any]) -> Classification:
        """Classes 0 to the largest label of the whole zoo: a small training split may lack some.

        Raises:
            TaskError: targets that are no class numbers, or of one class only.
        """
        if train.targets.is_floating_point() or int(train.targets.min()) < 0:
            raise TaskError(
                f"task classification: target {train.target!r} should hold class numbers 0, 1, ..., "
                f"found {train.targets.dtype} from {train.targets.min()}"
            )
        known = train.population.labels.get(train.target)
        classes = int(train.targets.max() if known is None else known.max()) + 1
        if classes < 2:
            raise TaskError(f"task classification: target {train.target!r} has only one class")
        return cls(classes, float(settings.get("label_smoothing", 0.0)))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Classification:
        """See :meth:`state`."""
        return cls(int(state["classes"]), float(state["label_smoothing"]))

    @property
    def out_features(self) -> int:
        """One logit per class."""
        return self.classes

    def state(self) -> dict[str, Any]:
        """The number of classes, and the smoothing."""
        return {"classes": self.classes, "label_smoothing": self.label_smoothing}

    def check(self, dataset: ZooDataset) -> None:
        """Labels must be classes that training knows."""
        low, high = dataset.targets.min(), dataset.targets.max()
        if dataset.targets.is_floating_point() or int(low) < 0 or int(high) >= self.classes:
            raise TaskError(
                f"task classification: target {dataset.target!r} of split {dataset.split!r} should be in "
                f"0 .. {self.classes - 1}, the classes in training, found {low} .. {high}"
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
