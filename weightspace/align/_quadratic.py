r"""Matching a group that runs over two dims of one cell, as recurrent weights do: a quadratic assignment problem.

With the others held, the permutation matrix P that maximises

    <L, P> + sum over cells k of <A_k, P B_k P^T>

is sought among doubly stochastic matrices by Frank and Wolfe's method and rounded; L are the similarities where the
group occurs once. A scaling that flips what it moves turns P into a matrix with signs; where only one of a cell's
dims is flipped, or none, P has signs on one side or none. So there is one matrix for every set of scalings that
flips some place, all of which move together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align._assignment import assign
from weightspace.align._plans import Place, Plan
from weightspace.align._turns import Choices, Sums, Term, settle
from weightspace.align._units import compare, stay
from weightspace.spec import Element, Weights, cell_view

Signs = frozenset[str]
Matrices = dict[Signs, Tensor]
"""(rows, places, units), by the scalings that flip them."""

_STEPS = 20  # of Frank and Wolfe: later ones hardly move what is rounded to a permutation in the end
_GAP = 1e-4  # the share of what products can be that ends them


@dataclass(frozen=True, slots=True)
class Square:
    """A cell with two dims of the group: every other index gives one matrix.

    Args:
        signs: what flips along the first dim, and along the second.
        reference: (rows, others, size, size).
        moved: likewise.
    """

    signs: tuple[Signs, Signs]
    reference: Tensor
    moved: Tensor

    def sides(self, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """The matrices that act on its first and on its second dim."""
        first, second = (matrices[signs].unsqueeze(1) for signs in self.signs)
        return first, second


@dataclass(frozen=True, slots=True)
class Objective:
    """The similarities of places where the group occurs once, and the cells where it occurs twice."""

    linear: Matrices
    squares: tuple[Square, ...]

    @classmethod
    def of(cls, plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights) -> Objective:
        """From the weights as they stand."""
        cells: dict[tuple[str, int], list[Place]] = {}
        for place in places:
            cells.setdefault((place.tensor, place.number), []).append(place)
        once = [found[0] for found in cells.values() if len(found) == 1]
        linear: Matrices = {}
        for term in compare(plan, once, reference, moved).terms if once else ():
            kept = linear.get(term.signs)
            linear[term.signs] = term.product if kept is None else kept + term.product
        squares = tuple(
            Square(
                (first.signs, second.signs),
                _matrices(reference[first.tensor], first, second),
                _matrices(moved[first.tensor], first, second),
            )
            for first, second in (found for found in cells.values() if len(found) == 2)
        )
        return cls(linear, squares)

    @property
    def kinds(self) -> tuple[Signs, ...]:
        """The sets of scalings for which there is a matrix."""
        return tuple(dict.fromkeys([*self.linear, *(s for square in self.squares for s in square.signs)]))

    def quadratic(self, matrices: Matrices) -> Float[Tensor, "rows"]:
        """What the cells with two dims contribute."""
        total: Tensor | float = 0.0
        for square in self.squares:
            first, second = square.sides(matrices)
            product = square.reference * (first @ square.moved @ second.mT)
            total = total + product.sum((1, 2, 3), dtype=torch.float64)
        return torch.as_tensor(total)

    def value(self, matrices: Matrices) -> Float[Tensor, "rows"]:
        """What is maximised."""
        linear = (inner(part, matrices[signs]) for signs, part in self.linear.items())
        return self.quadratic(matrices) + sum(linear)

    def gradient(self, matrices: Matrices) -> Matrices:
        """Its derivatives by all matrices."""
        found = {signs: self.linear.get(signs, torch.zeros_like(at)) for signs, at in matrices.items()}
        for square in self.squares:
            first, second = square.sides(matrices)
            a, b = square.reference, square.moved
            before, after = square.signs
            found[before] = found[before] + _contracted(a @ second, b)
            found[after] = found[after] + _contracted(a.mT @ first, b.mT)
        return found


def _contracted(left: Tensor, right: Tensor) -> Tensor:
    """``sum over others of left @ right^T`` as one product."""
    return left.movedim(1, 2).flatten(2) @ right.movedim(1, 2).flatten(2).mT


def _matrices(tensor: Tensor, first: Place, second: Place) -> Tensor:
    flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
    cell = cell_view(flat, first.cell).movedim((1 + first.dim, 1 + second.dim), (-2, -1))
    return cell.reshape(len(tensor), -1, *cell.shape[-2:])


def inner(first: Tensor, second: Tensor) -> Float[Tensor, "rows"]:
    """Inner products of matrices."""
    return (first * second).sum((1, 2), dtype=torch.float64)


# -- one group of some pairs -------------------------------------------------------------------------------


def propose(
    plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights
) -> tuple[Float[Tensor, "rows"], Element]:
    """A permutation, and signs, of one repeated group, and what they gain over what is.

    Args:
        plan: how the group is matched.
        places: those that count, at least one.
        reference: tensors ``(rows, *shape)``, those of the plan.
        moved: likewise, the weights as they stand.
    """
    objective = Objective.of(plan, places, reference, moved)
    some = moved[places[0].tensor]
    identity = torch.eye(plan.size, dtype=some.dtype, device=some.device).expand(len(some), -1, -1)
    here = dict.fromkeys(objective.kinds, identity)
    now = objective.value(here)
    best, source, signs = now, stay(identity), _unflipped(plan, identity)
    for start in (here, _middle(plan, objective, identity)):
        corner, order, flips = _corner(plan, _climb(plan, objective, start))
        value = objective.value(corner)
        more = value > best
        best = torch.where(more, value, best)
        source = torch.where(more[:, None], order, source)
        signs = {
            name: torch.where(more[:, None], flips.get(name, kept), kept) for name, kept in signs.items()
        }
    default = torch.get_default_dtype()
    move: Element = {plan.group: source} if plan.permute else {}
    return best - now, move | {name: value.to(default) for name, value in signs.items()}


def _unflipped(plan: Plan, like: Tensor) -> Choices:
    return {name: torch.ones(like.shape[:2], dtype=like.dtype, device=like.device) for name in plan.signs}


def _middle(plan: Plan, objective: Objective, identity: Tensor) -> Matrices:
    """The mean of all that may be done: all permutations alike, all signs alike."""
    mean = torch.full_like(identity, 1 / plan.size) if plan.permute else identity
    return {signs: torch.zeros_like(identity) if signs else mean for signs in objective.kinds}


def _corner(plan: Plan, gradient: Matrices) -> tuple[Matrices, Tensor, Choices]:
    """The permutation and the signs with the largest inner product with a gradient, and their matrices."""
    sums = Sums(tuple(Term(signs, False, (), part) for signs, part in gradient.items()))
    score, _ = settle(sums, decide=False)
    source = assign(score) if plan.permute else stay(score)
    _, choices = settle(sums.at(source), decide=True)
    matrices = {}
    for signs, part in gradient.items():
        value = torch.ones_like(part[:, :, 0])
        for name in signs:
            value = value * choices[name]
        matrices[signs] = torch.zeros_like(part).scatter_(2, source.unsqueeze(2), value.unsqueeze(2))
    return matrices, source, choices


def _climb(plan: Plan, objective: Objective, start: Matrices) -> Matrices:
    """Steps towards the best corner, each as long as is best, until none leads up."""
    at = start
    bound = _bound(objective)
    for _ in range(_STEPS):
        gradient = objective.gradient(at)
        corner, _, _ = _corner(plan, gradient)
        way = {signs: corner[signs] - matrix for signs, matrix in at.items()}
        slope = torch.stack([inner(part, way[signs]) for signs, part in gradient.items()]).sum(0)
        if not bool((slope > bound).any()):
            break
        length = _length(slope, objective.quadratic(way)).to(next(iter(way.values())))
        at = {signs: matrix + length[:, None, None] * way[signs] for signs, matrix in at.items()}
    return at


def _bound(objective: Objective) -> Float[Tensor, "rows"]:
    """The slope below which no step is worth taking."""
    linear = [part.flatten(1).norm(dim=1) for part in objective.linear.values()]
    squares = [
        square.reference.flatten(1).norm(dim=1) * square.moved.flatten(1).norm(dim=1)
        for square in objective.squares
    ]
    return _GAP * torch.stack([*linear, *squares]).double().sum(0)


def _length(slope: Tensor, curve: Tensor) -> Tensor:
    """The t in [0, 1] with the largest ``slope t + curve t^2``."""
    peak = torch.where(curve < 0, -slope / (2 * curve), 1.0).clamp(0.0, 1.0)
    return torch.where(slope > 0, peak, 0.0)
