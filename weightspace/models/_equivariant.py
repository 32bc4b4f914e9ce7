r"""The equivariant linear layer of a weight space, complete for feed-forward specs.

For features x on orbit types s, and every set t of groups,

    y_u = \sum_{t \subseteq u} B_t^u \left( \sum_{s \supseteq t} W_{s,t,u}\, P_s^t x_s \right) + b_u

where P pools the groups of s that are not in t and B broadcasts along the groups of u that are not in t. With
mean pooling alone these are *all* linear maps that commute with the permutations: one free matrix per
(s, t, u) between the entries of s and those of u (Navon et al. 2023, arXiv:2301.12780, section 5; in pooled
form). Everything pooled onto the same t is concatenated, so each t costs one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models._orbits import Features, Orbits, OrbitType

POOLINGS = ("mean", "max", "sum")


class EquivariantLinear(nn.Module):
    """An affine map between features on orbit types that commutes with every permutation of the spec.

    ``layer(g . x) == g . layer(x)`` for all permutations g. With ``pooling=("mean",)`` or ``("sum",)`` it is linear
    and complete; adding ``"max"`` keeps it equivariant and makes it nonlinear, and much stronger in practice.

    Args:
        orbits: the layout of the features.
        in_channels: channels per weight entry on the way in.
        out_channels: channels per weight entry on the way out.
        pooling: how groups are pooled; with several, all results are used.
        bias: whether to add a free constant per output entry and channel.

    Shapes:
        features (batch, *group sizes, entries * in_channels) per orbit type ->
        (batch, *group sizes, entries * out_channels).

    Raises:
        ConfigError: an unknown pooling.
    """

    def __init__(
        self,
        orbits: Orbits,
        in_channels: int,
        out_channels: int,
        *,
        pooling: Sequence[str] = ("mean", "max"),
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_pooling(pooling)
        self.orbits, self.pooling = orbits, tuple(pooling)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.meets = _meets(orbits)
        widths_out = {orbit: count * out_channels for orbit, count in orbits.entries.items()}
        self._targets = {t: [u for u in orbits.types if set(t) <= set(u)] for t in self.meets}
        self._widths = {t: [widths_out[u] for u in targets] for t, targets in self._targets.items()}
        self.weight = nn.ParameterDict()
        fan_in = dict.fromkeys(orbits.types, 0)
        for t, sources in self.meets.items():
            pooled = sum(
                orbits.entries[s] * in_channels * (1 if s == t else len(self.pooling)) for s in sources
            )
            self.weight[orbits.key(t)] = nn.Parameter(torch.empty(sum(self._widths[t]), pooled))
            for u in self._targets[t]:
                fan_in[u] += pooled
        self.bias = nn.ParameterDict(
            {orbits.key(u): nn.Parameter(torch.zeros(width)) for u, width in widths_out.items()}
            if bias
            else {}
        )
        self._reset(fan_in)

    def _reset(self, fan_in: Mapping[OrbitType, int]) -> None:
        """Uniform with the variance of nn.Linear, over all that reaches an output."""
        for t, targets in self._targets.items():
            blocks = self.weight[self.orbits.key(t)].split(self._widths[t])
            for u, block in zip(targets, blocks, strict=True):
                bound = 1.0 / math.sqrt(fan_in[u])
                with torch.no_grad():
                    block.uniform_(-bound, bound)

    def forward(self, features: Features) -> Features:
        """Apply the layer."""
        pooled = self._pooled(features)
        parts: dict[OrbitType, dict[OrbitType, Tensor]] = {u: {} for u in self.orbits.types}
        for t in self.meets:
            mixed = nn.functional.linear(pooled[t], self.weight[self.orbits.key(t)], self._bias(t))
            for u, part in zip(self._targets[t], mixed.split(self._widths[t], dim=-1), strict=True):
                parts[u][t] = part
        return {u: _join(u, terms) for u, terms in parts.items()}

    def _bias(self, t: OrbitType) -> Tensor | None:
        """All biases ride on the pooled type (), the smallest product."""
        if t or not self.bias:
            return None
        return torch.cat([self.bias[self.orbits.key(u)] for u in self._targets[()]])

    def _pooled(self, features: Features) -> Features:
        parts: dict[OrbitType, list[Tensor]] = {t: [] for t in self.meets}
        for s in self.orbits.types:
            for t, values in pool(features[s], s, self.pooling).items():
                if t in parts:
                    parts[t] += values
        return {t: torch.cat(values, dim=-1) if len(values) > 1 else values[0] for t, values in parts.items()}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"{self.in_channels} -> {self.out_channels} channels on {len(self.orbits.types)} orbit types, "
            f"pooling={'+'.join(self.pooling)}, parameters={sum(p.numel() for p in self.parameters()):,}"
        )


def check_pooling(pooling: Sequence[str]) -> None:
    """Raise ConfigError unless every name is a known pooling and there is at least one."""
    unknown = [name for name in pooling if name not in POOLINGS]
    if unknown or not pooling:
        raise ConfigError(f"pooling: expected some of {', '.join(POOLINGS)}, found {list(pooling)}")


def _meets(orbits: Orbits) -> dict[OrbitType, list[OrbitType]]:
    """For every set t of groups that some source and some target share: the sources. Small sets first."""
    subsets = {
        t for orbit in orbits.types for size in range(len(orbit) + 1) for t in combinations(orbit, size)
    }
    ordered = sorted(subsets, key=lambda t: (len(t), t))
    return {t: [s for s in orbits.types if set(t) <= set(s)] for t in ordered}


def pool(features: Tensor, orbit: OrbitType, pooling: Sequence[str]) -> dict[OrbitType, list[Tensor]]:
    """Pool features (batch, *groups, channels) onto every subset of their groups.

    Each set is pooled from one that has one group more: a mean of means over full axes is the mean, a maximum
    of maxima the maximum. The set of all groups holds the features themselves.
    """
    found: dict[OrbitType, list[Tensor]] = {orbit: [features]}
    if not orbit:
        return found
    axes = tuple(range(1, len(orbit) + 1))
    first = _PoolAxes.apply(features, axes, tuple(pooling))
    for at, axis in enumerate(axes):
        child = orbit[: axis - 1] + orbit[axis:]
        found[child] = list(first[at * len(pooling) : (at + 1) * len(pooling)])
    for size in range(len(orbit) - 2, -1, -1):
        for t in combinations(orbit, size):
            parent = next(u for u in found if len(u) == size + 1 and set(t) <= set(u))
            axis = 1 + next(at for at, name in enumerate(parent) if name not in t)
            found[t] = [_reduce(x, how, axis) for x, how in zip(found[parent], pooling, strict=True)]
    return found


def _reduce(x: Tensor, how: str, axis: int) -> Tensor:
    if how == "mean":
        return x.mean(axis)
    return x.sum(axis) if how == "sum" else x.amax(axis)


class _PoolAxes(torch.autograd.Function):
    """Pool the largest tensor along each of its axes, with one joint backward pass.

    Autograd alone would write a tensor of its size for every axis and pooling, and add them up: 4 times as slow
    for mean and max over two axes. As in ``amax``, tied maxima share the gradient evenly.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: tuple[int, ...], pooling: tuple[str, ...]) -> tuple[Tensor, ...]:
        pooled = tuple(_reduce(x, how, axis) for axis in axes for how in pooling)
        ctx.save_for_backward(x, *pooled)
        ctx.axes, ctx.pooling = axes, pooling
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, *pooled = ctx.saved_tensors
        cases = [(axis, how) for axis in ctx.axes for how in ctx.pooling]
        evenly = [
            (grad / x.shape[axis] if how == "mean" else grad).unsqueeze(axis)
            for (axis, how), grad in zip(cases, gradients, strict=True)
            if how != "max"
        ]
        total = torch.zeros_like(x) if not evenly else sum(evenly[1:], evenly[0].expand_as(x).contiguous())
        for (axis, how), grad, value in zip(cases, gradients, pooled, strict=True):
            if how == "max":
                # as floats, because summing booleans converts them to integers first, which is slow
                hit = (x == value.unsqueeze(axis)).to(x.dtype)
                total.addcmul_(hit, (grad / hit.sum(axis)).unsqueeze(axis))
        return total, None, None


def _join(target: OrbitType, parts: Mapping[OrbitType, Tensor]) -> Tensor:
    """Add features on subsets of the target's groups, broadcast along the groups that they lack.

    Small subsets are added into larger ones first, so that the largest tensor is passed over as rarely as can be.
    """
    total: dict[OrbitType, Tensor] = {}
    for t in sorted(parts, key=len):
        part = parts[t]
        for smaller in [s for s in total if set(s) < set(t)]:
            part = part + _align(total.pop(smaller), smaller, t)
        total[t] = part
    whole = total.pop(target)
    for t, part in total.items():
        whole = whole + _align(part, t, target)
    return whole


def _align(x: Tensor, groups: OrbitType, target: OrbitType) -> Tensor:
    for at, name in enumerate(target):
        if name not in groups:
            x = x.unsqueeze(1 + at)
    return x
