"""Matching a group in whose units other groups are nested: the heads of an attention layer with their features.

For every place and every unit that could go there, what is nested is matched as if the two were small networks of
their own; one assignment then says which unit goes where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align._assignment import assign
from weightspace.align._plans import Place, Plan, make_plans
from weightspace.align._problem import Outcome, Problem
from weightspace.spec import Cell, Dim, Element, Exponent, Group, Scaling, TensorSpec, Weights, WeightSpec
from weightspace.spec._cells import cell_view, row_major

Solve = Callable[[Problem], Outcome]

_CHUNK = (
    2**23
)  # entries of the pairs of units that are matched at once: 32 MB in float32, should they be copied


@dataclass(frozen=True, slots=True)
class Part:
    """One cell of the whole as a tensor of the space of one unit.

    Args:
        name: of that tensor.
        place: the cell, and which of its dims runs over the outer group.
    """

    name: str
    place: Place


@lru_cache(maxsize=256)
def unit_spec(
    spec: WeightSpec, plan: Plan, places: tuple[Place, ...], symmetries: tuple[str, ...]
) -> tuple[WeightSpec, tuple[Part, ...]]:
    """The weight space of one unit: what is nested in it is free, all other groups are held.

    The outer group stays, with its one unit, as far as it has scalings.
    """
    parts = tuple(Part(f"{place.tensor}:{place.number}", place) for place in places)
    scaled = bool(plan.signs or plan.phase or plan.positives)
    groups = [Group(plan.group, 1)] if scaled else []
    for name in plan.inner:
        within = tuple(outer for outer in spec.groups[name].within if outer != plan.group)
        groups.append(Group(name, spec.groups[name].size, within))
    family = {group.name for group in groups}
    kept = {name for name in plan.values if name not in spec.groups}
    scalings = [_scaling(spec.scalings[name], parts, plan, scaled) for name in spec.scalings if name in kept]
    tensors = {part.name: _tensor(part, family) for part in parts}
    used = {dim.group for tensor in tensors.values() for dim in tensor.cells[0].dims}
    groups = [group for group in groups if group.name in used]
    scalings = [scaling for scaling in scalings if scaling.group in used]
    return WeightSpec.build(groups, tensors, scalings), parts


def _order(place: Place, scaled: bool) -> list[int]:
    """The dims of the cell that are left, in their order."""
    return [at for at in range(len(place.cell.dims)) if scaled or at != place.dim]


def _tensor(part: Part, family: set[str]) -> TensorSpec:
    place = part.place
    order = _order(place, place.cell.dims[place.dim].group in family)
    sizes = [1 if at == place.dim else place.cell.dims[at].size for at in order]
    dims, where = [], {at: position for position, at in enumerate(order)}
    for at, stride in zip(order, row_major(sizes), strict=True):
        dim = place.cell.dims[at]
        group = dim.group if dim.group in family else None
        parents = tuple(where[parent] for parent in dim.parents if parent != place.dim) if group else ()
        dims.append(Dim(where[at], stride, sizes[where[at]], group, parents))
    kept = [dim for dim in dims if dim.size > 1 or dim.group is not None]
    moved = {dims.index(dim): position for position, dim in enumerate(kept)}
    cell = Cell(tuple(replace(dim, parents=tuple(moved[p] for p in dim.parents)) for dim in kept))
    return TensorSpec(tuple(sizes), (cell,))


def _scaling(scaling: Scaling, parts: Sequence[Part], plan: Plan, scaled: bool) -> Scaling:
    """The same scaling, where it acts in the tensors of one unit."""

    def translated(places: Sequence[Exponent]) -> tuple[Exponent, ...]:
        found = []
        for place in places:
            for part in parts:
                if (place.tensor, place.cell) == (part.place.tensor, part.place.number):
                    found.append(
                        Exponent(part.name, 0, _position(part.place, place.dim, scaled), place.power)
                    )
        return tuple(found)

    return replace(scaling, exponents=translated(scaling.exponents), shifts=translated(scaling.shifts))


def _position(place: Place, dim: int, scaled: bool) -> int:
    """Where a dim of the cell is among those of the unit's tensor, from which single fixed indices are gone."""
    before = [at for at in _order(place, scaled) if at < dim]
    dims = place.cell.dims
    return sum(dims[at].size > 1 or dims[at].group is not None for at in before)


# -- all pairs of units ------------------------------------------------------------------------------------


