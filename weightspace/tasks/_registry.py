"""What a metanetwork can be trained for: one file per task, registered by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from weightspace.configuration import Registry, validated
from weightspace.datasets import Normalisation, PopulationsDataset, ZooDataset
from weightspace.errors import ConfigError, TaskError
from weightspace.spec import Weights, WeightSpec
from weightspace.tasks._metanetwork import Metanetwork

Split = ZooDataset | PopulationsDataset
"""The networks of a split: of one population, or of several."""

Outputs = Tensor | Weights
"""What a metanetwork gives: one vector per network, or weights."""


class TaskOptions(BaseModel):
    """Base of the options of a task: what ``--set task.NAME=VALUE`` sets."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(ABC):
    """A loss, scores and a figure; knows of the targets what it read from the training split.

    The loop around it is the same for all tasks: the metanetwork's outputs become a *readout*, a tensor that is
    compared with the targets. For most tasks these are the outputs themselves; a task whose metanetwork gives
    weights runs the networks here.

    Attributes:
        name: under which it is registered.
        monitor: the validation score that picks the best epoch; larger is better.
        settings: the model of its options.
        target: the label or metric that it predicts unless told otherwise; None where one has to be named.
        needs_target: whether it predicts a label or metric at all.
        classes: how many there are, where targets are class numbers; augmentations mix and smooth them then.
        reads_signals: whether readouts are signals that the networks represent, compared with others.
        copies: how often each network is in a batch, augmented anew each time; with more than one, networks that are
            scored are augmented, too, with draws that do not change from epoch to epoch.
        embeds: whether what it predicts is an embedding, to which evaluation can fit a linear probe.
        training: defaults of the training configuration that suit this task; they go over those of the model.
    """

    name: ClassVar[str]
    monitor: ClassVar[str]
    settings: ClassVar[type[TaskOptions]] = TaskOptions
    target: ClassVar[str | None] = None
    needs_target: ClassVar[bool] = True
    reads_signals: ClassVar[bool] = False
    copies: ClassVar[int] = 1
    embeds: ClassVar[bool] = False
    training: ClassVar[Mapping[str, Any]] = {}
    classes: int | None = None

    @classmethod
    @abstractmethod
    def from_data(cls, train: Split, options: Any) -> Task:
        """The task for a training split; ``options`` is an instance of ``settings``.

        Raises:
            TaskError: the training split does not suit the task.
        """

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any], options: Any) -> Task:
        """The task again from what :meth:`state` returned."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was read from the training split, as JSON."""

    @property
    @abstractmethod
    def out_features(self) -> int | None:
        """Size of the metanetwork's output; None for weights."""

    @abstractmethod
    def loss(self, readout: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Mean loss of a batch."""

    @abstractmethod
    def scores(self, readout: Tensor, targets: Tensor) -> dict[str, float]:
        """Metrics of a whole split."""

    @abstractmethod
    def figure(
        self, readout: Tensor, targets: Tensor, path: Path, title: str, *, reference: Tensor | None = None
    ) -> None:
        """Draw predictions against targets; ``reference`` is what :meth:`reference` returned."""

    # -- what most tasks leave as it is ----------------------------------------------------------------------

    def targets(self, dataset: ZooDataset) -> Tensor:
        """What the readouts of a split are compared with, (networks, ...).

        Raises:
            TaskError: the targets of the split do not suit the task.
        """
        return dataset.targets

    def assemble(
        self, model: nn.Module, normalisation: Normalisation | None, spec: WeightSpec
    ) -> Metanetwork:
        """The metanetwork around a model: raw weights in, outputs out."""
        return Metanetwork(model, normalisation)

    def readout(self, outputs: Outputs) -> Tensor:
        """What is compared with the targets, (batch, ...); gradients flow through it."""
        assert isinstance(outputs, Tensor)
        return outputs.float()

    def reference(self, dataset: ZooDataset) -> Tensor | None:
        """The readout of a trivial answer, which any model should beat; None if the task knows of none."""
        return None

    def intervals(self, readout: Tensor, targets: Tensor, unit: np.ndarray) -> dict[str, tuple[float, float]]:
        """95 % confidence intervals of some of the scores, by name; none for tasks that know of none.

        ``unit`` (networks,) says which of them belong together: checkpoints of a network, and networks of one item.
        """
        return {}

    def outputs_for(self, targets: Tensor) -> Tensor:
        """The outputs that would be right: what models without gradients are fitted to."""
        return targets

    def predictions(self, readout: Tensor) -> dict[str, Tensor]:
        """What a user reads: columns of a table by name, each (networks,).

        Raises:
            TaskError: the answers are no columns of a table.
        """
        raise TaskError(f"task {self.name}: its answers are no columns of a table")


TASKS: Registry[type[Task]] = Registry("task", "name")
"""The tasks that ``--task`` names; ``@TASKS.register("name")`` adds one."""


def task_options(name: str, options: Mapping[str, Any] | None = None) -> TaskOptions:
    """The validated options of a task.

    Raises:
        ConfigError: an unknown task or option, or a value out of range.
    """
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, found {name!r}")
    return validated(TASKS[name].settings, options or {}, ConfigError, "task.", f"unknown option of {name}")
