"""Matching one group that occurs at most once in each cell: similarities of units, and one assignment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weightspace.align._assignment import assign
from weightspace.align._plans import Place, Plan
from weightspace.align._turns import Choices, Shift, Sums, Term, settle
from weightspace.spec import Element, Weights, cell_view


def propose(
    plan: Plan,
    places: Sequence[Place],
    reference: Weights,
    moved: Weights,
    products: Tensor | None = None,
) -> tuple[Float[Tensor, "rows"], Element]:
    """The best permutation, signs, steps and factors of one group, and what they gain over what is.

    Args:
        plan: how the group is matched.
        places: those that count, at least one.
        reference: tensors ``(rows, *shape)``, those of the plan.
        moved: likewise, the weights as they stand.
        products: of all units, where they are known from elsewhere; then no tensors are needed.
    """
    known = None if products is None else Sums((Term(frozenset(), False, (), products),))
    sums = known or compare(plan, places, reference, moved)
    score, _ = settle(sums, decide=False)
    source = assign(score) if plan.permute else stay(score)
    found, choices = settle(sums.at(source), decide=True)
    now = sums.at(stay(score)).unchanged()
    move: Element = {plan.group: source} if plan.permute else {}
    return found.sum(-1, dtype=torch.float64) - now.sum(-1, dtype=torch.float64), move | as_values(
        plan, choices
    )


def as_values(plan: Plan, choices: Choices) -> Element:
    """Signs, steps and factors in the dtypes that elements have."""
    signs = {name: choices[name].to(torch.get_default_dtype()) for name in plan.signs if name in choices}
    steps = {plan.phase: choices[plan.phase].long()} if plan.phase is not None else {}
    return {**signs, **steps, **{name: choices[name] for name in plan.positives if name in choices}}


def compare(plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights) -> Sums:
    """Similarities of all units of the reference with all units of the weights."""
    products: dict[object, Tensor] = {}
    squares: dict[object, Tensor] = {}
    first: dict[object, Place] = {}
    for place in sorted(places, key=lambda place: place.kind):
        left, right = units(reference[place.tensor], place), units(moved[place.tensor], place)
        key = place.key
        if key in products:
            products[key].baddbmm_(left, right.mT)
        else:
            first[key], products[key] = place, torch.bmm(left, right.mT)
        if place.powers:
            square = right.square().sum(-1).unsqueeze(1)
            squares[key] = squares[key] + square if key in squares else square
    terms = tuple(
        Term(place.signs, place.phase, place.powers, products[key], squares.get(key))
        for key, place in first.items()
    )
    return Sums(terms, _shift(plan, places, reference, moved))


def _shift(plan: Plan, places: Sequence[Place], reference: Weights, moved: Weights) -> Shift | None:
    if plan.phase is None:
        return None
    near: Tensor | float = 0.0
    far: Tensor | float = 0.0
    signs: frozenset[str] = frozenset()
    phase, squares = False, 0.0
    for place in places:
        if place.shift:
            left, right = units(reference[place.tensor], place), units(moved[place.tensor], place)
            near = near + place.shift * left.sum(-1, dtype=torch.float64).unsqueeze(2)
            far = far + place.shift * right.sum(-1, dtype=torch.float64).unsqueeze(1)
            squares += place.shift**2 * left.shape[-1]
            signs, phase = place.signs, place.phase
    return Shift(plan.phase, signs, phase, near, far, squares)


def units(tensor: Tensor, place: Place) -> Float[Tensor, "rows size entries"]:
    """One row per unit; a view of a plain matrix."""
    flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
    found = cell_view(flat, place.cell).movedim(1 + place.dim, 1)
    return found.reshape(*found.shape[:2], math.prod(found.shape[2:]))


def stay(score: Float[Tensor, "rows size _"]) -> Tensor:
    """Every unit where it is, (rows, size)."""
    return torch.arange(score.shape[-1], device=score.device).expand(score.shape[:2])
