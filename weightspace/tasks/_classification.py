"""Classification: predict an integer label of each network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.tasks._figures import draw_confusion
from weightspace.tasks._registry import TASKS, Split, Task, TaskOptions

MOST_CLASSES = (10, 1000)  # so many per network of the training split and so many beside: more are no classes


class ClassificationOptions(TaskOptions):
    """Options of the task ``classification``."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")


@TASKS.register("classification")
class Classification(Task):
    """Cross-entropy with label smoothing, scored by accuracy."""

    monitor = "accuracy"
    settings = ClassificationOptions
    target: ClassVar[str | None] = "label"

    classes: int

    def __init__(self, classes: int, options: ClassificationOptions | None = None) -> None:
        self.classes, self.options = classes, options or ClassificationOptions()

    @classmethod
    def from_data(cls, train: Split, options: ClassificationOptions) -> Classification:
        """Classes 0 to the largest label of the whole zoo: a small training split may lack some.

        Raises:
            TaskError: targets that are no class numbers, far too large, or of one class only.
        """
        _check_class_numbers(train)
        tables = [population.labels for population in train.populations]
        known = [
            int(labels[train.target].max()) for labels in tables if train.target and train.target in labels
        ]
        classes = max(known, default=int(train.targets.max())) + 1
        if classes < 2:
            raise TaskError(f"task classification: target {train.target!r} has only one class")
        most = MOST_CLASSES[0] * len(train) + MOST_CLASSES[1]
        if classes > most:
            raise TaskError(
                f"task classification: target {train.target!r} is out of range: expected class numbers below {most:,} "
                f"for {len(train):,} networks to train on, found {classes - 1:,}"
            )
        return cls(classes, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: ClassificationOptions) -> Classification:
        """See :meth:`state`."""
        return cls(int(state["classes"]), options)

    @property
    def out_features(self) -> int:
        """One logit per class."""
        return self.classes

    def state(self) -> dict[str, Any]:
        """The number of classes."""
        return {"classes": self.classes}

    def targets(self, dataset: ZooDataset) -> Tensor:
        """Class numbers, which must be among those that training knows."""
        low, high = dataset.targets.min(), dataset.targets.max()
        if dataset.targets.is_floating_point() or int(low) < 0 or int(high) >= self.classes:
            raise TaskError(
                f"task classification: target {dataset.target!r} of split {dataset.split!r} should be in "
                f"0 .. {self.classes - 1}, the classes in training, found {low} .. {high}"
            )
        return dataset.targets

    def loss(self, readout: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Cross-entropy, also with shares of classes as augmentations make them; smoothed in training."""
        smoothing = self.options.label_smoothing if training else 0.0
        return cross_entropy(readout, targets, label_smoothing=smoothing)

    def scores(self, readout: Tensor, targets: Tensor) -> dict[str, float]:
        """Accuracy over networks, and cross-entropy."""
        from torchmetrics.functional.classification import multiclass_accuracy  # slow to import

        classes = targets.argmax(-1) if targets.ndim == 2 else targets  # of mixed networks the larger share
        accuracy = multiclass_accuracy(readout.argmax(-1), classes, self.classes, average="micro")
        return {"accuracy": float(accuracy), "loss": float(cross_entropy(readout, targets))}

    def predictions(self, readout: Tensor) -> dict[str, Tensor]:
        """The likeliest class, and the probability of each."""
        probabilities = readout.softmax(-1)
        columns = {f"probability_{at}": probabilities[:, at] for at in range(self.classes)}
        return {"prediction": readout.argmax(-1), **columns}

    def figure(
        self, readout: Tensor, targets: Tensor, path: Path, title: str, *, reference: Tensor | None = None
    ) -> None:
        """The confusion matrix."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        counts = multiclass_confusion_matrix(readout.argmax(-1), targets, self.classes)
        draw_confusion(counts.cpu().numpy(), path, title)


def _check_class_numbers(train: Split) -> None:
    """Raise TaskError for targets that are negative or no integers."""
    targets = train.targets
    floating = targets.is_floating_point()
    if not floating and int(targets.min()) >= 0:
        return
    hint = "; store them as integers" if floating and torch.equal(targets, targets.round()) else ""
    raise TaskError(
        f"task classification: target {train.target!r} should hold class numbers 0, 1, ..., found {targets.dtype} "
        f"from {targets.min()}{hint}"
    )
