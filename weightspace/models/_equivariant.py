r"""The equivariant linear layer of a weight space, complete for every spec.

For features x on orbit types s,

    y_u = \sum_t \sum_{w: t \to u} B_w \left( \sum_s \sum_{r: s \to t} W_{r,w}\, P_r x_s \right) + \sum_{w: () \to u} B_w b_w

where t runs over the types on which types are *read* (by P: some indices set equal, some pooled away, the rest in
any order) and from which types are *written* (by B: broadcast along some indices, or along a diagonal). With sums
or means these are *all* linear maps that commute with the permutations, each once: a pair (r, w) is a partition
of the indices of s and u together into those that are equal (for feed-forward networks Navon et al. 2023,
arXiv:2301.12780, section 5; for repeated groups Zhou et al. 2024, arXiv:2402.05232). Everything read onto the
same t is concatenated, so each t costs one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models._orbit_types import OrbitType, Reading
from weightspace.models._orbits import Features, Orbits
from weightspace.models._pooling import check_pooling, pool, write

MIXINGS = ("full", "shared", "none")
HUB = 4  # channels of a shared vector, in units of the layer's channels


class _Read(NamedTuple):
    source: OrbitType
    reading: Reading


class _Write(NamedTuple):
    target: OrbitType
    writing: Reading


class EquivariantLinear(nn.Module):
    """An affine map between features on orbit types that commutes with every permutation of the spec.

    ``layer(g . x) == g . layer(x)`` for all permutations g. With ``pooling=("mean",)`` or ``("sum",)`` it is linear
    and complete; adding ``"max"`` keeps it equivariant and makes it nonlinear, and much stronger in practice.

    Args:
        orbits: the layout of the features.
        in_channels: channels per weight entry on the way in.
        out_channels: channels per weight entry on the way out.
        pooling: how indices are pooled; with several, all results are used.
        bias: whether to add a free constant per output entry and channel.
        even_bias: whether that includes constants that are equal at all positions of a type, which a norm behind
            the layer takes away again. Those on a diagonal (of a recurrent weight) stay in any case.
        global_mixing: what becomes of the matrix W between all that is read onto a type and all that is written
            from it, whose parameters grow with the square of the number of tensors that meet on the type: all of
            them on the type without indices, on which every tensor has a pooled value, and all that share a
            group, such as a residual stream. ``"full"``: one free matrix per type. ``"shared"``: on *every* type
            where that takes fewer parameters, also where the tensors share groups, a product of two matrices
            through a vector of 4 channels, so that the layer is no longer complete; parameters grow linearly
            with depth. ``"none"``: tensors that have only pooled values in common do not meet, and nothing is
            pooled over all of its indices; all else is as in ``"full"``. Linear in the depth of a chain of
            layers, and still quadratic in that of a residual stream, whose tensors share a group.

    Shapes:
        features (batch, *group sizes, entries * in_channels) per orbit type ->
        (batch, *group sizes, entries * out_channels).

    Raises:
        ConfigError: an unknown pooling or mixing, or less than one channel.
    """

    def __init__(
        self,
        orbits: Orbits,
        in_channels: int,
        out_channels: int,
        *,
        pooling: Sequence[str] = ("mean", "max"),
        bias: bool = True,
        even_bias: bool = True,
        global_mixing: str = "full",
    ) -> None:
        super().__init__()
        check_pooling(pooling)
        if min(in_channels, out_channels) < 1:
            raise ConfigError(f"channels: expected at least one, found {in_channels} -> {out_channels}")
        if global_mixing not in MIXINGS:
            raise ConfigError(f"global_mixing: expected {', '.join(MIXINGS)}, found {global_mixing!r}")
        self.orbits, self.pooling, self.global_mixing = orbits, tuple(pooling), global_mixing
        self.in_channels, self.out_channels = in_channels, out_channels
        self._reads: dict[OrbitType, list[_Read]] = {}
        self._writes: dict[OrbitType, list[_Write]] = {}
        self._list_meets()
        self._widths = {
            t: [orbits.entries[target] * out_channels for target, _ in writes]
            for t, writes in self._writes.items()
        }
        self.weight = nn.ParameterDict()
        self.hub = nn.ParameterDict()
        sizes = {t: sum(map(self._read_width, reads)) for t, reads in self._reads.items()}
        for t, size in sizes.items():
            width, shared = sum(self._widths[t]), HUB * max(in_channels, out_channels)
            if global_mixing == "shared" and shared * (size + width) < size * width:
                self.hub[orbits.key(t)] = nn.Parameter(torch.empty(shared, size))
                size = shared
            self.weight[orbits.key(t)] = nn.Parameter(torch.empty(width, size))
        self._constants = self._list_constants(even_bias) if bias else []
        self.bias = nn.ParameterDict()
        for target, writing in self._constants:
            size = orbits.entries[target] * out_channels
            self.bias[self._bias_key(target, writing)] = nn.Parameter(torch.zeros(size))
        self._reset()

    def _list_meets(self) -> None:
        """For every type t: what is read onto it, and what is written from it. Small types first."""
        reads: dict[OrbitType, list[_Read]] = {}
        writes: dict[OrbitType, list[_Write]] = {}
        for orbit in self.orbits.types:
            written = set()
            for reading in self.orbits.readings(orbit):
                if self.global_mixing == "none" and not reading.onto and orbit:
                    continue
                reads.setdefault(reading.onto, []).append(_Read(orbit, reading))
                # every order in which a type is read meets every place to which it is written, once
                place = (reading.blocks, frozenset(reading.kept))
                if place not in written:
                    writes.setdefault(reading.onto, []).append(_Write(orbit, reading))
                written.add(place)
        ordered = sorted(reads, key=lambda t: (len(t), self.orbits.key(t)))
        self._reads = {t: reads[t] for t in ordered}
        self._wanted = {
            s: [read.reading for t in ordered for read in reads[t] if read.source == s]
            for s in self.orbits.types
        }
        self._writes = {t: writes[t] for t in ordered}

    def _list_constants(self, even: bool) -> list[_Write]:
        """Every way to write a constant: on all positions of a type if ``even``, and on its diagonals."""
        found = {}
        for orbit in self.orbits.types:
            for reading in self.orbits.readings(orbit):
                if not reading.onto and (even or len(reading.blocks) < len(orbit)):
                    found[orbit, reading.blocks] = _Write(orbit, reading)
        return list(found.values())

    def _bias_key(self, target: OrbitType, writing: Reading) -> str:
        equal = ["".join(map(str, block)) for block in writing.blocks if len(block) > 1]
        return "_eq".join([self.orbits.key(target), *equal])

    def _read_width(self, read: _Read) -> int:
        whole = len(read.reading.kept) == len(read.reading.blocks)
        return self.orbits.entries[read.source] * self.in_channels * (1 if whole else len(self.pooling))

    def _reset(self) -> None:
        """Uniform with variance 1 / fan-in, over all that reaches an output off the diagonals.

        This keeps the variance of features whose pooled values vary as they do. Means over many units vary less and
        sums more, which is not made up for: a deep stack with sums needs a norm.
        """
        fan_in = dict.fromkeys(self.orbits.types, 0)
        for t, writes in self._writes.items():
            for target, writing in writes:
                if len(writing.blocks) == len(target):
                    fan_in[target] += self.weight[self.orbits.key(t)].shape[1]
        with torch.no_grad():
            for t, writes in self._writes.items():
                blocks = self.weight[self.orbits.key(t)].split(self._widths[t])
                for (target, _), block in zip(writes, blocks, strict=True):
                    bound = math.sqrt(3.0 / fan_in[target])
                    block.uniform_(-bound, bound)
            for hub in self.hub.values():
                # keeps the variance of what passes
                bound = math.sqrt(3.0 / hub.shape[1])
                hub.uniform_(-bound, bound)

    def forward(self, features: Features) -> Features:
        """Apply the layer."""
        parts: dict[OrbitType, dict[Reading, Tensor]] = {u: {} for u in self.orbits.types}
        for t, pooled in self._pooled(features).items():
            key = self.orbits.key(t)
            if key in self.hub:
                pooled = nn.functional.linear(pooled, self.hub[key])
            mixed = nn.functional.linear(pooled, self.weight[key])
            for (u, writing), part in zip(self._writes[t], mixed.split(self._widths[t], dim=-1), strict=True):
                parts[u][writing] = part
        for u, writing in self._constants:
            constant = self.bias[self._bias_key(u, writing)]
            part = parts[u].get(writing)
            parts[u][writing] = constant[None] if part is None else part + constant
        return {u: write(u, terms) for u, terms in parts.items()}

    def _pooled(self, features: Features) -> Features:
        parts: dict[OrbitType, list[Tensor]] = {t: [] for t in self._reads}
        for s in self.orbits.types:
            wanted = self._wanted[s]
            for reading, values in zip(wanted, pool(features[s], s, wanted, self.pooling), strict=True):
                parts[reading.onto] += values
        return {t: torch.cat(values, dim=-1) if len(values) > 1 else values[0] for t, values in parts.items()}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.in_channels} -> {self.out_channels} channels on {len(self.orbits.types)} orbit types, "
            f"pooling={'+'.join(self.pooling)}, global_mixing={self.global_mixing}, "
            f"parameters={sum(p.numel() for p in self.parameters()):,}"
        )
