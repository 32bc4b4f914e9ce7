"""One group, with all that is nested in it, matched while everything else is held: the step that other matchers take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weightspace.align import _sweeps
from weightspace.align._plans import Plan, make_plans
from weightspace.align._problem import Problem, accumulation_dtype
from weightspace.errors import SpecError
from weightspace.spec import Element, WeightSpec

_SWEEPS = 20  # over a group whose own step is no optimum: one that runs over two dims of a cell


def match_family(
    spec: WeightSpec,
    group: str,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    symmetries: Sequence[str] = ("permutation",),
) -> Element:
    """The element that moves one group, and what is nested in it, and brings weights closest to a reference.

    The optimum, where no two groups that move share a cell and none runs over two dims of one; else what weight
    matching finds from the order as it is, and no worse than that.

    Args:
        spec: the weight space.
        group: within no other.
        reference: A, at least the parameters that the group moves.
        weights: B, likewise.
        symmetries: the kinds of moves, as for :func:`weightspace.align.weight_matching`.

    Returns:
        Values for the group, its nested groups, and their scalings of the given kinds; the identity where nothing
        is better than what is.

    Shapes:
        Tensors ``(*batch, *shape in the spec)``, where the batch axes of both sides broadcast; so the element's.

    Raises:
        SpecError: a group that lies within others or occurs in no parameter, or one that is not supported.
    """
    kinds = tuple(symmetries)
    plan = _plan(spec, group, kinds)
    near, far = ({name: side[name] for name in plan.tensors} for side in (reference, weights))
    # any one tensor tells the batch axes; all of them are checked when elements act
    first = next(iter(near))
    ndim = len(spec.tensors[first].shape)
    batch = tuple(
        torch.broadcast_shapes(*(side[first].shape[: side[first].ndim - ndim] for side in (near, far)))
    )
    dtype = accumulation_dtype(spec, near, far)
    problem = Problem(spec, kinds, (plan,), near, far, batch, dtype, 1, -1, _SWEEPS, 0)
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        found = _sweeps.match(problem)
    return {name: value.view(*batch, *value.shape[1:]) for name, value in found.element.items()}


def _plan(spec: WeightSpec, group: str, kinds: tuple[str, ...]) -> Plan:
    for plan in make_plans(spec, kinds):
        if plan.group == group:
            return replace(plan, neighbours=frozenset())  # they are held
    raise SpecError(
        f"group: expected one that parameters know and that lies within no other, found {group!r}"
    )
