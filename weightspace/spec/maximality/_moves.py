"""Moves of units, and what a set of them does to the entries of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightspace.spec._types import Symmetry, WeightSpec

PRECISION = 1e-9  # relative: values closer than that are equal

Change = np.ndarray
"""What happened to the entries of a flattened tensor; see :class:`Swaps` and :class:`Flips`."""


@dataclass(frozen=True)
class Move:
    """A change of one axis of one tensor.

    Args:
        tensor: its name.
        axis: the axis.
        starts: where on the axis the windows begin in which the move happens.
        stride: length of one unit block.
        units: which blocks of a window: the two that change places, or those that are rescaled.
        power: of a positive factor, with which it multiplies.
    """

    tensor: str
    axis: int
    starts: tuple[int, ...]
    stride: int
    units: tuple[int, ...]
    power: float = 1.0

    def indices(self, unit: int) -> list[int]:
        """The indices of one unit's blocks on the axis."""
        return [start + unit * self.stride + step for start in self.starts for step in range(self.stride)]


@dataclass(frozen=True)
class MissedSymmetry:
    """A set of moves that together leave the network's function as it is, though the spec has no such element.

    Args:
        kind: ``"permutation"``, ``"sign"`` or ``"positive"``.
        moves: what is done, all at once.
        change: relative change of the outputs that was measured, rounding alone.
    """

    kind: Symmetry
    moves: tuple[Move, ...]
    change: float

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(map(self._place, self.moves))}"

    def _place(self, move: Move) -> str:
        units = ("<->" if self.kind == "permutation" else " ").join(map(str, move.units))
        size = f" of {move.stride}" if move.stride > 1 else ""
        start = f" from {', '.join(map(str, move.starts))}" if move.starts != (0,) else ""
        power = f" ^{move.power:g}" if self.kind == "positive" else ""
        return f"{move.tensor} axis {move.axis} units {units}{size}{start}{power}"


class Swaps:
    """A change is the position from which each entry is taken."""

    def identity(self, size: int) -> Change:
        """What leaves all entries as they are."""
        return np.arange(size)

    def of(self, move: Move, shape: Sequence[int]) -> Change:
        """The position that a swap leaves in each place."""
        order = np.arange(shape[move.axis])
        first, second = (move.indices(unit) for unit in move.units)
        order[first], order[second] = second, first
        return np.arange(math.prod(shape)).reshape(tuple(shape)).take(order, move.axis).reshape(-1)

    def apply(self, change: Change, value: Tensor) -> Tensor:
        """The entries in their new order."""
        return value.reshape(-1)[torch.from_numpy(change)].reshape(value.shape)

    def compose(self, first: Change, second: Change) -> Change:
        """Positions of positions."""
        return first[second]

    def read(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Change | None:
        """Match the entries that differ by sorting them, those of all tensors as one key."""
        old, new = _keys(before, after)
        if (np.abs((old - new).sum(1)) > 2 * old.shape[1]).any():
            return None  # most sets of moves change the sum, which takes no sorting
        source = np.arange(old.shape[1])
        differ = np.flatnonzero((np.abs(old - new) > 1).any(0))
        by_old, by_new = (np.lexsort(side[:, differ]) for side in (old, new))
        source[differ[by_new]] = differ[by_old]
        return source if (np.abs(old[:, source] - new) <= 1).all() else None


class Flips:
    """A change is a sign for each entry; what is no floating number never changes."""

    def identity(self, size: int) -> Change:
        """What leaves all entries as they are."""
        return np.ones(size)

    def of(self, move: Move, shape: Sequence[int]) -> Change:
        """Minus one where the unit is."""
        signs = np.ones(tuple(shape))
        np.moveaxis(signs, move.axis, 0)[move.indices(move.units[0])] = -1.0
        return signs.reshape(-1)

    def apply(self, change: Change, value: Tensor) -> Tensor:
        """The entries with their new signs."""
        return value * torch.from_numpy(change).reshape(value.shape) if value.is_floating_point() else value

    def compose(self, first: Change, second: Change) -> Change:
        """The product of the signs."""
        return first * second

    def read(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Change | None:
        """The sign of each entry, which must be the same in all tensors."""
        old, new = _keys(before, after)
        kept, turned = (np.abs(old - new) <= 1).all(0), (np.abs(old + new) <= 1).all(0)
        legal = kept | turned if before[0].is_floating_point() else kept
        return np.where(kept, 1.0, -1.0) if legal.all() else None


Algebra = Swaps | Flips
"""How values change under moves: by reordering, or by signs."""


def _keys(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Change, Change]:
    """Entries as whole multiples of what rounding may change, one row per tensor; -inf and NaN as themselves."""
    flat = torch.stack([value.reshape(-1).double() for value in (*before, *after)])
    finite = flat[flat.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    keys = (flat / ((scale or 1.0) * PRECISION)).round().nan_to_num(3e15, 2e15, -2e15).numpy()
    return keys[: len(before)], keys[len(before) :]


def by_tensor(spec: WeightSpec, algebra: Algebra, moves: Iterable[Move]) -> dict[str, Change]:
    """What moves do together to every tensor."""
    changes = {name: algebra.identity(tensor.numel) for name, tensor in spec.tensors.items()}
    for move in moves:
        change = algebra.of(move, spec.tensors[move.tensor].shape)
        changes[move.tensor] = algebra.compose(changes[move.tensor], change)
    return changes
