"""Matching in compiled code: what :mod:`weightspace.align._sweeps` does, for small networks on a CPU.

There, hundreds of operations on small tensors take most of the time; here a pair stays in the cache of one core from
start to end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from weightspace.align._plans import Place, Plan, make_plans
from weightspace.align._problem import Outcome, Problem, check_norms
from weightspace.align._threads import share
from weightspace.spec import Element, WeightSpec

_MOST = 2**26  # products for the similarities of one group and pair: with more, PyTorch's are faster
_PER_CALL = 4096  # pairs between two looks at Ctrl-C


def can_match(problem: Problem) -> bool:
    """Whether this is the way to match these pairs."""
    if problem.device.type != "cpu" or not problem.plans or not all(plan.plain for plan in problem.plans):
        return False
    products = [plan.size * sum(place.cell.numel for place in plan.places) for plan in problem.plans]
    return max(products) <= _MOST


def match(problem: Problem) -> Outcome:
    """Match every pair from every start, and keep the best."""
    from weightspace.align import _kernels  # numba takes a second to load

    layout = _layout(problem.spec, problem.symmetries)
    numbers, rows = zip(*(_flat(problem, side) for side in (problem.reference, problem.weights)), strict=True)
    orders = np.stack([problem.orders(restart) for restart in range(problem.restarts)])
    found = _Found.empty(problem, layout)
    for first in range(0, problem.pairs, _PER_CALL):
        part = slice(first, first + _PER_CALL)
        counter = np.zeros(1, np.int64)
        share(
            min(_PER_CALL, problem.pairs - first),
            _kernels.match_pairs,
            *numbers,
            np.stack([side[part] for side in rows]),
            *layout.arrays,
            _starts(problem, layout),
            orders,
            problem.by_layer,
            problem.max_sweeps,
            problem.rounding,
            problem.tolerance,
            # so that what the kernel leaves out is refused below, however sums are rounded
            2 * problem.limit,
            counter,
            found.elements[:, part],
            found.outcomes[part],
            found.sweeps[part],
            found.norms[part],
            counter=counter,
        )
    check_norms(problem, found.norms)
    return found.outcome(problem, layout)


# -- the spec in numbers -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layout:
    """A spec's plans as tables; the arguments of ``_kernels.match_pairs`` of the same names.

    Args:
        plans: one per group.
        units: for each group, where its units are among those of all groups.
        size: how many units all groups have.
        arrays: groups, places, rests, shifts, neighbours, holds, boundaries, shifted.
    """

    plans: tuple[Plan, ...]
    units: dict[str, slice]
    size: int
    arrays: tuple[np.ndarray, ...]


@lru_cache(maxsize=64)
def _layout(spec: WeightSpec, symmetries: tuple[str, ...]) -> _Layout:
    plans = make_plans(spec, symmetries)
    parameters = {name: tensor.numel for name, tensor in spec.tensors.items() if tensor.kind == "parameter"}
    boundaries = np.cumsum([0, *parameters.values()])
    begin = dict(zip(parameters, boundaries.tolist(), strict=False))
    units = list(accumulate((plan.size for plan in plans), initial=0))
    last = list(accumulate((len(plan.places) for plan in plans), initial=0))
    groups = [
        (
            plan.size,
            units[g],
            last[g],
            last[g + 1],
            plan.permute,
            bool(plan.signs),
            bool(plan.phase),
            plan.shifted,
        )
        for g, plan in enumerate(plans)
    ]
    places, rests = _places(plans, begin)
    shifts = [place.shift for plan in plans for place in plan.places]
    shifted = {place.tensor for plan in plans for place in plan.places if place.shift}
    arrays = (
        np.array(groups, np.int64).reshape(-1, 8),
        places,
        rests,
        np.array(shifts, np.float64),
        np.array([[other.group in plan.neighbours for other in plans] for plan in plans], np.bool_),
        np.array([[name in plan.tensors for name in parameters] for plan in plans], np.bool_),
        boundaries.astype(np.int64),
        np.array([name in shifted for name in parameters], np.bool_),
    )
    slices = {plan.group: slice(units[g], units[g + 1]) for g, plan in enumerate(plans)}
    return _Layout(plans, slices, units[-1], arrays)


def _places(plans: Sequence[Plan], begin: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The table of places, and the offsets of a unit's numbers from its first, one place after the other."""
    rows, rests, count = [], [], 0
    done: set[str | None] = {None}
    for plan in plans:
        done.add(plan.group)
        for place in plan.places:
            rest = _rest(place)
            settled = done.issuperset(dim.group for dim in place.cell.dims)
            start, stride = begin[place.tensor] + place.cell.offset, place.cell.dims[place.dim].stride
            rows.append((start, stride, count, len(rest), place.kind, settled))
            rests.append(rest)
            count += len(rest)
    return np.array(rows, np.int64), np.concatenate(rests)


