"""What the units of a group can contribute at best: over signs, phases and positive factors, for any pair of units.

Everything is elementwise: for all pairs of places and units (rows, size, size), or for the chosen ones (rows, size).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Choices = dict[str, Tensor]

_FURTHEST = 7  # factors are sought between exp(-7) and exp(7): no trained unit is a thousand times another
_NEWTON = 6  # from half a unit of log c away this reaches float32's precision
_ROUNDS = 8  # over the factors of one unit, where places are multiplied by several


@dataclass(frozen=True, slots=True)
class Term:
    """Inner products of places to which the same may be done.

    Args:
        signs: the scalings that flip it.
        phase: whether odd steps of the phase flip it.
        powers: the positive scalings that multiply it, and with which power.
        product: inner products of units of the reference with units of the weights.
        square: squared norms of the units of the weights; None where no factor changes them.
    """

    signs: frozenset[str]
    phase: bool
    powers: tuple[tuple[str, int], ...]
    product: Tensor
    square: Tensor | None = None

    @property
    def free(self) -> frozenset[str]:
        """What is still to be decided about it."""
        return self.signs | {name for name, _ in self.powers} | ({"phase"} if self.phase else frozenset())


@dataclass(frozen=True, slots=True)
class Shift:
    """What the steps of a phase add up to.

    Args:
        scaling: its name.
        signs: the scalings that flip what is shifted.
        phase: whether odd steps flip it.
        near: sum of shift times reference, float64.
        far: sum of shift times weights, float64.
        squares: sum of squares of the shifts; 0 where nothing is shifted.
        factor: what decided scalings multiply ``far`` by.
        parity: of the steps; None as long as it is undecided.
    """

    scaling: str
    signs: frozenset[str]
    phase: bool
    near: Tensor | float
    far: Tensor | float
    squares: float
    factor: int = 1
    parity: int | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """All that decides how much a unit contributes at a place."""

    terms: tuple[Term, ...]
    shift: Shift | None = None

    def at(self, source: Tensor) -> Sums:
        """Those of every place with the unit that goes there, (rows, size)."""
        terms = tuple(
            replace(
                term,
                product=term.product.gather(2, source.unsqueeze(2)).squeeze(2),
                square=None if term.square is None else term.square.squeeze(1).gather(1, source),
            )
            for term in self.terms
        )
        if self.shift is None or not isinstance(self.shift.near, Tensor):
            return Sums(terms, self.shift)
        assert isinstance(self.shift.far, Tensor)
        near, far = self.shift.near.squeeze(2), self.shift.far.squeeze(1).gather(1, source)
        return Sums(terms, replace(self.shift, near=near, far=far))

    def unchanged(self) -> Tensor:
        """What units contribute when nothing is done to them."""
        total = self.terms[0].product
        for term in self.terms[1:]:
            total = total + term.product
        return total


def settle(sums: Sums, *, decide: bool) -> tuple[Tensor, Choices]:
    """The most that units can contribute, and if asked by which signs, steps and factors they do.

    That is the inner product, less half of what the squared norm grows. Scalings that share no place are decided
    apart: with one sign per norm of a transformer, all combinations would be too many.
    """
    total, choices = None, Choices()
    for part in _parts(sums):
        value, chosen = _settle_part(part, decide)
        total = value if total is None else total + value
        choices |= chosen
    assert total is not None
    return total, choices


def _parts(sums: Sums) -> list[Sums]:
    """What no scaling joins; first the terms to which nothing can be done."""
    joined: list[tuple[frozenset[str], list[Term]]] = []
    for term in sorted(sums.terms, key=lambda term: len(term.free)):
        free, terms = term.free, [term]
        for other in [entry for entry in joined if entry[0] & free or entry[0] == free]:
            joined.remove(other)
            free, terms = free | other[0], other[1] + terms
        joined.append((free, terms))
    if sums.shift is None:
        return [Sums(tuple(terms)) for _, terms in joined]
    needed = sums.shift.signs | ({"phase"} if sums.shift.parity is None else frozenset())
    # a shift of which all is decided goes with the first: it needs the shape of some term
    chosen = [at for at, (free, _) in enumerate(joined) if free & needed] or [0]
    together = tuple(term for at in chosen for term in joined[at][1])
    apart = [Sums(tuple(terms)) for at, (_, terms) in enumerate(joined) if at not in chosen]
    return [Sums(together, sums.shift), *apart]


def _settle_part(part: Sums, decide: bool) -> tuple[Tensor, Choices]:
    shift = part.shift
    if shift is not None and shift.parity is None:
        return _branch([_with_parity(part, shift, parity) for parity in (0, 1)], decide)
    signs = [*(shift.signs if shift else ()), *(sign for term in part.terms for sign in term.signs)]
    if not signs:
        return _leaf(part, decide)
    # what occurs most often leaves most apart; names in order, so that equal calls do the same
    sign = min(set(signs), key=lambda name: (-signs.count(name), name))
    value, choices = _branch([_with_sign(part, sign, factor) for factor in (1, -1)], decide, (1, -1), sign)
    return value, choices


def _branch(
    parts: Sequence[Sums], decide: bool, options: Sequence[int] = (0, 1), name: str | None = None
) -> tuple[Tensor, Choices]:
    """The best of several, the first of equals."""
    best, choices = None, Choices()
    for option, part in zip(options, parts, strict=True):
        value, chosen = settle(part, decide=decide)
        if name is not None and decide:
            chosen[name] = torch.full_like(value, option)
        if best is None:
            best, choices = value, chosen
            continue
        more = value > best
        best = torch.where(more, value, best)
        choices = {key: torch.where(more, chosen[key], kept) for key, kept in choices.items()}
    assert best is not None
    return best, choices


def _with_parity(part: Sums, shift: Shift, parity: int) -> Sums:
    terms = (
        replace(term, phase=False, product=-term.product if parity and term.phase else term.product)
        for term in part.terms
    )
    factor = -1 if parity and shift.phase else 1
    return Sums(_merged(terms), replace(shift, parity=parity, factor=factor))


def _with_sign(part: Sums, sign: str, factor: int) -> Sums:
    terms = (
        replace(term, signs=term.signs - {sign}, product=factor * term.product)
        if sign in term.signs
        else term
        for term in part.terms
    )
    shift = part.shift
    if shift is not None and sign in shift.signs:
        shift = replace(shift, signs=shift.signs - {sign}, factor=shift.factor * factor)
    return Sums(_merged(terms), shift)


def _merged(terms: Iterable[Term]) -> tuple[Term, ...]:
    """One term for all to which the same may still be done."""
    found: dict[tuple[object, ...], Term] = {}
    for term in terms:
        key = term.signs, term.phase, term.powers
        kept = found.get(key)
        if kept is None:
            found[key] = term
            continue
        square = None if kept.square is None or term.square is None else kept.square + term.square
        found[key] = replace(kept, product=kept.product + term.product, square=square)
    return tuple(found.values())


# -- phases ------------------------------------------------------------------------------------------------


def _leaf(part: Sums, decide: bool) -> tuple[Tensor, Choices]:
    """What is left when signs and parities are decided: factors, and steps of that parity."""
    fixed = [term.product for term in part.terms if not term.powers]
    scaled = [term for term in part.terms if term.powers]
    total: Tensor | None = None
    for product in fixed:
        total = product if total is None else total + product
    choices = Choices()
    if scaled:
        value, choices = _scaled(scaled)
        total = value if total is None else total + value
    if part.shift is not None:
        value, steps = _stepped(part.shift, total)
        total = value if total is None else total + value
        choices[part.shift.scaling] = steps
    assert total is not None
    return total, choices if decide else {}


def _stepped(shift: Shift, like: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the best steps of this parity gain, and the steps.

    A shift by k steps c of what stands at b gains ``k c (a - b) - (k c)^2 / 2``, less what the norm grows.
    """
    assert shift.parity is not None
    if not shift.squares:
        assert like is not None
        return torch.zeros_like(like), torch.full_like(like, shift.parity)
    seen = torch.as_tensor(shift.near - shift.factor * shift.far)
    steps = shift.parity + 2.0 * torch.round((seen / shift.squares - shift.parity) / 2)
    value = steps * seen - shift.squares / 2 * steps.square()
    return value if like is None else value.to(like), steps


