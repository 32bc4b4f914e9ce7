"""Matching as operations on whole batches: any spec, any size, any device, and the reference for compiled code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from weightspace.align import _compiled, _nested, _quadratic, _scales, _units
from weightspace.align._plans import Place, Plan
from weightspace.align._problem import Outcome, Problem, check_norms
from weightspace.align._products import Products
from weightspace.spec import Element, Weights

_CHUNK = 2**22  # entries of the similarity matrices that exist at once: 16 MB in float32


def solve(problem: Problem) -> Outcome:
    """Match in compiled code where that is the way, else here."""
    return _compiled.match(problem) if _compiled.can_match(problem) else match(problem)


def match(problem: Problem) -> Outcome:
    """Match every pair from every start, and keep the best."""
    pairs = _Pairs.of(problem)
    runs = (_run(pairs, restart) for restart in range(problem.restarts))
    best = reduce(lambda kept, run: _better(pairs, kept, run), runs)
    if problem.changed:  # products of factors, and sums of steps, were rounded on the way
        best.moved = problem.spec.act(best.element, pairs.weights)
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
        products: of a single pair, kept up to date.
    """

    problem: Problem
    reference: Weights
    weights: Weights
    scale: dict[str, Tensor]
    products: Products | None

    @classmethod
    def of(cls, problem: Problem) -> _Pairs:
        a, b = (_expanded(problem, side) for side in (problem.reference, problem.weights))
        norms = [{name: _norm(tensor) for name, tensor in side.items()} for side in (a, b)]
        together = torch.stack([torch.stack(list(side.values()), 1) for side in norms], 1)
        check_norms(problem, together.cpu().numpy())
        scale = {
            name: (norm.square() + norms[1][name].square()) / 2
            if name in problem.changed
            else norm * norms[1][name]
            for name, norm in norms[0].items()
        }
        return cls(problem, a, b, scale, Products.of(problem, a, b))

    def threshold(self, names: Sequence[str]) -> Tensor:
        """The gain in these tensors' inner product, per pair, that is no more than rounding."""
        return self.problem.rounding * torch.stack([self.scale[name] for name in names]).sum(0)


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
    Matching any other would find what it found before, so a pair without a mark is done. The tensors ``behind`` have
    not followed the element yet; ``gained`` is by how much the sweep has raised the inner product.
    """

    element: Element
    moved: Weights
    stale: dict[str, Tensor]
    sweeps: Tensor
    gained: Tensor
    behind: set[str] = field(default_factory=set)


def _start(pairs: _Pairs, restart: int) -> _Run:
    problem = pairs.problem
    count, device = problem.pairs, problem.device
    element = {
        name: value.to(device).expand(count, *value.shape).clone()
        for name, value in problem.start(restart).items()
    }
    stale = {plan.group: torch.ones(count, dtype=torch.bool, device=device) for plan in problem.plans}
    sweeps = torch.zeros(count, dtype=torch.long, device=device)
    moved = (
        problem.spec.act(element, pairs.weights)
        if restart > 1
        else {name: tensor.clone() for name, tensor in pairs.weights.items()}
    )
    return _Run(element, moved, stale, sweeps, torch.zeros(count, dtype=torch.float64, device=device))


def _match_forward(pairs: _Pairs, run: _Run) -> None:
    """Match the groups one after the other, each by what it shares with those before it alone.

    Two shuffled copies of one network agree on nothing behind a layer that is still shuffled; layer by layer
    from the input they agree on everything.
    """
    done: set[str | None] = {None}
    everyone = torch.arange(pairs.problem.pairs, device=pairs.problem.device)
    for plan in pairs.problem.plans:
        done |= {plan.group, *plan.inner}
        settled = [p for p in plan.places if done.issuperset(dim.group for dim in p.cell.dims)]
        _match(pairs, run, plan, everyone, settled)
    for stale in run.stale.values():
        stale.fill_(True)


def _run(pairs: _Pairs, restart: int) -> _Run:
    """Sweep over the groups until no pair has anything left to gain."""
    problem = pairs.problem
    orders = problem.orders(restart).tolist()
    run = _start(pairs, restart)
    enough = problem.tolerance * torch.stack(list(pairs.scale.values())).sum(0)
    if restart == problem.by_layer:
        _match_forward(pairs, run)
    for sweep in range(problem.max_sweeps if problem.plans else 0):
        active = torch.stack(list(run.stale.values())).any(0)
        if not bool(active.any()):
            break
        run.sweeps += active
        run.gained.zero_()
        for position in orders[sweep % len(orders)]:
            plan = problem.plans[position]
            _match(pairs, run, plan, run.stale[plan.group].nonzero()[:, 0], plan.places)
        if problem.tolerance:
            for stale in run.stale.values():
                stale &= run.gained > enough
    _catch_up(pairs, run, pairs.weights)
    return run


# -- one group ---------------------------------------------------------------------------------------------


def _match(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, places: Sequence[Place]) -> None:
    """Match the group in the pairs ``rows`` by what it holds at ``places``, in place."""
    for part in rows.split(max(1, _CHUNK // plan.size**2)):
        if len(part) and places:
            _match_part(pairs, run, plan, part, places)


def _match_part(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, places: Sequence[Place]) -> None:
    """Find the best that can be done to the group, and do it where it is better than what is."""
    run.stale[plan.group][rows] = False
    least = pairs.threshold(plan.tensors)[rows]
    kept = pairs.products
    if kept is not None and all(map(kept.serves, plan.places)):
        products = kept.sum(plan.group, places, run.element)
        _follow(run, plan, *_units.propose(plan, places, {}, {}, products), least)
        return
    _catch_up(pairs, run, plan.tensors)
    reference, moved = (
        {name: _some(side[name], rows) for name in plan.tensors} for side in (pairs.reference, run.moved)
    )
    if plan.inner:
        found = _nested.propose(pairs.problem, plan, places, reference, moved, solve)
    elif plan.repeated:
        found = _quadratic.propose(plan, places, reference, moved)
    else:
        found = _units.propose(plan, places, reference, moved)
    _accept(pairs, run, plan, rows, *found, least)
    if plan.repeated and plan.positives:
        moved = {name: _some(run.moved[name], rows) for name in plan.tensors}
        _accept(pairs, run, plan, rows, *_scales.propose(plan, places, reference, moved), least)


def _follow(run: _Run, plan: Plan, gain: Tensor, move: Element, least: Tensor) -> None:
    """Of a single pair and a plain group, let the element move and leave the weights behind."""
    if bool(gain > least):
        run.element[plan.group] = run.element[plan.group].gather(1, move[plan.group])
        run.behind.update(plan.tensors)
        run.gained += gain
        for neighbour in plan.neighbours:
            run.stale[neighbour].fill_(True)


def _catch_up(pairs: _Pairs, run: _Run, names: Iterable[str]) -> None:
    """Bring weights that were left behind to where the element is."""
    late = run.behind.intersection(names)
    if late:
        run.moved |= pairs.problem.spec.act(run.element, {name: pairs.weights[name] for name in late})
        run.behind -= late


def _accept(
    pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, gain: Tensor, move: Element, least: Tensor
) -> None:
    better = gain > least
    if bool(better.any()):
        _apply(pairs, run, plan, rows[better], {name: value[better] for name, value in move.items()})
        run.gained[rows[better]] += gain[better]


def _some(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _apply(pairs: _Pairs, run: _Run, plan: Plan, rows: Tensor, move: Element) -> None:
    """Let ``move`` act in the pairs ``rows``; it moves one group, so only that group's tensors change."""
    spec = pairs.problem.spec
    old = {name: run.element[name][rows] for name in plan.values}
    for name, value in spec.compose(move, old).items():
        run.element[name][rows] = value.to(run.element[name].dtype)
    before = {name: _some(run.moved[name], rows) for name in plan.tensors}
    for name, tensor in spec.act(move, before).items():
        if len(rows) == len(tensor) == len(run.moved[name]):
            run.moved[name] = tensor
        else:
            run.moved[name][rows] = tensor
    # the step of a repeated group is no optimum: from elsewhere it may find another
    again = {plan.group} if plan.repeated else set()
    for neighbour in plan.neighbours | again:
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
        kept.gained,
    )


def _value(pairs: _Pairs, moved: Weights) -> Tensor:
    """What is maximised: the inner product, as long as nothing that is done changes norms."""
    return _squares(pairs, moved) / -2 if pairs.problem.changed else _objective(pairs, moved)


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