def _rest(place: Place) -> np.ndarray:
    """Offsets of what one unit has in a place, from the first of it."""
    offsets = np.zeros(1, np.int64)
    for position, dim in enumerate(place.cell.dims):
        if position != place.dim:
            offsets = (offsets[:, None] + np.arange(dim.size) * dim.stride).ravel()
    return offsets


# -- pairs in numbers, and back ----------------------------------------------------------------------------


def _flat(problem: Problem, side: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """One side's networks, (networks, parameters), and which of them belongs to each pair."""
    names = problem.parameters
    ndim = side[names[0]].ndim - len(problem.spec.tensors[names[0]].shape)
    batch = side[names[0]].shape[:ndim]
    networks = math.prod(batch)
    # reshape cannot infer a size where there are no networks
    columns = [side[name].detach().reshape(networks, problem.spec.tensors[name].numel) for name in names]
    flat = torch.cat(columns, 1).to(problem.dtype).numpy()
    rows = np.broadcast_to(np.arange(networks).reshape(batch), problem.batch)
    return flat, rows.reshape(-1)


def _starts(problem: Problem, layout: _Layout) -> np.ndarray:
    """Permutations, signs and steps with which the runs begin, (restarts, 3, units) int64."""
    starts = np.zeros((problem.restarts, 3, layout.size), np.int64)
    starts[:, 1] = 1
    for restart, values in enumerate(starts):
        element = problem.start(restart) if restart > 1 else {}
        for plan in layout.plans:
            units = layout.units[plan.group]
            values[0, units] = np.arange(plan.size)
            for row, name in enumerate(_names(plan)):
                if name in element:
                    values[row, units] = element[name].numpy()
    return starts


def _names(plan: Plan) -> tuple[str, str | None, str | None]:
    """What its permutations, signs and steps are called in an element."""
    return plan.group, plan.signs[0] if plan.signs else None, plan.phase


@dataclass(frozen=True, slots=True)
class _Found:
    """What the kernel writes; its arguments of the same names."""

    elements: np.ndarray
    outcomes: np.ndarray
    sweeps: np.ndarray
    norms: np.ndarray

    @classmethod
    def empty(cls, problem: Problem, layout: _Layout) -> _Found:
        pairs = problem.pairs
        norms = np.empty((pairs, 2, len(problem.parameters)))
        return cls(
            np.empty((3, pairs, layout.size), np.int64),
            np.empty((pairs, 3)),
            np.empty(pairs, np.int64),
            norms,
        )

    def outcome(self, problem: Problem, layout: _Layout) -> Outcome:
        """The same as tensors, under the names of groups and scalings."""
        sources, signs, steps = torch.from_numpy(self.elements)
        signs = signs.to(torch.get_default_dtype())
        element: Element = {}
        for plan in layout.plans:
            named = zip(_names(plan), (sources, signs, steps), strict=True)
            element |= {
                name: values[:, layout.units[plan.group]] for name, values in named if name in plan.values
            }
        objective, before, after = torch.from_numpy(self.outcomes).unbind(1)
        return Outcome(element, objective, before, after, torch.from_numpy(self.sweeps))
