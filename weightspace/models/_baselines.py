"""Baselines that read the flattened weights or their statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import RunError
from weightspace.spec import Weights, WeightSpec

LEAST_LOG_PROBABILITY = -30.0  # finite, so that the loss of an unseen class stays a number
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def perceptron(
    in_features: int, hidden: Sequence[int], out_features: int, *, dropout: float = 0.0
) -> nn.Sequential:
    """Linear, BatchNorm, ReLU and dropout per hidden layer, then a linear layer."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(in_features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))


class FlatMLP(nn.Module):
    """An MLP on the flattened weights: blind to every symmetry, and the field's first baseline.

    Args:
        spec: the weight space.
        out_features: size of the output.
        hidden: units per hidden layer.
        dropout: after each hidden layer.

    Shapes:
        Weights with one batch axis -> (batch, out_features).
    """

    def __init__(
        self, spec: WeightSpec, out_features: int, *, hidden: Sequence[int] = (512, 512), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        self.network = perceptron(spec.num_parameters, hidden, out_features, dropout=dropout)

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        out: Tensor = self.network(self.spec.flatten(weights))
        return out


def statistics(spec: WeightSpec, weights: Mapping[str, Tensor]) -> Float[Tensor, "*batch features"]:
    """Per tensor: mean, variance, and the quantiles 0, 25, 50, 75 and 100 %.

    Invariant to permutations. Tensors with one element give their value alone.

    Reference:
        Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights", arXiv:2002.11448, section 4.

    Example:
        >>> spec = WeightSpec.mlp([2, 3, 1])
        >>> statistics(spec, spec.unflatten(torch.arange(13.0))).shape
        torch.Size([22])
    """
    batch = spec.batch_shape(weights)
    parts = []
    for name, tensor in spec.tensors.items():
        flat = weights[name].reshape(*batch, tensor.numel)
        if tensor.numel == 1:
            parts.append(flat)
            continue
        levels = torch.tensor(QUANTILES, dtype=flat.dtype, device=flat.device)
        parts.append(torch.stack([flat.mean(-1), flat.var(-1, correction=0)], dim=-1))
        parts.append(torch.quantile(flat, levels, dim=-1).movedim(0, -1))
    return torch.cat(parts, dim=-1)


class StatisticsMLP(nn.Module):
    """An MLP on the statistics of each tensor.

    Shapes:
        Weights with one batch axis -> (batch, out_features).
    """

    def __init__(
        self, spec: WeightSpec, out_features: int, *, hidden: Sequence[int] = (256, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.spec = spec
        features = sum(1 if tensor.numel == 1 else 2 + len(QUANTILES) for tensor in spec.tensors.values())
        self.network = perceptron(features, hidden, out_features, dropout=dropout)

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        out: Tensor = self.network(statistics(self.spec, weights))
        return out


class StatisticsTrees(nn.Module):
    """Gradient-boosted trees (scikit-learn) on the statistics of each tensor; fitted once, without gradients.

    Args:
        spec: the weight space.
        out_features: number of classes.
        iterations: boosting rounds.
        learning_rate: of boosting.
        seed: of the trees.

    Shapes:
        Weights with one batch axis -> log-probabilities (batch, out_features).
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        *,
        iterations: int = 100,
        learning_rate: float = 0.1,
        seed: int = 0,
    ) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        super().__init__()
        self.spec, self.out_features = spec, out_features
        self.trees = HistGradientBoostingClassifier(
            max_iter=iterations, learning_rate=learning_rate, early_stopping=False, random_state=seed
        )

    def fit_once(self, weights: Weights, targets: Tensor) -> None:
        """Fit on the whole training split."""
        self.trees.fit(statistics(self.spec, weights).numpy(), targets.numpy())

    def forward(self, weights: Weights) -> Tensor:
        """Log-probabilities of every class, the least for classes that the training split lacks."""
        features = statistics(self.spec, weights)
        found = torch.from_numpy(self.trees.predict_proba(features.cpu().numpy())).float().log()
        out = torch.full((len(found), self.out_features), LEAST_LOG_PROBABILITY)
        out[:, torch.from_numpy(np.asarray(self.trees.classes_)).long()] = found
        return out.to(features.device)

    def save(self, path: Path) -> None:
        """Write the trees; skops stores no code, unlike pickle."""
        import skops.io

        skops.io.dump(self.trees, path)

    def load(self, path: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            RunError: the file is damaged, or holds types that are not those of scikit-learn's trees.
        """
        import skops.io

        trusted = ["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"]
        try:
            self.trees = skops.io.load(path, trusted=trusted)
        except Exception as error:  # a damaged archive fails in many ways
            raise RunError(f"run: {path} cannot be read ({type(error).__name__})") from None
