"""What a metanetwork can be trained for: one file per task, registered by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from weightspace.configuration import Registry
from weightspace.datasets import ZooDataset


class Task(ABC):
    """A loss, a score and figures; knows of the targets what it read from the training split.

    Attributes:
        name: under which it is registered.
        monitor: the validation score that picks the best epoch; larger is better.
    """

    name: ClassVar[str]
    monitor: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_data(cls, train: ZooDataset, settings: Mapping[str, Any]) -> Task:
        """The task for the targets of a training split."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any]) -> Task:
        """The task again from what :meth:`state` returned."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Size of the metanetwork's output."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was read from the training split and the settings, as JSON."""

    @abstractmethod
    def check(self, dataset: ZooDataset) -> None:
        """Raise TaskError when the targets of a split do not suit the task."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Mean loss of a batch."""

    @abstractmethod
    def scores(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics of a whole split."""

    @abstractmethod
    def figure(self, outputs: Tensor, targets: Tensor, path: Path, title: str) -> None:
        """Draw predictions against targets."""


TASKS: Registry[type[Task]] = Registry("task", "name")
"""The tasks that ``--task`` names; ``@TASKS.register("name")`` adds one."""
