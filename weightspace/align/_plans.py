"""What matching does with each group of a spec: where its units occur, and what may be done to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from weightspace.errors import SpecError
from weightspace.spec import Cell, WeightSpec
from weightspace.spec._types import Exponent

Position = tuple[str, int, int]  # a tensor, the number of a cell, the position of a dim


@dataclass(frozen=True, slots=True)
class Place:
    """One dim of a parameter's cell that runs over the group.

    Args:
        tensor: its name.
        number: the cell's, in the tensor.
        cell: the cell.
        dim: the dim's position in it.
        signs: the scalings of which a flip flips what is here.
        phase: whether an odd step of the unit's phase flips what is here.
        powers: the positive scalings that multiply what is here, and with which power.
        shift: what one step of the unit's phase adds here.
    """

    tensor: str
    number: int
    cell: Cell
    dim: int
    signs: frozenset[str] = frozenset()
    phase: bool = False
    powers: tuple[tuple[str, int], ...] = ()
    shift: float = 0.0

    @property
    def kind(self) -> int:
        """What flips it, as a number: 1 for a sign, 2 for a phase, 3 for either, 0 for neither."""
        return int(bool(self.signs)) + 2 * int(self.phase)

    @property
    def key(self) -> tuple[frozenset[str], bool, tuple[tuple[str, int], ...]]:
        """What may be done to it: products of places with the same key can be added up."""
        return self.signs, self.phase, self.powers


@dataclass(frozen=True, slots=True)
class Plan:
    """How one group, with all that is nested in it, is matched.

    Args:
        group: its name; it lies within no other.
        size: how many units it has.
        permute: whether its units may change places.
        signs: the scalings by which its units may be flipped.
        phase: the scaling by which their phases may be shifted, if any.
        positives: the scalings by which its units may be multiplied.
        places: where it occurs in parameters.
        neighbours: groups within no other that share a cell with it: their similarities change when it moves.
        values: the names in an element that it decides.
        inner: the groups that are nested in it.
        repeated: whether some cell has two dims that run over it.
    """

    group: str
    size: int
    permute: bool
    signs: tuple[str, ...]
    phase: str | None
    positives: tuple[str, ...]
    places: tuple[Place, ...]
    neighbours: frozenset[str]
    values: tuple[str, ...]
    inner: tuple[str, ...] = ()
    repeated: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that it moves."""
        return tuple(dict.fromkeys(place.tensor for place in self.places))

    @property
    def plain(self) -> bool:
        """Whether compiled code knows how to match it."""
        return not (self.inner or self.repeated or self.positives or len(self.signs) > 1)

    @property
    def shifted(self) -> int:
        """The kind of the places that phases shift; 0 if there are none."""
        return next((place.kind for place in self.places if place.shift), 0)


@lru_cache(maxsize=256)
def make_plans(spec: WeightSpec, symmetries: tuple[str, ...]) -> tuple[Plan, ...]:
    """One plan per group that lies within no other and that parameters know, in the order of the spec.

    Raises:
        SpecError: a group within two that are independent of each other, a group three times in one cell, one with
            nested groups twice, or phases of a repeated group or of places that are flipped differently.
    """
    for group in spec.groups:
        _check_chain(spec, group)
    top = [name for name, group in spec.groups.items() if not group.within]
    plans = (_plan(spec, name, symmetries) for name in top)
    return tuple(plan for plan in plans if plan.places)


def outermost(spec: WeightSpec, group: str) -> str:
    """The group within no other that a group lies in, or itself."""
    return next((outer for outer in spec.groups[group].within if not spec.groups[outer].within), group)


def _check_chain(spec: WeightSpec, group: str) -> None:
    for one, other in combinations(spec.groups[group].within, 2):
        if one not in spec.groups[other].within and other not in spec.groups[one].within:
            raise SpecError(
                f"group {group!r} lies within {one!r} and {other!r}, of which neither lies within the other: "
                "not supported by weight_matching"
            )


