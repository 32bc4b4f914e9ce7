"""Weights as features on orbit types: the one layout in which every equivariant layer works.

All cells of one orbit type are kept side by side in one tensor, ``(batch, *group sizes, channels)``, channels
last; fixed indices (which nothing permutes) are folded into channels. An MLP 2-32-32-1 has six tensors but four
orbit types: ``()``, ``(hidden0)``, ``(hidden1)`` and ``(hidden0, hidden1)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.models._orbit_types import Index, OrbitType, Reading, arrangements, readings
from weightspace.spec import Cell, WeightSpec, cell_view

Features = dict[OrbitType, Tensor]
WIDEST = 16  # size of a fixed index that is folded: parameters grow with the square of what is folded
FOLDED = WIDEST**2  # number of positions on all fixed indices of a cell together


@dataclass(frozen=True)
class Slot:
    """Where a cell lives among the features of its orbit type.

    Args:
        tensor: its name.
        cell: the cell.
        order: its dims, those of the orbit type in order, then the fixed ones.
        fixed: number of its entries at every position.
    """

    tensor: str
    cell: Cell
    order: tuple[int, ...]
    fixed: int


class Orbits:
    """The orbit types of a spec, and the two ways between weights and features.

    Args:
        spec: any weight space.

    Attributes:
        types: every orbit type that some cell has, smaller ones first.
        entries: number of weight entries per position of each type.
        slots: the cells of each type, in the order of their entries.

    Raises:
        SpecError: a fixed index is wider than 16 (the pixels that an MLP reads), or those of one cell have more
            than 256 positions together (a patch of 3 x 16 x 16).

    Example:
        >>> orbits = Orbits(WeightSpec.mlp([2, 32, 32, 1]))
        >>> print(orbits)
        1 x (), 3 x (hidden0), 2 x (hidden1), 1 x (hidden0, hidden1)
    """

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec
        self._readings: dict[OrbitType, list[Reading]] = {}
        self.rank = {name: position for position, name in enumerate(spec.groups)}
        slots: dict[OrbitType, list[Slot]] = {}
        for name, tensor in spec.tensors.items():
            for cell in tensor.cells:
                _check_width(name, cell)
                orbit, order = _arranged(cell, self.rank)
                fixed = tuple(at for at, dim in enumerate(cell.dims) if dim.group is None)
                size = math.prod(cell.dims[at].size for at in fixed)
                slots.setdefault(orbit, []).append(Slot(name, cell, (*order, *fixed), size))
        ordered = sorted(slots, key=lambda t: (len(t), [(self.rank[i.group], i.parents) for i in t]))
        self.types: tuple[OrbitType, ...] = tuple(ordered)
        self.slots = {orbit: tuple(slots[orbit]) for orbit in self.types}
        self.entries = {orbit: sum(slot.fixed for slot in self.slots[orbit]) for orbit in self.types}

    def sizes(self, orbit: OrbitType) -> tuple[int, ...]:
        """Number of units along each index of a type."""
        return tuple(self.spec.groups[index.group].size for index in orbit)

    def readings(self, orbit: OrbitType) -> list[Reading]:
        """Every way to see a type on a smaller one."""
        if orbit not in self._readings:
            self._readings[orbit] = readings(orbit, self.rank)
        return self._readings[orbit]

    def key(self, orbit: OrbitType) -> str:
        """The name of a type's parameters: ``all`` for the empty one, else ``g0_g1`` by number of group."""
        return "_".join("_in".join(map(str, (f"g{self.rank[i.group]}", *i.parents))) for i in orbit) or "all"

    def __str__(self) -> str:
        return ", ".join(f"{count} x {type_name(orbit)}" for orbit, count in self.entries.items())

    def gather(self, weights: Mapping[str, Tensor]) -> Features:
        """Weights (batch, ...) to features (batch, *group sizes, entries).

        Raises:
            SpecError: the weights do not fit the spec, or have not one batch axis.
        """
        batch = batch_size(self.spec, weights)
        features: Features = {}
        for orbit, slots in self.slots.items():
            parts = []
            for slot in slots:
                flat = weights[slot.tensor].reshape(batch, self.spec.tensors[slot.tensor].numel)
                if (
                    flat.stride(-1) != 1
                ):  # reshape gives a view where it can, (networks, numel) of a transpose
                    flat = flat.contiguous()
                view = cell_view(flat, slot.cell).permute(0, *(1 + at for at in slot.order))
                parts.append(view.reshape(batch, *self.sizes(orbit), slot.fixed))
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
        for orbit, slots in self.slots.items():
            parts = features[orbit].split([slot.fixed * channels for slot in slots], dim=-1)
            for slot, part in zip(slots, parts, strict=True):
                sizes = [slot.cell.sizes[at] for at in slot.order]
                inverse = sorted(range(len(slot.order)), key=slot.order.__getitem__)
                moved = part.reshape(len(first), *sizes, channels).permute(0, -1, *(1 + at for at in inverse))
                _owned_view(flat[slot.tensor], slot.cell).copy_(moved)
        return {
            name: flat[name].movedim(1, -1).reshape(len(first), *tensor.shape, channels)
            for name, tensor in self.spec.tensors.items()
        }