def propose(
    problem: Problem, plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights, solve: Solve
) -> tuple[Float[Tensor, "rows"], Element]:
    """The best element that moves a group and all that is nested in it, and what it gains over what is.

    Args:
        problem: of which this is a step.
        plan: how the group is matched.
        places: those that count, at least one.
        reference: tensors ``(rows, *shape)``, those of the plan.
        moved: likewise, the weights as they stand.
        solve: matches the units' own spaces.
    """
    spec, parts = unit_spec(problem.spec, plan, tuple(places), problem.symmetries)
    near, far = _by_unit(spec, parts, reference), _by_unit(spec, parts, moved)
    rows, size = len(next(iter(near.values()))), plan.size
    score, elements = _pairs(problem, spec, near, far, solve, crossed=plan.permute)
    if plan.permute:
        source = assign(score)
        found = score.gather(2, source.unsqueeze(2)).squeeze(2)
    else:
        source, found = torch.arange(size, device=score.device).expand(rows, size), score.squeeze(2)
    move: Element = {plan.group: source} if plan.permute else {}
    for name, values in elements.items():
        if name == plan.group:  # it has scalings, and so stands in the space of one unit
            continue
        move[name] = _whole(problem.spec, plan, name, _chosen(values, source, crossed=plan.permute))
    now = _value(near, far, changed=_changes(spec, problem.symmetries))
    return found.sum(1) - now.sum(1), {name: move[name] for name in plan.values if name in move}


def _by_unit(spec: WeightSpec, parts: Sequence[Part], weights: Weights) -> Weights:
    """Tensors ``(rows, units, *shape of one unit)``."""
    found = {}
    for part in parts:
        place, tensor = part.place, weights[part.place.tensor]
        cell = cell_view(tensor.reshape(len(tensor), math.prod(tensor.shape[1:])), place.cell)
        units = cell.movedim(1 + place.dim, 1)
        found[part.name] = units.reshape(*units.shape[:2], *spec.tensors[part.name].shape)
    return found


def _pairs(
    problem: Problem, spec: WeightSpec, near: Weights, far: Weights, solve: Solve, *, crossed: bool
) -> tuple[Tensor, Element]:
    """What every unit can contribute at every place, and by which element, (rows, places, units, ...)."""
    plans = make_plans(spec, problem.symmetries)
    # groups that do not meet are each matched exactly in one run; others from two sides
    restarts = 2 if any(plan.neighbours for plan in plans) else 1
    changed = _changes(spec, problem.symmetries)
    rows, size = next(iter(near.values())).shape[:2]
    per_place = (size if crossed else 1) * spec.num_parameters
    scores, elements = [], []
    for row, places in _split(rows, size, max(1, _CHUNK // per_place)):
        some = Problem(
            spec,
            problem.symmetries,
            plans,
            {name: w[row, places].unsqueeze(2) for name, w in near.items()},
            {
                name: w[row].unsqueeze(1) if crossed else w[row, places].unsqueeze(2)
                for name, w in far.items()
            },
            (row.stop - row.start, places.stop - places.start, size if crossed else 1),
            problem.dtype,
            restarts,
            1,
            problem.max_sweeps,
            problem.seed,
        )
        found = solve(some)
        value = found.distance_after.square() / -2 if changed else found.objective
        scores.append(value.view(some.batch))
        elements.append(
            {name: values.view(*some.batch, *values.shape[1:]) for name, values in found.element.items()}
        )
    joined = {
        name: torch.cat([part[name].flatten(0, 1) for part in elements]).view(
            rows, size, *elements[0][name].shape[2:]
        )
        for name in elements[0]
    }
    return torch.cat([score.flatten(0, 1) for score in scores]).view(rows, size, -1), joined


def _split(rows: int, size: int, most: int) -> list[tuple[slice, slice]]:
    """Rows in parts of so many places; where one row has more, its places in parts."""
    if most >= size:
        step = most // size
        return [
            (slice(first, min(first + step, rows)), slice(0, size)) for first in range(0, max(rows, 1), step)
        ]
    return [
        (slice(row, row + 1), slice(first, min(first + most, size)))
        for row in range(rows)
        for first in range(0, size, most)
    ]


def _changes(spec: WeightSpec, symmetries: Sequence[str]) -> bool:
    """Whether matching may change norms."""
    return any(scaling.kind in symmetries and scaling.kind != "sign" for scaling in spec.scalings.values())


def _value(near: Weights, far: Weights, *, changed: bool) -> Float[Tensor, "rows units"]:
    """What units contribute where they are."""
    total: Tensor | float = 0.0
    for name, a in near.items():
        a, b = (side.reshape(*a.shape[:2], math.prod(a.shape[2:])) for side in (a, far[name]))
        total = total + ((a - b).square() / -2 if changed else a * b).sum(2, dtype=torch.float64)
    return torch.as_tensor(total)


def _chosen(values: Tensor, source: Tensor, *, crossed: bool) -> Tensor:
    """Of (rows, places, units, ...) those of the unit that goes to each place."""
    if not crossed:
        return values.squeeze(2)
    index = source.view(*source.shape, *[1] * (values.ndim - 2))
    return values.gather(2, index.expand(*source.shape, 1, *values.shape[3:])).squeeze(2)


def _whole(spec: WeightSpec, plan: Plan, name: str, values: Tensor) -> Tensor:
    """Values of what is nested, (rows, places, ...), with the places where the whole spec has them."""
    group = name if name in spec.groups else spec.scalings[name].group
    if group == plan.group:
        return values.squeeze(2)
    return values.movedim(1, 1 + spec.groups[group].within.index(plan.group))