def _plan(spec: WeightSpec, group: str, symmetries: Sequence[str]) -> Plan:
    inner = tuple(name for name, other in spec.groups.items() if group in other.within)
    signs, phases, positives = (
        _scalings(spec, (group,), (kind,)) if kind in symmetries else ()
        for kind in ("sign", "phase", "positive")
    )
    if len(phases) > 1:
        raise SpecError(
            f"group {group!r} has the phase scalings {', '.join(phases)}: "
            "more than one is not supported by weight_matching"
        )
    places = _places(spec, group, signs, phases, positives)
    met = {outermost(spec, dim.group) for place in places for dim in place.cell.dims if dim.group is not None}
    groups = (group, *inner)
    plan = Plan(
        group,
        spec.groups[group].size,
        "permutation" in symmetries,
        signs,
        phases[0] if phases else None,
        positives,
        places,
        frozenset(met - {group}),
        (*(groups if "permutation" in symmetries else ()), *_scalings(spec, groups, symmetries)),
        inner,
        len({(place.tensor, place.number) for place in places}) < len(places),
    )
    _check_repeated(plan)
    _check_shifted(plan)
    return plan


def _check_repeated(plan: Plan) -> None:
    counts = Counter((place.tensor, place.number) for place in plan.places)
    (tensor, _), most = counts.most_common(1)[0] if counts else (("", 0), 0)
    reason = {
        f"occurs {most} times in a cell of tensor {tensor!r}": most > 2,
        f"is repeated in a cell of tensor {tensor!r} and has groups nested in it": plan.repeated
        and bool(plan.inner),
        f"is repeated in a cell of tensor {tensor!r} and has a phase": plan.repeated
        and plan.phase is not None,
    }
    for text, refused in reason.items():
        if refused:
            raise SpecError(f"group {plan.group!r} {text}: not supported by weight_matching")


def _check_shifted(plan: Plan) -> None:
    shifted = () if plan.inner else tuple(place for place in plan.places if place.shift)
    alone = all(
        dim.group in (None, plan.group) or dim.size == 1 for place in shifted for dim in place.cell.dims
    )
    if not alone or len({place.key for place in shifted}) > 1 or any(place.powers for place in shifted):
        raise SpecError(
            f"group {plan.group!r}: its phase shifts what is not flipped unit by unit, "
            "which is not supported by weight_matching"
        )


def _scalings(spec: WeightSpec, groups: Sequence[str], kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name, s in spec.scalings.items() if s.group in groups and s.kind in kinds)


def _places(
    spec: WeightSpec, group: str, signs: Sequence[str], phases: Sequence[str], positives: Sequence[str]
) -> tuple[Place, ...]:
    flips = {name: _powers(spec, name) for name in (*signs, *phases)}
    powers = {name: _powers(spec, name) for name in positives}
    shifts = {at: value for name in phases for at, value in _shifts(spec, name).items()}
    return tuple(
        Place(
            *(at[0], at[1], cell, at[2]),
            frozenset(name for name in signs if flips[name].get(at, 0) % 2),
            any(flips[name].get(at, 0) % 2 for name in phases),
            tuple((name, powers[name][at]) for name in positives if powers[name].get(at)),
            shifts.get(at, 0.0),
        )
        for at, cell in _positions(spec, group)
    )


def _positions(spec: WeightSpec, group: str) -> list[tuple[Position, Cell]]:
    return [
        ((name, number, position), cell)
        for name, tensor in spec.tensors.items()
        for number, cell in enumerate(tensor.cells if tensor.kind == "parameter" else ())
        for position, dim in enumerate(cell.dims)
        if dim.group == group
    ]


def _powers(spec: WeightSpec, scaling: str) -> dict[Position, int]:
    return _summed(spec.scalings[scaling].exponents)


def _shifts(spec: WeightSpec, phase: str) -> dict[Position, float]:
    scaling = spec.scalings[phase]
    return {at: scaling.shift * power for at, power in _summed(scaling.shifts).items()}


def _summed(exponents: Sequence[Exponent]) -> dict[Position, int]:
    powers: Counter[Position] = Counter()
    for place in exponents:
        powers[place.tensor, place.cell, place.dim] += place.power
    return dict(powers)
