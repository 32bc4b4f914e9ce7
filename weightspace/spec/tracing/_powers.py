"""Powers: how a value scales when the units of one atom are scaled, as a linear form in unknowns.

Each dim of each parameter has one unknown: the power with which a scaling of its units multiplies it. Along
the graph, powers add under products and must agree under sums; what must vanish is collected as equations.
Positive factors have rational powers; signs have powers modulo 2, a system of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

Power = tuple[tuple[int, Fraction], ...]
"""A linear form: (unknown, coefficient) pairs, sorted, without zeros; ``()`` is zero."""


def times(power: Power, factor: Fraction | int) -> Power:
    """``factor * power``."""
    return tuple((at, value * factor) for at, value in power) if factor else ()


def plus(first: Power, second: Power) -> Power:
    """The sum of two forms."""
    if not first or not second:
        return first or second
    total = dict(first)
    for at, value in second:
        total[at] = total.get(at, Fraction(0)) + value
    return tuple(sorted((at, value) for at, value in total.items() if value))


def unknown(at: int) -> Power:
    """The form that is one unknown."""
    return ((at, Fraction(1)),)


def null_space(
    equations: Iterable[Power], unknowns: Sequence[int], modulus: int | None
) -> list[dict[int, int]]:
    """Integer solutions that span those of ``equations == 0``, over the rationals or modulo 2.

    Every solution sets one free unknown to its least value and the other free ones to 0.
    """
    pivots = _eliminate(equations, unknowns, modulus)
    free = [at for at in unknowns if at not in pivots]
    return [_solution(at, pivots, modulus) for at in free]


def _eliminate(
    equations: Iterable[Power], unknowns: Sequence[int], modulus: int | None
) -> dict[int, dict[int, Fraction]]:
    """Reduced rows by the unknown each one solves for: the last of its unknowns, so that first ones stay free."""
    rank = {at: place for place, at in enumerate(unknowns)}
    pivots: dict[int, dict[int, Fraction]] = {}
    for equation in equations:
        row = _reduced(dict(equation), pivots, modulus)
        if not row:
            continue
        pivot = max(row, key=lambda at: rank[at])
        row = _scaled(row, 1 / row[pivot], modulus)
        for at, other in pivots.items():
            if pivot in other:
                pivots[at] = _combined(other, row, -other[pivot], modulus)
        pivots[pivot] = row
    return pivots


def _reduced(
    row: dict[int, Fraction], pivots: Mapping[int, dict[int, Fraction]], modulus: int | None
) -> dict[int, Fraction]:
    row = _scaled(row, Fraction(1), modulus)
    for at in list(row):
        if at in pivots and at in row:
            row = _combined(row, pivots[at], -row[at], modulus)
    return row


def _combined(
    row: dict[int, Fraction], other: Mapping[int, Fraction], factor: Fraction, modulus: int | None
) -> dict[int, Fraction]:
    total = dict(row)
    for at, value in other.items():
        total[at] = total.get(at, Fraction(0)) + factor * value
    return _scaled(total, Fraction(1), modulus)


def _scaled(row: Mapping[int, Fraction], factor: Fraction, modulus: int | None) -> dict[int, Fraction]:
    scaled = {at: value * factor for at, value in row.items()}
    if modulus is not None:
        scaled = {at: value % modulus for at, value in scaled.items()}
    return {at: value for at, value in scaled.items() if value}


def _solution(free: int, pivots: Mapping[int, Mapping[int, Fraction]], modulus: int | None) -> dict[int, int]:
    values = {free: Fraction(1)}
    values |= {at: -row[free] for at, row in pivots.items() if free in row}
    if modulus is not None:
        return {at: int(value % modulus) for at, value in values.items() if value % modulus}
    scale = lcm(*(value.denominator for value in values.values()))
    whole = {at: int(value * scale) for at, value in values.items()}
    common = gcd(*whole.values())
    return {at: value // common for at, value in whole.items()}
