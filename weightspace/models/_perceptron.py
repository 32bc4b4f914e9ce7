"""The MLP with which metanetworks read features."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from weightspace.errors import ConfigError


def perceptron(
    in_features: int, hidden: Sequence[int], out_features: int, *, dropout: float = 0.0, norm: str = "batch"
) -> nn.Sequential:
    """Linear, BatchNorm (unless ``norm`` is ``"none"``), ReLU and dropout per hidden layer, then a linear layer.

    Raises:
        ConfigError: a size below 1.
    """
    if min([out_features, *hidden]) < 1:
        raise ConfigError(
            "sizes: expected out_features and hidden units of at least 1, "
            f"found {out_features} and {', '.join(map(str, hidden)) or 'none'}"
        )
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(in_features, width))
        layers += [nn.BatchNorm1d(width)] if norm == "batch" else []
        layers += [nn.ReLU(), nn.Dropout(dropout)]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, out_features))
