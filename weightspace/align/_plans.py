"""What matching does with each group of a spec: where its units occur, and what may be done to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from weightspace.errors import SpecError
from weightspace.spec import Cell, WeightSpec


@dataclass(frozen=True, slots=True)
class Place:
    """One dim of a parameter's cell that runs over the group.

    Args:
        tensor: its name.
        cell: the cell.
        dim: the dim's position in it.
        sign: whether a flip of the unit's sign flips what is here.
        phase: whether an odd step of the unit's phase flips what is here.
        shift: what one step of the unit's phase adds here.
    """

    tensor: str
    cell: Cell
    dim: int
    sign: bool = False
    phase: bool = False
    shift: float = 0.0

    @property
    def kind(self) -> int:
        """What flips it, as a number: 1 for a sign, 2 for a phase, 3 for either, 0 for neither."""
        return int(self.sign) + 2 * int(self.phase)


@dataclass(frozen=True, slots=True)
class Plan:
    """How one group is matched.

    Args:
        group: its name.
        size: how many units it has.
        permute: whether its units may change places.
        sign: the scaling by which its units may be flipped, if any.
        phase: the scaling by which their phases may be shifted, if any.
        places: where it occurs in parameters.
        neighbours: groups that share a cell with it: their similarities change when it moves.
    """

    group: str
    size: int
    permute: bool
    sign: str | None
    phase: str | None
    places: tuple[Place, ...]
    neighbours: frozenset[str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that it moves."""
        return tuple(dict.fromkeys(place.tensor for place in self.places))

    @property
    def values(self) -> tuple[str, ...]:
        """The names in an element that it decides."""
        scalings = [name for name in (self.sign, self.phase) if name is not None]
        return (*([self.group] if self.permute else []), *scalings)

    @property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """Signs and parities of phase steps that a unit may take; the first changes nothing."""
        signs = (1, -1) if self.sign is not None else (1,)
        parities = (0, 1) if self.phase is not None else (0,)
        return tuple((sign, parity) for parity in parities for sign in signs)

    @property
    def shifted(self) -> int:
        """The kind of the places that phases shift; 0 if there are none."""
        return next((place.kind for place in self.places if place.shift), 0)


def factor(kind: int, sign: int, parity: int) -> int:
    """What a sign and the parity of a phase's steps multiply places of this kind by."""
    return (sign if kind & 1 else 1) * (1 - 2 * parity if kind & 2 else 1)


@lru_cache(maxsize=64)
def make_plans(spec: WeightSpec, symmetries: tuple[str, ...]) -> tuple[Plan, ...]:
    """One plan per group that parameters know, in the order of the spec.

    Raises:
        SpecError: nested or repeated groups, several signs or phases of one group, or phases that shift places
            that are flipped differently.
    """
    for group in spec.groups.values():
        if group.within:
            raise SpecError(
                f"group {group.name!r} is nested within {', '.join(group.within)}: "
                "not yet supported by weight_matching"
            )
    plans = (_plan(spec, name, symmetries) for name in spec.groups)
    return tuple(plan for plan in plans if plan.places)


def _plan(spec: WeightSpec, group: str, symmetries: Sequence[str]) -> Plan:
    sign = _scaling(spec, group, "sign") if "sign" in symmetries else None
    phase = _scaling(spec, group, "phase") if "phase" in symmetries else None
    places = _places(spec, group, sign, phase)
    _check_shifted(group, [place for place in places if place.shift])
    shared = {dim.group for place in places for dim in place.cell.dims} - {group, None}
    neighbours = frozenset(other for other in shared if other is not None)
    return Plan(group, spec.groups[group].size, "permutation" in symmetries, sign, phase, places, neighbours)


def _check_shifted(group: str, places: Sequence[Place]) -> None:
    alone = all(dim.group in (None, group) for place in places for dim in place.cell.dims)
    if not alone or len({place.kind for place in places}) > 1:
        raise SpecError(
            f"group {group!r}: its phase shifts what is not flipped unit by unit, "
            "which is not yet supported by weight_matching"
        )


def _scaling(spec: WeightSpec, group: str, kind: str) -> str | None:
    found = [name for name, s in spec.scalings.items() if s.group == group and s.kind == kind]
    if len(found) > 1:
        raise SpecError(
            f"group {group!r} has the {kind} scalings {', '.join(found)}: "
            "more than one is not yet supported by weight_matching"
        )
    return found[0] if found else None


def _places(spec: WeightSpec, group: str, sign: str | None, phase: str | None) -> tuple[Place, ...]:
    signs, phases = _odd(spec, sign), _odd(spec, phase)
    shifts = _shifts(spec, phase)
    places = []
    for name, tensor in spec.tensors.items():
        for number, cell in enumerate(tensor.cells if tensor.kind == "parameter" else ()):
            dims = [position for position, dim in enumerate(cell.dims) if dim.group == group]
            if len(dims) > 1:
                raise SpecError(
                    f"group {group!r} is repeated in a cell of tensor {name!r}: "
                    "not yet supported by weight_matching"
                )
            for dim in dims:
                at = (name, number, dim)
                places.append(Place(name, cell, dim, at in signs, at in phases, shifts.get(at, 0.0)))
    return tuple(places)


def _odd(spec: WeightSpec, scaling: str | None) -> set[tuple[str, int, int]]:
    exponents = spec.scalings[scaling].exponents if scaling is not None else ()
    return {(place.tensor, place.cell, place.dim) for place in exponents if place.power % 2}


def _shifts(spec: WeightSpec, phase: str | None) -> dict[tuple[str, int, int], float]:
    if phase is None:
        return {}
    scaling = spec.scalings[phase]
    return {
        (place.tensor, place.cell, place.dim): scaling.shift * place.power
        for place in scaling.shifts
        if scaling.shift * place.power
    }
