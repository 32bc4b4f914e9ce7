"""How strongly hyperparameters and metrics go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from weightspace.zoo.pictures._summary import Summary, Variable


@dataclass(frozen=True)
class Association:
    """Of a hyperparameter with a metric.

    Args:
        value: Spearman's rho in [-1, 1] for numbers; for names the share of the variance of the metric's ranks that
            they explain, in [0, 1].
        ranked: whether it is the former.
    """

    value: float
    ranked: bool

    def __str__(self) -> str:
        if not self.ranked:
            return f"η² {self.value:.2f}"
        return f"{self.value:+.2f}".replace("-", "\u2212") if abs(self.value) >= 0.005 else "0.00"


def associate(variable: Variable, metric: np.ndarray) -> Association | None:
    """Between one hyperparameter and one metric, over the networks that have both.

    Returns:
        None where either is constant, or fewer than three networks have both.

    Example:
        >>> str(associate(Variable("width", np.arange(5.0)), np.arange(5.0) ** 2))
        '+1.00'
        >>> str(associate(Variable("optimizer", np.array([0.0, 0, 1, 1]), ("sgd", "adam")), np.array([1.0, 2, 3, 4])))
        'η² 0.80'
    """
    from scipy.stats import rankdata, spearmanr

    known = np.isfinite(variable.values) & np.isfinite(metric)
    values, metric = variable.values[known], metric[known]
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(metric) == 0:
        return None
    if not variable.choices:
        return Association(float(spearmanr(values, metric).statistic), True)
    ranks = rankdata(metric)
    means = np.zeros(len(values))
    for value in np.unique(values):
        means[values == value] = ranks[values == value].mean()
    return Association(float(means.var() / ranks.var()), False)


def associations(summary: Summary) -> dict[str, dict[str, Association | None]]:
    """Every size, hyperparameter and label that varies against every metric that does: variable, metric."""
    metrics: dict[str, Any] = {
        name: values
        for name, values in summary.metrics.items()
        if name != "epoch" and len(np.unique(values[np.isfinite(values)])) > 1
    }
    return {
        variable.name: {name: associate(variable, values) for name, values in metrics.items()}
        for variable in summary.variables
    }
