"""Products of the units of one pair of networks that are brought up to date, where others would be made anew.

In late sweeps few units still move. What a group sees of a neighbour then changes by what those few contribute, a
matrix product that is as much smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from weightspace.align._plans import Place
from weightspace.align._problem import Problem
from weightspace.spec import Element, Weights, cell_view

_UPDATES = 16  # before a product is made anew, so that what was rounded off does not add up


@dataclass(slots=True)
class _Kept:
    """A product, and for which orders of the neighbours it is: the group itself in the order of the weights."""

    product: Tensor
    orders: dict[str, Tensor]
    updates: int = 0


@dataclass(slots=True)
class Products:
    """The products of one pair.

    Args:
        reference: tensors ``(1, *shape)``.
        weights: likewise, as they were given.
        groups: those that are permuted as they are, and nothing else: neither nested nor repeated.
    """

    reference: Weights
    weights: Weights
    groups: frozenset[str]
    kept: dict[tuple[str, int, int], _Kept] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, reference: Weights, weights: Weights) -> Products | None:
        """Those of a problem of one pair in which units change places and nothing else."""
        names = {name for plan in problem.plans for name in plan.values}
        if problem.pairs != 1 or not names or not names <= set(problem.spec.groups):
            return None
        plain = (plan.group for plan in problem.plans if not plan.inner and not plan.repeated)
        return cls(reference, weights, frozenset(plain))

    def serves(self, place: Place) -> bool:
        """Whether it has the products of a place: all groups that meet there are plain."""
        return all(dim.group is None or dim.group in self.groups for dim in place.cell.dims)

    def sum(self, group: str, places: Sequence[Place], element: Element) -> Tensor:
        """Products of units of the reference with units of the weights as they stand, (1, size, size)."""
        total = reduce(torch.add, (self._product(place, element) for place in places))
        return total.index_select(2, element[group][0])

    def _product(self, place: Place, element: Element) -> Tensor:
        """Those of one place, with the group itself in the order in which it was given."""
        orders = {
            dim.group: element[dim.group][0]
            for at, dim in enumerate(place.cell.dims)
            if at != place.dim and dim.group is not None
        }
        key = (place.tensor, place.number, place.dim)
        self.kept[key] = kept = self._updated(place, orders, self.kept.get(key))
        return kept.product

    def _updated(self, place: Place, orders: Mapping[str, Tensor], kept: _Kept | None) -> _Kept:
        copies = {name: order.clone() for name, order in orders.items()}
        if kept is None:
            return _Kept(self._whole(place, copies), copies)
        moved = {name: (order != kept.orders[name]).nonzero()[:, 0] for name, order in copies.items()}
        moved = {name: where for name, where in moved.items() if len(where)}
        if not moved:
            return kept
        (name, where), *others = moved.items()
        if others or 2 * len(where) > len(copies[name]) or kept.updates == _UPDATES:
            return _Kept(self._whole(place, copies), copies)
        return _Kept(
            kept.product + self._difference(place, kept.orders, copies, name, where), copies, kept.updates + 1
        )

    def _whole(self, place: Place, orders: Mapping[str, Tensor]) -> Tensor:
        left, right = (_cell(side[place.tensor], place) for side in (self.reference, self.weights))
        return _rows(left, place) @ _rows(_ordered(right, place, orders), place).mT

    def _difference(
        self,
        place: Place,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        name: str,
        where: Tensor,
    ) -> Tensor:
        """What changes when the neighbour ``name`` has other units at the places ``where``."""
        at = 1 + next(at for at, dim in enumerate(place.cell.dims) if dim.group == name)
        left, right = (_cell(side[place.tensor], place) for side in (self.reference, self.weights))
        rest = {other: order for other, order in after.items() if other != name}
        new, old = (right.index_select(at, orders[name][where]) for orders in (after, before))
        return _rows(left.index_select(at, where), place) @ _rows(_ordered(new - old, place, rest), place).mT


def _cell(tensor: Tensor, place: Place) -> Tensor:
    return cell_view(tensor.reshape(len(tensor), math.prod(tensor.shape[1:])), place.cell)


def _ordered(cell: Tensor, place: Place, orders: Mapping[str, Tensor]) -> Tensor:
    for at, dim in enumerate(place.cell.dims):
        if at != place.dim and dim.group is not None and dim.group in orders:
            cell = cell.index_select(1 + at, orders[dim.group])
    return cell


def _rows(cell: Tensor, place: Place) -> Tensor:
    units = cell.movedim(1 + place.dim, 1)
    return units.reshape(*units.shape[:2], math.prod(units.shape[2:]))
