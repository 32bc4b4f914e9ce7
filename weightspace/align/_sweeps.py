"""Matching as operations on whole batches: any size, any device, and the reference for compiled code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from weightspace.align._assignment import assign
from weightspace.align._plans import Place, Plan, factor
from weightspace.align._problem import Outcome, Problem, check_norms
from weightspace.spec import Element, Weights, WeightSpec, cell_view

_CHUNK = 2**22  # entries of the similarity matrices that exist at once: 16 MB in float32


def match(problem: Problem) -> Outcome:
    """Match every pair from every start, and keep the best."""
    pairs = _Pairs.of(problem)
    runs = (_run(pairs, restart) for restart in range(problem.restarts))
    best = reduce(lambda kept, run: _better(pairs, kept, run), runs)
    return Outcome(
        best.element,
        _objective(pairs, best.moved),
        _squares(pairs, pairs.weights).sqrt(),
        _squares(pairs, best.moved).sqrt(),
        best.sweeps,
    )


# -- the pairs, and where a run stands ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The parameters of all pairs, in the dtype of accumulation.

    Args:
        problem: what is to be matched.
        reference: tensors ``(pairs, *shape)``.
        weights: tensors ``(pairs, *shape)``.
        scale: per tensor and pair, what no inner product can exceed.
    """

    problem: Problem
    reference: Weights
    weights: Weights
    scale: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem) -> _Pairs:
        a, b = (_expanded(problem, side) for side in (problem.reference, problem.weights))
        norms = [{name: _norm(tensor) for name, tensor in side.items()} for side in (a, b)]
        together = torch.stack([torch.stack(list(side.values()), 1) for side in norms], 1)
        check_norms(problem, together.cpu().numpy())
        scale = {
            name: (norm.square() + norms[1][name].square()) / 2
            if name in problem.shifted
            else norm * norms[1][name]
            for name, norm in norms[0].items()
        }
        return cls(problem, a, b, scale)

    def threshold(self, names: Sequence[str]) -> Tensor:
        """The gain in these tensors' inner product, per pair, that is no more than rounding."""
        return self.problem.tolerance * torch.stack([self.scale[name] for name in names]).sum(0)


def _expanded(problem: Problem, side: Mapping[str, Tensor]) -> Weights:
    return {
        name: side[name]
        .to(problem.dtype)
        .expand((*problem.batch, *problem.spec.tensors[name].shape))
        .reshape(problem.pairs, *problem.spec.tensors[name].shape)
        for name in problem.parameters
    }


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_flat(tensor), dim=-1, dtype=torch.float64)


@dataclass(slots=True)
class _Run:
    """Where one run stands: ``moved`` is ``element`` acting on the weights.

    ``stale`` marks, per group, the pairs in which a neighbour has moved since the group was last matched.
    Matching any other would find what it found before, so a pair without a mark is done.
    """

    element: Element
    moved: Weights
    stale: dict[str, Tensor]
    sweeps: Tensor


def _start(pairs: _Pairs, restart: int) -> _Run:
    problem = pairs.problem
    count, device = problem.pairs, problem.device
    element = {
        name: value.to(device).expand(count, -1).clone() for name, value in problem.start(restart).items()
    }
    stale = {plan.group: torch.ones(count, dtype=torch.bool, device=device) for plan in problem.plans}
    sweeps = torch.zeros(count, dtype=torch.long, device=device)
    return _Run(element, problem.spec.act(element, pairs.weights), stale, sweeps)


def _match_forward(pairs: _Pairs, run: _Run) -> None:
    """Match the groups one after the other, each by what it shares with those before it alone.

    Two shuffled copies of one network agree on nothing behind a layer that is still shuffled; layer by layer
    from the input they agree on everything.
    """
    done: set[str | None] = {None}
    everyone = torch.arange(pairs.problem.pairs, device=pairs.problem.device)
    for plan in pairs.problem.plans:
        done.add(plan.group)
        settled = [p for p in plan.places if done.issuperset(dim.group for dim in p.cell.dims)]
        _match(pairs, run, plan, everyone, settled)
    for stale in run.stale.values():
        stale.fill_(True)


