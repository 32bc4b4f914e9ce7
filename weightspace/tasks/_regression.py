"""Regression: predict a real number of each network, such as its accuracy or a hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from weightspace.datasets import ZooDataset
from weightspace.errors import TaskError
from weightspace.tasks._bootstrap import bootstrap_intervals
from weightspace.tasks._figures import draw_regression
from weightspace.tasks._registry import TASKS, Split, Task, TaskOptions

LEAST_PROBABILITY = 1e-3  # targets of 0 and 1 have infinite logits


class RegressionOptions(TaskOptions):
    """Options of the task ``regression``."""

    loss: Literal["mse", "bce"] = Field(
        "mse", description="mse: squared error; bce: binary cross-entropy of a sigmoid, for targets in [0, 1]"
    )
    standardise: bool = Field(
        True, description="with mse: bring the targets of the training split to mean 0 and deviation 1"
    )


@TASKS.register("regression")
class Regression(Task):
    """Squared error or binary cross-entropy of one number, scored by R2, Kendall's tau and mean absolute error.

    Args:
        mean: of the training targets, which the model does not have to learn; 0 for the loss ``bce``.
        std: their standard deviation; 1 for the loss ``bce``.
        options: of the task.
    """

    monitor = "r2"
    settings = RegressionOptions

    def __init__(self, mean: float, std: float, options: RegressionOptions | None = None) -> None:
        self.mean, self.std, self.options = mean, std, options or RegressionOptions()

    @classmethod
    def from_data(cls, train: Split, options: RegressionOptions) -> Regression:
        """Mean and deviation of the training targets.

        Raises:
            TaskError: all targets are equal, or the loss is ``bce`` and some are not in [0, 1].
        """
        values = train.targets.double()
        if values.min() == values.max():
            raise TaskError(
                f"task regression: target {train.target!r} is {float(values[0]):g} for all networks of split "
                f"{train.split!r}"
            )
        plain = options.loss == "bce" or not options.standardise
        mean, std = (0.0, 1.0) if plain else (float(values.mean()), float(values.std(correction=0)))
        return cls(mean, std, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any], options: RegressionOptions) -> Regression:
        """See :meth:`state`."""
        return cls(float(state["mean"]), float(state["std"]), options)

    @property
    def out_features(self) -> int:
        """One number."""
        return 1

    def state(self) -> dict[str, Any]:
        """Mean and deviation of the training targets."""
        return {"mean": self.mean, "std": self.std}

    def targets(self, dataset: ZooDataset) -> Tensor:
        """Standardised targets, (networks,) float32.

        Raises:
            TaskError: the loss is ``bce`` and a target is not in [0, 1].
        """
        low, high = float(dataset.targets.min()), float(dataset.targets.max())
        if self.options.loss == "bce" and not 0.0 <= low <= high <= 1.0:
            raise TaskError(
                f"task regression: the loss bce needs targets in [0, 1], found {low:g} .. {high:g} in target "
                f"{dataset.target!r} of split {dataset.split!r}"
            )
        return ((dataset.targets.double() - self.mean) / self.std).float()

    def loss(self, readout: Tensor, targets: Tensor, *, training: bool) -> Tensor:
        """Mean squared error of standardised targets, or binary cross-entropy."""
        compare = binary_cross_entropy_with_logits if self.options.loss == "bce" else mse_loss
        return compare(readout[:, 0], targets)

    def scores(self, readout: Tensor, targets: Tensor) -> dict[str, float]:
        """R2, Kendall's tau (b) and mean absolute error in units of the target, and the loss.

        In float64, R2 and tau of standardised values: a large mean would cancel the differences. With fewer than two
        networks, or equal predictions, R2 and tau may be NaN.
        """
        from scipy.stats import kendalltau  # slow to import, as is torchmetrics
        from torchmetrics.functional import mean_absolute_error, r2_score

        found, true = self._standard(readout).cpu(), targets.double().cpu()
        # torchmetrics compares all pairs: 0.93 s for 10,000 networks, scipy sorts, 0.002 s
        tau = kendalltau(found.numpy(), true.numpy()).statistic
        return {
            "r2": float(r2_score(found, true)) if len(true) > 1 else float("nan"),
            "kendall_tau": float(tau),
            "mean_absolute_error": self.std * float(mean_absolute_error(found, true)),
            "loss": float(self.loss(readout, targets, training=False)),
        }

    def intervals(self, readout: Tensor, targets: Tensor, unit: np.ndarray) -> dict[str, tuple[float, float]]:
        """95 % intervals of R2, Kendall's tau and the mean absolute error; units are drawn anew a thousand times."""
        found, true = self._standard(readout).cpu().numpy(), targets.double().cpu().numpy()
        intervals = bootstrap_intervals(found, true, unit)
        low, high = intervals.pop("mean_absolute_error")
        return {**intervals, "mean_absolute_error": (self.std * low, self.std * high)}

    def outputs_for(self, targets: Tensor) -> Tensor:
        """Standardised targets, or their logits."""
        if self.options.loss == "mse":
            return targets
        return torch.logit(targets, eps=LEAST_PROBABILITY)

    def predictions(self, readout: Tensor) -> dict[str, Tensor]:
        """The number, in units of the target."""
        return {"prediction": self._value(readout)}

    def figure(
        self, readout: Tensor, targets: Tensor, path: Path, title: str, *, reference: Tensor | None = None
    ) -> None:
        """Predicted against true values, and their ranks."""
        found, true = self._value(readout), self._undone(targets)
        draw_regression(found.cpu().numpy(), true.cpu().numpy(), path, title)

    def _value(self, readout: Tensor) -> Tensor:
        return self._undone(self._standard(readout))

    def _standard(self, readout: Tensor) -> Tensor:
        """Standardised predictions, (networks,) float64."""
        column = readout[:, 0].double()
        return column.sigmoid() if self.options.loss == "bce" else column

    def _undone(self, values: Tensor) -> Tensor:
        return (values.double() * self.std + self.mean).float()
