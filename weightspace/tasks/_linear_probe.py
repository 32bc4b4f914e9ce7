"""What a linear model can read from embeddings: the usual score of representations learned without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from weightspace.errors import TaskError

PENALTIES = tuple(10.0**power for power in range(-5, 3))
ITERATIONS = 500  # of L-BFGS for one penalty; the validation split judges what was reached


@dataclass(frozen=True)
class LinearProbe:
    """A linear map of standardised features: to logits of classes, or to one number.

    Args:
        mean: of each feature in training.
        std: their standard deviations; 1 where all values are equal.
        weight: (features, outputs).
        bias: (outputs,).
        penalty: strength of the L2 penalty that the validation split chose.

    Reference:
        Alain and Bengio 2017, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644.

    Example:
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> probe = LinearProbe.fit((x, 3 * x[:, 0] + 1), (x, 3 * x[:, 0] + 1))
        >>> bool(torch.isclose(probe(torch.tensor([[0.5]])), torch.tensor(2.5), atol=1e-3))
        True
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    @classmethod
    def fit(
        cls,
        train: tuple[Float[Tensor, "train features"], Shaped[Tensor, " train"]],
        val: tuple[Float[Tensor, "val features"], Shaped[Tensor, " val"]],
        *,
        classes: int | None = None,
        penalties: Sequence[float] = PENALTIES,
    ) -> LinearProbe:
        """Ridge regression on numbers, or multinomial logistic regression on class numbers, in float64 on the CPU.

        Both minimise ``mean loss + penalty / 2 |weight|^2`` on the training split, where the loss is half the squared
        error or the cross-entropy, once for each penalty; the one with the smallest loss on the validation split is
        kept.

        Args:
            train: features and targets: numbers, or class numbers below ``classes``.
            val: likewise.
            classes: how many there are; None for ridge regression.
            penalties: to choose from.

        Raises:
            TaskError: features or targets that are not finite, or none.
        """
        for name, part in {"train": train, "val": val}.items():
            _check(name, *part)
        (features, y), (held_out, expected) = (
            (part[0].double().cpu(), part[1].cpu()) for part in (train, val)
        )
        mean = features.mean(0)
        # of equal values the deviation may be a rounding error, which is no scale
        std = torch.where((features == features[0]).all(0), 1.0, features.std(0, correction=0))
        x = (features - mean) / std
        maps = _ridge(x, y.double(), penalties) if classes is None else _logistic(x, y, classes, penalties)
        probes = [cls(mean, std, *found, penalty) for found, penalty in zip(maps, penalties, strict=True)]
        losses = [_loss(probe._double(held_out), expected, classes) for probe in probes]
        return probes[int(np.argmin(losses))]

    def __call__(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, "batch outputs"]:
        """Logits of classes, or one number, (batch, outputs) float32 on the CPU."""
        return self._double(features.double().cpu()).float()

    def _double(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std @ self.weight + self.bias


def _check(name: str, features: Tensor, targets: Tensor) -> None:
    """Raise TaskError for what no probe can be fitted to, or chosen by."""
    if not len(features):
        raise TaskError(f"linear probe: expected features for {name}, found none")
    for what, values in {"features": features, "targets": targets}.items():
        bad = ~values.isfinite().reshape(len(values), -1).all(-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise TaskError(f"linear probe: row {row} of the {what} for {name} is NaN or infinite")


def _ridge(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases; all penalties share one decomposition."""
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    projected = left.T @ (y - y.mean())
    shrunk = [singular / (singular**2 + penalty * len(x)) * projected for penalty in penalties]
    return [((right.T @ values)[:, None], y.mean()[None]) for values in shrunk]


def _logistic(x: Tensor, y: Tensor, classes: int, penalties: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases, from the strongest penalty to the weakest: each fit starts from the one before."""
    from scipy.optimize import minimize  # slow to import

    shares = one_hot(y.long(), classes).double()
    at = np.zeros((x.shape[1] + 1) * classes)
    found: dict[float, Tensor] = {}
    for penalty in sorted(penalties, reverse=True):
        options = {"maxiter": ITERATIONS, "gtol": 1e-5}
        fit = minimize(_cross_entropy, at, (x, shares, penalty), method="L-BFGS-B", jac=True, options=options)
        at = fit.x
        found[penalty] = torch.from_numpy(at).view(-1, classes)
    return [(found[penalty][:-1], found[penalty][-1]) for penalty in penalties]


def _cross_entropy(flat: np.ndarray, x: Tensor, shares: Tensor, penalty: float) -> tuple[float, np.ndarray]:
    """Mean cross-entropy with its penalty, and the gradient."""
    values = torch.from_numpy(flat).view(-1, shares.shape[1])
    logs = (x @ values[:-1] + values[-1]).log_softmax(-1)
    errors = (logs.exp() - shares) / len(x)
    gradient = torch.cat([x.T @ errors + penalty * values[:-1], errors.sum(0, keepdim=True)])
    loss = -(logs * shares).sum() / len(x) + 0.5 * penalty * values[:-1].square().sum()
    return float(loss), gradient.flatten().numpy()


def _loss(outputs: Tensor, targets: Tensor, classes: int | None) -> float:
    if classes is None:
        return float(mse_loss(outputs[:, 0], targets.double()))
    return float(cross_entropy(outputs, targets.long()))