def batch_size(spec: WeightSpec, weights: Mapping[str, Tensor]) -> int:
    """The number of networks.

    Raises:
        SpecError: the weights do not fit the spec, or have not one batch axis.
    """
    batch = spec.batch_shape(weights)
    if len(batch) != 1:
        raise SpecError(f"weights: expected one batch axis, found shape {list(batch)}")
    return batch[0]


def type_name(orbit: OrbitType) -> str:
    """An orbit type as text: ``(heads0, features0 within 0)``."""
    shown = [
        f"{index.group} within {', '.join(map(str, index.parents))}" if index.parents else index.group
        for index in orbit
    ]
    return f"({', '.join(shown)})"


def _owned_view(flat: Tensor, cell: Cell) -> Tensor:
    """As ``cell_view`` of a tensor whose memory begins with it; ``torch.compile`` writes to no view of a view."""
    if cell.offset == 0:
        return cell_view(flat, cell)
    steps = (*flat.stride()[:-1], *(dim.stride for dim in cell.dims))
    return flat.as_strided((*flat.shape[:-1], *cell.sizes), steps, cell.offset)


def _arranged(cell: Cell, rank: Mapping[str, int]) -> tuple[OrbitType, tuple[int, ...]]:
    """The orbit type of a cell, and its dims in the type's order."""
    live = [at for at, dim in enumerate(cell.dims) if dim.group is not None]
    live.sort(key=lambda at: _depth(cell, at))
    place = {at: new for new, at in enumerate(live)}
    indices = [
        Index(str(cell.dims[at].group), tuple(place[parent] for parent in cell.dims[at].parents))
        for at in live
    ]
    orbit, orders = arrangements(indices, rank)
    return orbit, tuple(live[at] for at in orders[0])


def _depth(cell: Cell, at: int) -> int:
    return 1 + max((_depth(cell, parent) for parent in cell.dims[at].parents), default=-1)


def _check_width(tensor: str, cell: Cell) -> None:
    wide = next((dim for dim in cell.dims if dim.group is None and dim.size > WIDEST), None)
    if wide is not None:
        raise SpecError(
            f"tensor {tensor!r}: axis {wide.axis} has {wide.size} fixed indices; equivariant layers fold up to {WIDEST} of "
            "them into channels"
        )
    sizes = [dim.size for dim in cell.dims if dim.group is None]
    if math.prod(sizes) > FOLDED:
        raise SpecError(
            f"tensor {tensor!r}: its axes have {' x '.join(map(str, sizes))} fixed indices; equivariant layers fold up to "
            f"{FOLDED} of them into channels"
        )
