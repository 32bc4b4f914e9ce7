"""What all equivariant metanetworks share: an encoding, equivariant layers, and a head."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models._encoding import Encoding
from weightspace.models._equivariant import EquivariantLinear
from weightspace.models._orbits import Features, Orbits
from weightspace.models._perceptron import perceptron
from weightspace.models._pooling import check_pooling, pool
from weightspace.spec import Weights


class OrbitNorm(nn.Module):
    """BatchNorm of every channel over the batch and all positions of its orbit type.

    Equivariant, as mean and variance do not see the order of positions.

    Args:
        orbits: the layout of the features.
        channels: per weight entry.

    Shapes:
        features -> features. In training a batch needs two networks or more: a type without indices has one
        position per network, and no variance.
    """

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
        image = x.reshape(len(x), math.prod(x.shape[1:-1]), 1, x.shape[-1]).permute(0, 3, 1, 2)
        out: Tensor = norm(image)
        return out.permute(0, 2, 3, 1).reshape(x.shape)


class SetAttention(nn.Module):
    """Self-attention among the units of every orbit type that has one group.

    Equivariant, as the units are a set. Types of two and more groups are passed over: theirs would be attention
    among all weights of a matrix.

    Args:
        orbits: the layout of the features.
        in_channels: channels per weight entry on the way in.
        out_channels: channels per weight entry on the way out.
        heads: number of attention heads, at least 1, each of ``out_channels / heads`` channels.

    Shapes:
        features -> for each type of one group (batch, size, entries * out_channels), to be added to what an
        equivariant map gives.

    Raises:
        ConfigError: no head, or channels that the heads cannot share.

    Reference:
        Navon et al. 2023, arXiv:2301.12780, section 5 and appendix, put the set attention block of Lee et al. 2019,
        arXiv:1810.00825, in the place of the map within a group. This is its attention alone: the map stays, the
        result is added to it, there is no residual of the queries and no layer of its own behind it, and scores
        are divided by the root of a head's channels instead of the root of all channels.
    """

    def __init__(self, orbits: Orbits, in_channels: int, out_channels: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or out_channels % heads:
            raise ConfigError(f"attention: {out_channels} channels cannot be shared by {heads} heads")
        self.orbits, self.heads, self.size = orbits, heads, out_channels
        self.into = nn.ModuleDict()
        self.out = nn.ModuleDict()
        for t, count in orbits.entries.items():
            if len(t) == 1:
                self.into[orbits.key(t)] = nn.Linear(count * in_channels, 3 * out_channels)
                self.out[orbits.key(t)] = nn.Linear(out_channels, count * out_channels, bias=False)

    def forward(self, features: Features) -> Features:
        """What is to be added to each type of one group."""
        return {t: self._one(self.orbits.key(t), x) for t, x in features.items() if len(t) == 1}

    def _one(self, key: str, x: Tensor) -> Tensor:
        batch, units, _ = x.shape
        into = self.into[key](x).view(batch, units, 3, self.heads, self.size // self.heads)
        query, key_, value = into.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key_, value)
        out: Tensor = self.out[key](mixed.transpose(1, 2).reshape(batch, units, self.size))
        return out


class ChannelDropout(nn.Module):
    """Drop channels of some networks: a channel at all positions of its orbit type, or nowhere.

    Args:
        probability: with which a channel of a weight entry is dropped in training; the others are scaled up.

    Shapes:
        (batch, ..., channels) -> the same.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop."""
        if not self.training or self.probability == 0.0:
            return x
        kept = nn.functional.dropout(x.new_ones(len(x), x.shape[-1]), self.probability)
        return x * kept.view(len(x), *[1] * (x.ndim - 2), x.shape[-1])

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"p={self.probability}"


class EquivariantStack(nn.Module):
    """Weights to features: an encoding, then layers of an equivariant map, a norm, ReLU and dropout.

    Args:
        encoding: what makes the first features.
        hidden: channels per weight entry.
        layers: number of equivariant maps, at least 1.
        pooling: how groups are pooled in them.
        norm: ``"batch"`` or ``"none"``.
        dropout: probability with which a feature is dropped after each layer.
        drop_channels: whether features are dropped by channels, at all positions of a type at once.
        global_mixing: see :class:`EquivariantLinear`.
        attention: heads of the self-attention among units beside each map, :class:`SetAttention`; 0 for none.

    Shapes:
        Weights with one batch axis -> (batch, *group sizes, entries * hidden) per orbit type. Training on batches
        of one network needs ``norm="none"``.

    Raises:
        ConfigError: an option out of range.
    """

    def __init__(
        self,
        encoding: Encoding,
        *,
        hidden: int,
        layers: int,
        pooling: Sequence[str],
        norm: str = "none",
        dropout: float = 0.0,
        drop_channels: bool = False,
        global_mixing: str = "full",
        attention: int = 0,
    ) -> None:
        super().__init__()
        if layers < 1 or hidden < 1 or not 0.0 <= dropout < 1.0 or attention < 0:
            raise ConfigError(
                "equivariant layers: expected layers >= 1, hidden >= 1, dropout in [0, 1) and attention >= 0, "
                f"found {layers}, {hidden}, {dropout}, {attention}"
            )
        if norm not in ("batch", "none"):
            raise ConfigError(f"norm: expected batch or none, found {norm!r}")
        self.encoding = encoding
        orbits = self.orbits = encoding.orbits
        self.blocks, self.norms, self.attentions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for index in range(layers):
            channels = encoding.channels if index == 0 else hidden
            # a norm that follows subtracts the mean again, and with it a bias that is equal at all positions
            block = EquivariantLinear(
                orbits,
                channels,
                hidden,
                pooling=pooling,
                even_bias=norm == "none",
                global_mixing=global_mixing,
            )
            self.blocks.append(block)
            self.norms.append(OrbitNorm(orbits, hidden) if norm == "batch" else nn.Identity())
            if attention:
                self.attentions.append(SetAttention(orbits, channels, hidden, attention))
        self.dropout = ChannelDropout(dropout) if drop_channels else nn.Dropout(dropout)

    def forward(self, weights: Weights) -> Features:
        """Weights (batch, ...) to features (batch, *group sizes, entries * hidden)."""
        features: Features = self.encoding(weights)
        for index, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            mapped = block(features)
            if self.attentions:
                attended = self.attentions[index](features)
                mapped = {t: x + attended[t] if t in attended else x for t, x in mapped.items()}
            features = {t: self.dropout(torch.relu(x)) for t, x in norm(mapped).items()}
        return features


class InvariantPool(nn.Module):
    """Pool every orbit type onto one vector: the features of the network as a whole.

    Invariant: ``layer(g . x) == layer(x)`` for all permutations g.

    Args:
        orbits: the layout of the features.
        channels: per weight entry.
        pooling: some of ``mean``, ``max``, ``sum``, and ``attention``: a mean with learned weights.

    Raises:
        ConfigError: an unknown pooling, or none.
    """

    def __init__(self, orbits: Orbits, channels: int, pooling: Sequence[str] = ("mean", "max")) -> None:
        super().__init__()
        if isinstance(pooling, str):
            check_pooling(pooling)
        self.plain = tuple(how for how in pooling if how != "attention")
        check_pooling(self.plain if self.plain or not pooling else ("mean",))
        self.orbits = orbits
        self.readings = {t: [r for r in orbits.readings(t) if not r.onto] for t in orbits.types}
        self.scores = nn.ModuleDict()
        self.out_features = 0
        for t, count in orbits.entries.items():
            width = count * channels
            self.out_features += width * (len(self.readings[t]) * len(self.plain) if t else 1)
            if t and "attention" in pooling:
                self.scores[orbits.key(t)] = nn.Linear(width, 1)
                self.out_features += width

    def forward(self, features: Features) -> Tensor:
        """Features to (batch, out_features)."""
        parts: list[Tensor] = []
        for t, readings in self.readings.items():
            x = features[t]
            if self.plain or not t:
                parts += [part for values in pool(x, t, readings, self.plain or ("mean",)) for part in values]
            if self.orbits.key(t) in self.scores:
                flat = x.flatten(1, -2)
                weight = self.scores[self.orbits.key(t)](flat).softmax(1)
                parts.append((weight * flat).sum(1))
        return torch.cat(parts, dim=-1)


class InvariantHead(nn.Module):
    """Pool, then an MLP: one vector per network.

    Args:
        orbits: the layout of the features.
        channels: per weight entry.
        out_features: size of the output, at least 1.
        pooling: see :class:`InvariantPool`.
        hidden: units per hidden layer; a number for one layer, 0 or ``()`` for none: a linear head.
        dropout: probability with which a unit is dropped after each hidden layer.

    Raises:
        ConfigError: a size or a pooling out of range.
    """

    def __init__(
        self,
        orbits: Orbits,
        channels: int,
        out_features: int,
        *,
        pooling: Sequence[str],
        hidden: int | Sequence[int],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,) if hidden else ()
        self.pool = InvariantPool(orbits, channels, pooling)
        self.read = perceptron(self.pool.out_features, widths, out_features, dropout=dropout, norm="none")

    def forward(self, features: Features) -> Tensor:
        """Features to (batch, out_features)."""
        out: Tensor = self.read(self.pool(features))
        return out


class EquivariantHead(nn.Module):
    """A last equivariant map onto one channel: weights again, that move as the weights that were read.

    Args:
        encoding: of the stack before it.
        channels: per weight entry.
        pooling: of the map.
        global_mixing: of the map.
    """

    def __init__(
        self, encoding: Encoding, channels: int, *, pooling: Sequence[str], global_mixing: str = "full"
    ) -> None:
        super().__init__()
        # in a tuple, as its parameters belong to the stack
        self._encoding = (encoding,)
        self.map = EquivariantLinear(
            encoding.orbits, channels, 1, pooling=pooling, global_mixing=global_mixing
        )

    def forward(self, features: Features) -> Weights:
        """Features to weights (batch, ...)."""
        return self._encoding[0].decode(self.map(features))


class EquivariantNetwork(nn.Module):
    """A stack and a head: the base of DWS, NFN and UNF.

    Args:
        stack: weights to features.
        head: features to whatever the model gives.
    """

    def __init__(self, stack: EquivariantStack, head: InvariantHead | EquivariantHead) -> None:
        super().__init__()
        self.stack, self.head = stack, head

    @property
    def orbits(self) -> Orbits:
        """The layout of the features."""
        return self.stack.orbits

    def forward(self, weights: Weights) -> Tensor | Weights:
        """Read a batch of networks."""
        out: Tensor | Weights = self.head(self.stack(weights))
        return out
