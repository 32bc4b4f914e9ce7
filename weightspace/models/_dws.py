"""Deep weight-space networks: equivariant layers, then an invariant head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models._equivariant import EquivariantLinear
from weightspace.models._orbits import Features, Orbits
from weightspace.models._pooling import check_pooling, pool
from weightspace.spec import Weights, WeightSpec


class OrbitNorm(nn.Module):
    """BatchNorm of every channel over the batch and all positions of its orbit type."""

    def __init__(self, orbits: Orbits, channels: int) -> None:
        super().__init__()
        self.orbits = orbits
        self.norms = nn.ModuleDict(
            {orbits.key(t): nn.BatchNorm2d(count * channels) for t, count in orbits.entries.items()}
        )

    def forward(self, features: Features) -> Features:
        """Normalise."""
        return {t: self._normalise(self.norms[self.orbits.key(t)], x) for t, x in features.items()}

    @staticmethod
    def _normalise(norm: nn.Module, x: Tensor) -> Tensor:
        # as an image in channels-last layout, which is how it lies in memory: five times as fast on a CPU
        image = x.reshape(len(x), -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        out: Tensor = norm(image)
        return out.permute(0, 2, 3, 1).reshape(x.shape)


class InvariantPool(nn.Module):
    """Pool every orbit type onto one vector: the features of the network as a whole.

    Invariant: ``layer(g . x) == layer(x)`` for all permutations g.
    """

    def __init__(self, orbits: Orbits, channels: int, pooling: Sequence[str] = ("mean", "max")) -> None:
        super().__init__()
        check_pooling(pooling)
        self.pooling = tuple(pooling)
        self.readings = {t: [r for r in orbits.readings(t) if not r.onto] for t in orbits.types}
        self.out_features = sum(
            count * channels * len(self.readings[t]) * (len(pooling) if t else 1)
            for t, count in orbits.entries.items()
        )

    def forward(self, features: Features) -> Tensor:
        """Features to (batch, out_features)."""
        found = (pool(features[t], t, readings, self.pooling) for t, readings in self.readings.items())
        return torch.cat([part for read in found for parts in read for part in parts], dim=-1)


class DWS(nn.Module):
    """A deep weight-space network for classification or regression of networks.

    ``layers`` equivariant layers, each followed by BatchNorm, ReLU and dropout, then an invariant pooling and an
    MLP head. Invariant: ``model(g . W) == model(W)`` for all permutations g of the spec.

    Args:
        spec: the weight space.
        out_features: size of the output, for instance the number of classes.
        hidden: channels per weight entry.
        layers: number of equivariant layers, at least 1.
        pooling: in the equivariant layers and the head; mean *and* max by default, as published.
        norm: ``"batch"`` or ``"none"``.
        dropout: probability with which a channel is dropped after each layer.
        head: hidden units of the head.

    Shapes:
        Weights with one batch axis -> (batch, out_features).

    Raises:
        SpecError: the spec has nested or repeated groups.
        ConfigError: an option out of range.

    Reference:
        Navon et al. 2023, "Equivariant Architectures for Learning in Deep Weight Spaces", arXiv:2301.12780.

    Example:
        >>> spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
        >>> model = DWS(spec, out_features=10, hidden=8, layers=2)
        >>> model(spec.unflatten(torch.randn(4, spec.num_parameters))).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        spec: WeightSpec,
        out_features: int,
        *,
        hidden: int = 32,
        layers: int = 4,
        pooling: Sequence[str] = ("mean", "max"),
        norm: str = "batch",
        dropout: float = 0.0,
        head: int = 128,
    ) -> None:
        super().__init__()
        if layers < 1 or hidden < 1 or not 0.0 <= dropout < 1.0:
            raise ConfigError(
                f"DWS: expected layers >= 1, hidden >= 1 and dropout in [0, 1), found {layers}, {hidden}, {dropout}"
            )
        if norm not in ("batch", "none"):
            raise ConfigError(f"norm: expected batch or none, found {norm!r}")
        self.orbits = Orbits(spec)
        self.blocks = nn.ModuleList()
        self.norms = nn.ModuleList()
        for index in range(layers):
            channels = 1 if index == 0 else hidden
            # a norm that follows subtracts the mean again, and with it any bias
            self.blocks.append(
                EquivariantLinear(self.orbits, channels, hidden, pooling=pooling, bias=norm == "none")
            )
            self.norms.append(OrbitNorm(self.orbits, hidden) if norm == "batch" else nn.Identity())
        self.dropout = nn.Dropout(dropout)
        self.pool = InvariantPool(self.orbits, hidden, pooling)
        self.head = nn.Sequential(
            nn.Linear(self.pool.out_features, head),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(head, out_features),
        )

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        features = self.orbits.gather(weights)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            features = norm(block(features))
            features = {t: self.dropout(torch.relu(x)) for t, x in features.items()}
        out: Tensor = self.head(self.pool(features))
        return out
