"""Scalings at work: what they multiply, what phases shift, and which of them flip what a phase shifts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.spec._cells import cell_view, spread
from weightspace.spec._types import Exponent, Scaling, WeightSpec


def multiply(spec: WeightSpec, scaling: Scaling, values: Tensor, moved: Mapping[str, Tensor]) -> None:
    """Multiply flattened tensors in place, in the wider of their type and that of the values."""
    for place in scaling.exponents:
        for flat in stored_as(spec, place.tensor, moved):
            update(spec, place, flat, _factor(scaling, values, place.power, flat), Tensor.mul_)


def shift(spec: WeightSpec, scaling: Scaling, values: Tensor, moved: Mapping[str, Tensor]) -> None:
    """Add the steps of a phase to flattened tensors in place."""
    for place in scaling.shifts:
        for flat in stored_as(spec, place.tensor, moved):
            steps = values.to(flat.device, torch.promote_types(flat.dtype, torch.float32))
            update(spec, place, flat, steps * (scaling.shift * place.power), Tensor.add_)


def stored_as(spec: WeightSpec, tensor: str, moved: Mapping[str, Tensor]) -> list[Tensor]:
    """What ``moved`` holds of a tensor, under its own name and under those it is tied to."""
    return [moved[name] for name in (tensor, *spec.tensors[tensor].aliases) if name in moved]


def update(
    spec: WeightSpec,
    place: Exponent,
    flat: Tensor,
    values: Tensor,
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Combine a flattened tensor, in place, with a value per unit of the dim at ``place``."""
    cell = spec.tensors[place.tensor].cells[place.cell]
    dim = cell.dims[place.dim]
    operation(cell_view(flat, cell), spread(values, (*dim.parents, place.dim), len(cell.dims)))


def _factor(scaling: Scaling, values: Tensor, power: int, flat: Tensor) -> Tensor:
    if scaling.kind == "positive":
        factor = values.to(flat.device, torch.promote_types(values.dtype, flat.dtype))
        return factor if power == 1 else factor**power
    return flipped(scaling, values, power).to(flat)


def flipped(scaling: Scaling, values: Tensor, power: int = 1) -> Tensor:
    """The signs 1 and -1 with which a sign or a phase multiplies what has this power."""
    if scaling.kind == "sign":
        return values if power % 2 else torch.ones_like(values)
    return 1 - 2 * ((values * power) % 2)


def flips(spec: WeightSpec, phase: Scaling, element: Mapping[str, Tensor]) -> Tensor | None:
    """What an element multiplies the bias of a phase by, per unit of its group; None where it does not.

    Every sign may take part, also one of an outer group, and every phase, also this one itself: with powers
    that flip the bias, an odd step is ``b -> shift - b``.

    Raises:
        SpecError: the element flips the bias other than unit by unit of the phase's group, so that no step
            per unit stands for a shift after the flip.
    """
    unit_by_unit, otherwise = _flipping(spec, phase)
    for name in sorted(otherwise):
        if name in element and bool((flipped(spec.scalings[name], element[name]) != 1).any()):
            raise SpecError(
                f"element: {name!r} flips what {phase.name!r} shifts, but not unit by unit of {phase.group!r}: "
                "such elements have neither products nor inverses"
            )
    ndim = 1 + len(spec.groups[phase.group].within)
    factors = [
        spread(flipped(spec.scalings[name], element[name]), positions, ndim)
        for name, positions in unit_by_unit
        if name in element
    ]
    return reduce(torch.mul, factors) if factors else None


def _flipping(spec: WeightSpec, phase: Scaling) -> tuple[list[tuple[str, tuple[int, ...]]], set[str]]:
    """Scalings that flip what a phase shifts: those whose units are the phase's or their outer ones, and others.

    The first come with the positions of their units among the phase's: the outer groups', then its own.
    """
    found = [_flipping_at(spec, place) for place in phase.shifts]
    everywhere = set.intersection(*found) if found else set()
    unit_by_unit = sorted((name, positions) for name, positions in everywhere if positions is not None)
    otherwise = {name for name, _ in set.union(*found, set()) - set(unit_by_unit)}
    return unit_by_unit, otherwise


def _flipping_at(spec: WeightSpec, shifted: Exponent) -> set[tuple[str, tuple[int, ...] | None]]:
    dims = spec.tensors[shifted.tensor].cells[shifted.cell].dims
    units = (*dims[shifted.dim].parents, shifted.dim)
    powers = Counter[tuple[str, tuple[int, ...]]]()
    for name, scaling in spec.scalings.items():
        for place in scaling.exponents if scaling.kind != "positive" else ():
            if (place.tensor, place.cell) == (shifted.tensor, shifted.cell):
                powers[name, (*dims[place.dim].parents, place.dim)] += place.power
    odd = [key for key, power in powers.items() if power % 2]
    return {(name, tuple(units.index(p) for p in at) if {*at} <= {*units} else None) for name, at in odd}
