"""Positive factors of a repeated group, whose units are tied to each other: all at once, by steps that never fall back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align._plans import Place, Plan
from weightspace.spec import Element, Weights, cell_view
from weightspace.spec._cells import spread

_STEPS = 20
_HALVINGS = 8


def propose(
    plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights
) -> tuple[Float[Tensor, "rows"], Element]:
    """Factors of the units that bring the weights closer, and by how much: half of what the squared distance falls.

    Args:
        plan: of the group.
        places: those that count.
        reference: tensors ``(rows, *shape)``, those of the plan.
        moved: likewise, the weights as they stand.
    """
    cells = _cells(places, reference, moved)
    some = moved[places[0].tensor]
    zero = torch.zeros(len(some), plan.size, dtype=some.dtype, device=some.device)
    logs = dict.fromkeys(plan.positives, zero)
    start = best = _value(cells, logs)
    for _ in range(_STEPS):
        way = _way(cells, logs)
        length = torch.ones_like(best)
        for _ in range(_HALVINGS):
            there = {name: log + length[:, None].to(log) * way[name] for name, log in logs.items()}
            value = _value(cells, there)
            length = torch.where(value > best, length, length / 2)
        more = value > best
        logs = {name: torch.where(more[:, None], there[name], log) for name, log in logs.items()}
        best = torch.where(more, value, best)
        if not bool(more.any()):
            break
    return best - start, {name: log.exp() for name, log in logs.items()}


_Cell = tuple[list[Place], Tensor, Tensor]


def _cells(places: Sequence[Place], reference: Weights, moved: Weights) -> list[_Cell]:
    """The cells that factors multiply, with the places in each."""
    found: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        found.setdefault((place.tensor, place.number), []).append(place)
    return [
        (group, _view(reference[group[0].tensor], group[0]), _view(moved[group[0].tensor], group[0]))
        for group in found.values()
        if any(place.powers for place in group)
    ]


def _view(tensor: Tensor, place: Place) -> Tensor:
    return cell_view(tensor.reshape(len(tensor), math.prod(tensor.shape[1:])), place.cell)


def _scaled(cell: _Cell, logs: dict[str, Tensor]) -> Tensor:
    places, _, values = cell
    for place in places:
        for name, power in place.powers:
            values = values * torch.exp(power * spread(logs[name], (place.dim,), values.ndim - 1))
    return values


def _value(cells: Sequence[_Cell], logs: dict[str, Tensor]) -> Float[Tensor, "rows"]:
    squares = [
        (cell[1] - _scaled(cell, logs)).flatten(1).square().sum(1, dtype=torch.float64) for cell in cells
    ]
    return torch.stack(squares).sum(0) / -2


def _way(cells: Sequence[_Cell], logs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Newton's step per unit, as if the others stayed where they are; downhill curvature is assured."""
    slope = {name: torch.zeros_like(log) for name, log in logs.items()}
    curve = {name: torch.zeros_like(log) for name, log in logs.items()}
    for cell in cells:
        values = _scaled(cell, logs)
        product, square = cell[1] * values, values.square()
        for place in cell[0]:
            others = [1 + at for at in range(values.ndim - 1) if at != place.dim]
            along, size = (part.sum(others) if others else part for part in (product, square))
            for name, power in place.powers:
                slope[name] = slope[name] + power * (along - size)
                curve[name] = curve[name] + power**2 * torch.maximum(2 * size - along, size / 2)
    return {name: (slope[name] / curve[name]).nan_to_num(0.0, 0.0, 0.0).clamp(-1.0, 1.0) for name in logs}
