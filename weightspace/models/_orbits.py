"""Weights as features on orbit types: the one layout in which every equivariant layer works.

Two entries of a weight space can be told apart by an equivariant map only through the groups that index them.
So all cells indexed by the same groups are kept side by side in one tensor, ``(batch, *group sizes, channels)``,
channels last; fixed indices (which nothing permutes) are folded into channels. An MLP 2-32-32-1 has six
tensors but four orbit types: ``()``, ``(hidden0,)``, ``(hidden1,)`` and ``(hidden0, hidden1)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec import Cell, WeightSpec, cell_view

OrbitType = tuple[str, ...]
Features = dict[OrbitType, Tensor]
WIDEST = 64  # parameters grow with the square of what is folded


@dataclass(frozen=True)
class _Slot:
    """Where a cell lives: its tensor, its dims as (groups in order, then fixed), its entries per position."""

    tensor: str
    cell: Cell
    order: tuple[int, ...]
    fixed: int


class Orbits:
    """The orbit types of a spec, and the two ways between weights and features.

    Args:
        spec: a weight space without nested or repeated groups.

    Attributes:
        types: every orbit type that some cell has, smaller ones first.
        entries: number of weight entries per position of each type.
        sizes: size of each group.

    Raises:
        SpecError: a group is nested, or occurs twice in one cell, or a tensor has more than 64 fixed entries
            per unit (an MLP that reads 784 pixels).

    Example:
        >>> orbits = Orbits(WeightSpec.mlp([2, 32, 32, 1]))
        >>> orbits.entries
        {(): 1, ('hidden0',): 3, ('hidden1',): 2, ('hidden0', 'hidden1'): 1}
    """

    def __init__(self, spec: WeightSpec) -> None:
        rank = {name: position for position, name in enumerate(spec.groups)}
        slots: dict[OrbitType, list[_Slot]] = {}
        for name, tensor in spec.tensors.items():
            for cell in tensor.cells:
                _check(spec, name, cell)
                ranks = [len(rank) if dim.group is None else rank[dim.group] for dim in cell.dims]
                order = np.argsort(ranks, kind="stable").tolist()
                groups = tuple(dim.group for at in order if (dim := cell.dims[at]).group is not None)
                fixed = math.prod(dim.size for dim in cell.dims if dim.group is None)
                slots.setdefault(groups, []).append(_Slot(name, cell, tuple(order), fixed))
        self.spec = spec
        self.types: tuple[OrbitType, ...] = tuple(
            sorted(slots, key=lambda t: (len(t), [rank[name] for name in t]))
        )
        self._slots = {orbit: slots[orbit] for orbit in self.types}
        self._rank = rank
        self.entries = {orbit: sum(slot.fixed for slot in self._slots[orbit]) for orbit in self.types}
        self.sizes = {name: group.size for name, group in spec.groups.items()}
        wide = next((slot for found in slots.values() for slot in found if slot.fixed > WIDEST), None)
        if wide is not None:
            raise SpecError(
                f"tensor {wide.tensor!r}: has {wide.fixed} fixed entries per unit; this layer folds them into "
                f"channels, which it does up to {WIDEST}"
            )

    def key(self, orbit: OrbitType) -> str:
        """The name of an orbit type's parameters: ``all`` for the empty one, else ``g0_g1`` by number of group."""
        return "_".join(f"g{self._rank[name]}" for name in orbit) or "all"

    def gather(self, weights: Mapping[str, Tensor]) -> Features:
        """Weights (batch, ...) to features (batch, *group sizes, entries)."""
        (batch,) = self.spec.batch_shape(weights)
        features: Features = {}
        for orbit, slots in self._slots.items():
            parts = []
            for slot in slots:
                flat = weights[slot.tensor].reshape(batch, -1)
                view = cell_view(flat, slot.cell).permute(0, *(1 + at for at in slot.order))
                parts.append(view.reshape(batch, *(self.sizes[name] for name in orbit), slot.fixed))
            features[orbit] = torch.cat(parts, dim=-1)
        return features

    def scatter(self, features: Features) -> dict[str, Tensor]:
        """Features (batch, *group sizes, entries * channels) to tensors (batch, *shape, channels)."""
        first = next(iter(features.values()))
        channels = first.shape[-1] // self.entries[next(iter(features))]
        flat = {
            name: first.new_empty(len(first), channels, tensor.numel)
            for name, tensor in self.spec.tensors.items()
        }
        for orbit, slots in self._slots.items():
            parts = features[orbit].split([slot.fixed * channels for slot in slots], dim=-1)
            for slot, part in zip(slots, parts, strict=True):
                sizes = [slot.cell.sizes[at] for at in slot.order]
                inverse = np.argsort(slot.order).tolist()
                moved = part.reshape(len(first), *sizes, channels).permute(0, -1, *(1 + at for at in inverse))
                cell_view(flat[slot.tensor], slot.cell).copy_(moved)
        return {
            name: flat[name].movedim(1, -1).reshape(len(first), *tensor.shape, channels)
            for name, tensor in self.spec.tensors.items()
        }


def _check(spec: WeightSpec, tensor: str, cell: Cell) -> None:
    groups = [dim.group for dim in cell.dims if dim.group is not None]
    nested = [name for name in groups if spec.groups[name].within]
    if nested:
        raise SpecError(
            f"tensor {tensor!r}: the nested group {nested[0]!r} is not supported by this layer yet"
        )
    repeated = [name for name in groups if groups.count(name) > 1]
    if repeated:
        raise SpecError(
            f"tensor {tensor!r}: {repeated[0]!r} occurs twice, which this layer does not support yet"
        )
