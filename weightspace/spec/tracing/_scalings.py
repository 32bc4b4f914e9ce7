"""Scalings: the null spaces of the equations that powers must satisfy, atom by atom."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from weightspace.spec.tracing._labels import Shift
from weightspace.spec.tracing._powers import Power, null_space
from weightspace.spec.tracing._program import Program
from weightspace.spec.tracing._trace import Trace


class Solution(NamedTuple):
    """How the units of one atom may scale: a power for each place where the atom stands in a parameter.

    ``powers`` maps unknowns to integers. For a phase, ``shift`` is the bias that moves, by ``pi / factor``.
    """

    atom: int
    kind: Literal["positive", "sign", "phase"]
    powers: Mapping[int, int]
    shift: Shift | None = None


class Place(NamedTuple):
    """Where an unknown stands: the atom of an index of a box of a parameter."""

    tensor: str
    box: int
    atom: int


def find_scalings(trace: Trace, programs: Sequence[Program]) -> list[Solution]:
    """Number the places of live atoms in parameters, run the programs again with powers, and solve.

    The labels of ``trace.parameters`` carry the number of each place, as an unknown, from then on.
    """
    places = _number(trace)
    found: list[Solution] = []
    kinds: tuple[Literal["positive", "sign"], ...] = ("positive", "sign")
    for kind in kinds:
        trace.powers, trace.equations, trace.flips, trace.slack = kind, [], {}, {}
        trace.unknowns = list(range(len(places)))
        for program in programs:
            trace.run(program)
        found += _solve(trace, places, kind)
    trace.powers = None
    return _closed(_independent(found, places, trace), places, trace)


def _number(trace: Trace) -> list[Place]:
    places: list[Place] = []
    for name, label in trace.parameters.items():
        boxes = []
        for number, box in enumerate(label.boxes):
            indices = []
            for index in box.indices:
                if trace.atoms.is_live(index.atom):
                    index = index._replace(power=((len(places), Fraction(1)),))
                    places.append(Place(name, number, index.atom))
                indices.append(index)
            boxes.append(box._replace(indices=tuple(indices)))
        trace.parameters[name] = label._replace(boxes=tuple(boxes))
    return places


def _solve(trace: Trace, places: Sequence[Place], kind: Literal["positive", "sign"]) -> list[Solution]:
    modulus = 2 if kind == "sign" else None
    flips = {at: (trace.atoms.find(atom), shift) for (atom, shift), at in trace.flips.items()}
    owners = {at: {trace.atoms.find(place.atom)} for at, place in enumerate(places)}
    owners |= {at: {atom} for at, (atom, _) in flips.items()}
    owners |= {at: set(trace.atoms.leaves(atom)) for at, atom in trace.slack.items()}
    by_atom = _by_atom(trace, owners)
    found = []
    for atom in dict.fromkeys(atom for atoms in owners.values() for atom in sorted(atoms)):
        mine = [at for at, atoms in owners.items() if atom in atoms and at not in flips]
        turns = [at for at, (of, _) in flips.items() if of == atom]
        still: list[Power] = [((at, Fraction(1)),) for at in turns]
        equations = by_atom.get(atom, [])
        solutions = null_space([*equations, *still], [*turns, *mine], modulus)
        found += [Solution(atom, kind, powers) for powers in solutions]
        for turn in turns:
            others = [form for form in still if form[0][0] != turn]
            phases = null_space([*equations, *others], [*turns, *mine], modulus)
            found += [
                Solution(atom, "phase", {at: n for at, n in powers.items() if at != turn}, flips[turn][1])
                for powers in phases
                if turn in powers
            ]
    seen = [
        solution._replace(powers={at: n for at, n in solution.powers.items() if at < len(places)})
        for solution in found
    ]
    return [s for s in seen if s.powers and (s.kind != "phase" or _can_shift(trace, s))]


def _by_atom(trace: Trace, owners: Mapping[int, set[int]]) -> dict[int, list[Power]]:
    """The equations of each atom, in its unknowns; what scales with anything has one unknown for every atom."""
    found: dict[int, list[Power]] = {}
    for equation in dict.fromkeys(trace.equations):
        bound = [at for at, _ in equation if at not in trace.slack] or [at for at, _ in equation]
        for atom in {atom for at in bound for atom in owners[at]}:
            part = tuple((at, value) for at, value in equation if atom in owners[at])
            found.setdefault(atom, []).append(part)
    return found


def _can_shift(trace: Trace, solution: Solution) -> bool:
    """Whether the bias of a phase holds the atom exactly once everywhere."""
    assert solution.shift is not None
    boxes = trace.parameters[solution.shift.tensor].boxes
    return all(sum(index.atom == solution.atom for index in box.indices) == 1 for box in boxes)


def _closed(found: Sequence[Solution], places: Sequence[Place], trace: Trace) -> list[Solution]:
    """Leave out phases whose bias another group's signs flip: a shift of one unit would become several."""
    return [
        solution
        for solution in found
        if solution.shift is None
        or not any(
            power % 2 and places[at].tensor == solution.shift.tensor
            for other in found
            if other.atom != solution.atom and other.kind != "positive"
            for at, power in other.powers.items()
        )
    ]


def _independent(found: Sequence[Solution], places: Sequence[Place], trace: Trace) -> list[Solution]:
    """Leave out what scales all units nested in an outer unit by the same value: it is another's special case."""
    kept = []
    outer_place = {(place.tensor, place.box, place.atom): at for at, place in enumerate(places)}
    for solution in found:
        inner = [
            other
            for other in found
            if other.kind == solution.kind and _is_within(other.atom, solution.atom, places, trace)
        ]
        lifted = [_lifted(other, solution.atom, places, outer_place) for other in inner]
        modulus = None if solution.kind == "positive" else 2
        if solution.kind == "phase" or not _spanned(solution.powers, lifted, modulus):
            kept.append(solution)
    return kept


def _is_within(inner: int, outer: int, places: Sequence[Place], trace: Trace) -> bool:
    """Whether one atom is nested in another; of two that depend on each other, the one that comes later."""
    if outer not in trace.atoms[inner].parents:
        return False
    if inner not in trace.atoms[outer].parents:
        return True
    boxes: dict[tuple[str, int], list[int]] = {}
    for place in places:
        boxes.setdefault((place.tensor, place.box), []).append(place.atom)
    first = next((atoms for atoms in boxes.values() if inner in atoms and outer in atoms), [outer, inner])
    return first.index(outer) < first.index(inner)


def _lifted(
    inner: Solution, outer: int, places: Sequence[Place], outer_place: Mapping[tuple[str, int, int], int]
) -> dict[int, int]:
    powers: dict[int, int] = {}
    for at, power in inner.powers.items():
        place = outer_place.get((places[at].tensor, places[at].box, outer))
        if place is not None:
            powers[place] = powers.get(place, 0) + power
    return powers


def _spanned(powers: Mapping[int, int], others: Iterable[Mapping[int, int]], modulus: int | None) -> bool:
    """Whether a solution is a combination of others: then no test form tells them apart."""
    vectors = [dict(other) for other in others]
    everything = sorted({at for vector in (powers, *vectors) for at in vector})
    forms = [tuple((at, Fraction(v)) for at, v in sorted(vector.items())) for vector in vectors]
    tests = null_space(forms, everything, modulus)
    values = [sum(test.get(at, 0) * value for at, value in powers.items()) for test in tests]
    return not any(value % modulus if modulus else value for value in values)


def phase_step(shift: Shift) -> float:
    """What one step of a phase adds to the bias of ``sin(factor * (... + bias))``."""
    return math.pi / abs(shift.factor)