def _run(pairs: _Pairs, restart: int) -> _Run:
    """Sweep over the groups until no pair has anything left to gain."""
    problem = pairs.problem
    orders = problem.orders(restart).tolist()
    run = _start(pairs, restart)
    if restart == problem.by_layer:
        _match_forward(pairs, run)
    for sweep in range(problem.max_sweeps if problem.plans else 0):
        active = torch.stack(list(run.stale.values())).any(0)
        if not bool(active.any()):
            break
        run.sweeps += active
        for position in orders[sweep % len(orders)]:
            plan = problem.plans[position]
            _match(pairs, run, plan, run.stale[plan.group].nonzero()[:, 0], plan.places)
    return run


# -- one group ---------------------------------------------------------------------------------------------


def _match(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, places: Sequence[Place]) -> None:
    """Match the group in the pairs ``rows`` by what it holds at ``places``, in place."""
    for part in rows.split(max(1, _CHUNK // plan.size**2)):
        if len(part) and places:
            _match_part(pairs, run, plan, part, places)


def _match_part(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, places: Sequence[Place]) -> None:
    """Find the best permutation, signs and steps, and take them where they are better than what is."""
    sums = _compare(pairs, run, places, rows)
    score = reduce(torch.maximum, (sums.turned(plan, *turn)[0] for turn in plan.turns))
    source = assign(score) if plan.permute else _stay(score)
    found, move = _decide(plan, sums.chosen(source))
    now = sums.chosen(_stay(score)).products(1, 0).sum(-1, dtype=torch.float64)
    better = found - now > pairs.threshold(plan.tensors)[rows]
    run.stale[plan.group][rows] = False
    if plan.permute:
        move[plan.group] = source
    if bool(better.any()):
        _apply(pairs, run, plan, rows[better], {name: value[better] for name, value in move.items()})


@dataclass(frozen=True, slots=True)
class _Sums:
    """Inner products of the units as they stand, and what phases see of either side.

    Args:
        kinds: by :attr:`Place.kind`, (rows, size, size): of units of the reference with units of the weights.
        near: (rows, size, 1) float64, sum of shift times reference; None where nothing is shifted.
        far: (rows, 1, size) float64, sum of shift times weights.
        squares: sum of squares of the shifts.
    """

    kinds: dict[int, Tensor]
    near: Tensor | None
    far: Tensor | None
    squares: float

    def chosen(self, source: Tensor) -> _Sums:
        """Those of every place with the unit that goes there, (rows, size)."""
        kinds = {kind: _taken(values, source) for kind, values in self.kinds.items()}
        if self.near is None or self.far is None:
            return _Sums(kinds, None, None, 0.0)
        return _Sums(kinds, self.near.squeeze(2), self.far.squeeze(1).gather(1, source), self.squares)

    def products(self, sign: int, parity: int) -> Tensor:
        """Inner products with this sign and this parity of the steps."""
        return reduce(torch.add, (factor(kind, sign, parity) * part for kind, part in self.kinds.items()))

    def turned(self, plan: Plan, sign: int, parity: int) -> tuple[Tensor, Tensor | int]:
        """What units contribute with this sign and parity, and the best steps of that parity.

        A shift by k steps c of what stands at b gains ``k c (a - b) - (k c)^2 / 2``, less what the norm grows.
        """
        value = self.products(sign, parity)
        if self.near is None or self.far is None:
            return value, parity
        seen = self.near - factor(plan.shifted, sign, parity) * self.far
        step = parity + 2.0 * torch.round((seen / self.squares - parity) / 2)
        return value + (step * seen - self.squares / 2 * step.square()).to(value), step


def _decide(plan: Plan, sums: _Sums) -> tuple[Tensor, Element]:
    """The sums of what the chosen units can contribute, (rows,), and the signs and steps with which they do."""
    best, signs, steps = None, None, None
    for sign, parity in plan.turns:
        value, step = sums.turned(plan, sign, parity)
        turn = torch.full_like(value, sign), torch.zeros_like(value) + step
        if best is None or signs is None or steps is None:
            best, (signs, steps) = value, turn
            continue
        more = value > best
        best = torch.where(more, value, best)
        signs, steps = (torch.where(more, new, old) for new, old in zip(turn, (signs, steps), strict=True))
    assert best is not None
    assert signs is not None
    assert steps is not None
    move: Element = {plan.sign: signs.to(torch.get_default_dtype())} if plan.sign is not None else {}
    if plan.phase is not None:
        move[plan.phase] = steps.long()
    return best.sum(-1, dtype=torch.float64), move


def _compare(pairs: _Pairs, run: _Run, places: Sequence[Place], rows: Tensor) -> _Sums:
    kinds: dict[int, Tensor] = {}
    near: Tensor | None = None
    far: Tensor | None = None
    squares = 0.0
    for place in sorted(places, key=lambda place: place.kind):
        left = _units(pairs.reference[place.tensor], place, rows)
        right = _units(run.moved[place.tensor], place, rows)
        kinds[place.kind] = (
            torch.baddbmm(kinds[place.kind], left, right.mT)
            if place.kind in kinds
            else torch.bmm(left, right.mT)
        )
        if place.shift:
            near, far = (
                place.shift * units.sum(-1, dtype=torch.float64) + (0.0 if before is None else before)
                for units, before in ((left, near), (right, far))
            )
            squares += place.shift**2 * left.shape[-1]
    if near is None or far is None:
        return _Sums(kinds, None, None, 0.0)
    return _Sums(kinds, near.unsqueeze(2), far.unsqueeze(1), squares)


def _units(tensor: Tensor, place: Place, rows: Tensor) -> Tensor:
    """One row per unit, (rows, size, everything else in the cell); a view of a plain matrix."""
    some = tensor if len(rows) == len(tensor) else tensor[rows]
    units = cell_view(_flat(some), place.cell).movedim(1 + place.dim, 1)
    return units.reshape(*units.shape[:2], math.prod(units.shape[2:]))


def _stay(score: Tensor) -> Tensor:
    """Every unit where it is, (rows, size)."""
    return torch.arange(score.shape[-1], device=score.device).expand(score.shape[:2])


def _taken(score: Tensor, source: Tensor) -> Tensor:
    """``score[row, i, source[row, i]]``."""
    return score.gather(2, source.unsqueeze(2)).squeeze(2)


def _apply(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, move: Element) -> None:
    """Let ``move`` act in the pairs ``rows``; it moves one group, so only that group's tensors change."""
    spec: WeightSpec = pairs.problem.spec
    old = {name: run.element[name][rows] for name in move}
    for name, value in spec.compose(move, old).items():
        run.element[name][rows] = value
    before = {name: run.moved[name][rows] for name in plan.tensors}
    for name, tensor in spec.act(move, before).items():
        run.moved[name][rows] = tensor
    for neighbour in plan.neighbours:
        run.stale[neighbour][rows] = True


# -- scores ------------------------------------------------------------------------------------------------


def _better(pairs: _Pairs, kept: _Run, other: _Run) -> _Run:
    """Per pair, the run that ended higher; the earlier one on ties."""
    gain = _value(pairs, other.moved) - _value(pairs, kept.moved)
    wins = gain > pairs.threshold(list(pairs.scale))

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (new.ndim - 1)), new, old)

    return _Run(
        {name: choose(other.element[name], value) for name, value in kept.element.items()},
        {name: choose(other.moved[name], tensor) for name, tensor in kept.moved.items()},
        {},
        choose(other.sweeps, kept.sweeps),
    )


def _value(pairs: _Pairs, moved: Weights) -> Tensor:
    """What is maximised: the inner product, as long as nothing that is done changes norms."""
    return _squares(pairs, moved) / -2 if pairs.problem.shifted else _objective(pairs, moved)


def _objective(pairs: _Pairs, moved: Weights) -> Tensor:
    products = [
        (_flat(tensor) * _flat(moved[name])).sum(-1, dtype=torch.float64)
        for name, tensor in pairs.reference.items()
    ]
    return torch.stack(products).sum(0)


def _squares(pairs: _Pairs, moved: Weights) -> Tensor:
    squares = [
        (_flat(tensor) - _flat(moved[name])).square().sum(-1, dtype=torch.float64)
        for name, tensor in pairs.reference.items()
    ]
    return torch.stack(squares).sum(0)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