# -- positive factors --------------------------------------------------------------------------------------


def _scaled(terms: Sequence[Term]) -> tuple[Tensor, Choices]:
    """The most that terms can be with factors, and the factors: one after the other, in rounds."""
    names = sorted({name for term in terms for name, _ in term.powers})
    zero = torch.zeros_like(terms[0].product)
    logs = dict.fromkeys(names, zero)
    for _ in range(1 if len(names) == 1 else _ROUNDS):
        for name in names:
            logs[name] = _peak(_line(terms, name, logs), logs[name])
    value = zero
    for term in terms:
        assert term.square is not None
        log = sum((power * logs[name] for name, power in term.powers), start=zero)
        value = value + log.exp() * term.product - torch.expm1(2 * log) * term.square / 2
    return value, {name: log.exp() for name, log in logs.items()}


Line = dict[int, tuple[Tensor, Tensor]]
"""Products and squares by the power with which one factor multiplies them."""


def _line(terms: Sequence[Term], name: str, logs: dict[str, Tensor]) -> Line:
    line: Line = {}
    for term in terms:
        powers = dict(term.powers)
        power = powers.pop(name, 0)
        if not power:
            continue
        assert term.square is not None
        held = torch.exp(sum((p * logs[other] for other, p in powers.items()), start=torch.zeros(())))
        product, square = line.get(power, (0.0, 0.0))
        line[power] = (
            product + term.product * held.to(term.product),
            square + term.square * held.square().to(term.product),
        )
    return line


def _peak(line: Line, log: Tensor) -> Tensor:
    """The log of the factor c with the largest ``sum over powers p of c^p product - c^2p square / 2``.

    A coarse search tells which hill is the highest, Newton's method climbs it; what was known stays, where that is
    no lower.
    """
    best, at = _height(line, log), log
    for step in range(-_FURTHEST, _FURTHEST + 1):
        there = torch.full_like(log, step)
        height = _height(line, there)
        at = torch.where(height > best, there, at)
        best = torch.maximum(height, best)
    climbed = at
    for _ in range(_NEWTON):
        slope, curve = _slopes(line, climbed)
        move = torch.where(curve < 0, -slope / curve, slope.sign() / 2).nan_to_num().clamp(-0.5, 0.5)
        climbed = (climbed + move).clamp(-_FURTHEST, _FURTHEST)
    return torch.where(_height(line, climbed) > best, climbed, at)


def _height(line: Line, log: Tensor) -> Tensor:
    total = torch.zeros_like(log)
    for power, (product, square) in line.items():
        factor = torch.exp(power * log)
        total = total + factor * product - factor.square() * square / 2
    return total


def _slopes(line: Line, log: Tensor) -> tuple[Tensor, Tensor]:
    """The first two derivatives by the log of the factor."""
    slope, curve = torch.zeros_like(log), torch.zeros_like(log)
    for power, (product, square) in line.items():
        factor = torch.exp(power * log)
        slope = slope + power * (factor * product - factor.square() * square)
        curve = curve + math.pow(power, 2) * (factor * product - 2 * factor.square() * square)
    return slope, curve
