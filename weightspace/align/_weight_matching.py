"""Weight matching: coordinate ascent over the groups of a spec, one assignment problem per group and pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Cell, Element, Weights, WeightSpec, cell_view

MATCHED = ("permutation", "sign")

# A move must gain more than this share of ||A|| ||B||: rounding alone can fake a gain between equal choices.
_TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-12}
_CHUNK = 2**22  # entries of the similarity matrices that exist at once: 32 MB in float64


@dataclass(frozen=True, eq=False)
class MatchReport:
    """What :func:`weight_matching` found, with one entry per pair.

    Args:
        element: the group element whose action on ``weights`` gives exactly the aligned weights.
        objective: inner product of reference and aligned weights over all parameters, float64.
        distance_before: L2 distance between reference and weights over all parameters, float64.
        distance_after: L2 distance between reference and aligned weights, float64.
        sweeps: sweeps over the groups until no group had anything left to gain, in the restart that was kept.
    """

    element: Element
    objective: Float[Tensor, "*batch"]
    distance_before: Float[Tensor, "*batch"]
    distance_after: Float[Tensor, "*batch"]
    sweeps: Int[Tensor, "*batch"]

    def summary(self) -> str:
        """One line: distances, inner product and sweeps; means over the pairs when there are many."""
        before, after, objective = (
            f"{value.mean().item():.4g}"
            for value in (self.distance_before, self.distance_after, self.objective)
        )
        pairs = self.sweeps.numel()
        which, most = ("", "") if pairs == 1 else (f" of {pairs:,} pairs, means", "at most ")
        sweeps = int(self.sweeps.max()) if pairs else 0
        return (
            f"weight matching{which}: distance {before} -> {after}, inner product {objective}, "
            f"{most}{sweeps} sweep{'' if sweeps == 1 else 's'}"
        )

    def __str__(self) -> str:
        return self.summary()


def weight_matching(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    symmetries: Sequence[str] = ("permutation",),
    restarts: int = 2,
    max_sweeps: int = 100,
    seed: int = 0,
) -> tuple[Weights, MatchReport]:
    """Reorder the units of ``weights`` so that its parameters come as close as they can to ``reference``.

    Maximises the inner product ``<A, g . B>`` over group elements g, which minimises the L2 distance
    ``||A - g . B||``.
    Groups are visited in random order; for each, with the others held still, the best permutation is one
    linear assignment on the similarities

        S[i, j] = sum over tensors, cells and dims of the group of <A[unit i], (g . B)[unit j]>

    A permutation is replaced only by one that is better. With ``"sign"`` a unit of B may be flipped as well,
    where the spec has a sign scaling: S is then ``|odd part| + even part``, split by the scaling's exponents.
    What a network computes is never changed. Statistics and constants do not count, but statistics move along.

    Args:
        spec: the weight space.
        reference: A, the networks that stay; every parameter of the spec.
        weights: B, the networks that are reordered; every parameter and statistic of the spec.
        symmetries: ``"permutation"``, ``"sign"`` or both.
        restarts: runs per pair, of which the best is kept. The first starts from the order as it is; the second
            matches layer by layer from the input first, which restores a shuffled feed-forward network; the
            others start from random elements.
        max_sweeps: upper limit of sweeps over all groups, per run.
        seed: of the order of the groups and of the random starts. They are drawn once per call, from the seed
            alone, and serve all pairs alike: a pair's result does not depend on which others it came with.

    Returns:
        The aligned weights, in the dtypes of ``weights``, and a report. Half precision is accumulated in
        float32.

    Shapes:
        Tensors of both arguments: ``(*batch, *shape in the spec)``, where the batch axes of the one broadcast
        against those of the other; results have the joint batch shape.

    Raises:
        SpecError: weights that do not fit the spec or are not finite, batch axes that do not broadcast, or a
            spec with nested or repeated groups, which are not yet supported.
        ConfigError: unknown symmetries, fewer than one restart or sweep, or a negative seed.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        algorithm 1. Signs, the second start, and keeping the old permutation on ties are additions.

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
        >>> generator = torch.Generator().manual_seed(0)
        >>> a = spec.unflatten(torch.randn(100, spec.num_parameters, generator=generator))
        >>> b = spec.act(spec.random_element((100,), symmetries=["permutation"], generator=generator), a)
        >>> aligned, report = weight_matching(spec, reference=a, weights=b, restarts=2)
        >>> int((report.distance_after == 0).sum())
        100
    """
    kinds = _check_options(symmetries, restarts=restarts, max_sweeps=max_sweeps, seed=seed)
    batch = _joint_batch(spec, reference, weights)
    plans = _plan(spec, kinds)
    device = next(iter(weights.values())).device
    # Inside a training step under autocast, products would be rounded to half precision.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        problem = _Problem.of(spec, plans, reference, weights, batch)
        runs = (_run(problem, restart, max_sweeps, seed) for restart in range(restarts))
        best = reduce(lambda kept, run: _better(problem, kept, run), runs)
        report = _report(problem, best, batch)
    together = {name: w.expand((*batch, *spec.tensors[name].shape)) for name, w in weights.items()}
    return spec.act(report.element, together), report


# -- what is asked -----------------------------------------------------------------------------------------


def _check_options(symmetries: Sequence[str], **counts: int) -> tuple[str, ...]:
    kinds = (symmetries,) if isinstance(symmetries, str) else tuple(symmetries)
    wrong = [kind for kind in kinds if kind not in MATCHED]
    if wrong or not kinds:
        found = repr(wrong[0]) if wrong else "none"
        raise ConfigError(f"symmetries: expected some of {', '.join(MATCHED)}, found {found}")
    for name, value in counts.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, found {value}")
    return kinds


def _joint_batch(
    spec: WeightSpec, reference: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[int, ...]:
    if not any(tensor.kind == "parameter" for tensor in spec.tensors.values()):
        raise SpecError("spec: it has no parameters to match")
    needed = {"reference": (reference, ("parameter",)), "weights": (weights, ("parameter", "statistic"))}
    for role, (tensors, kinds) in needed.items():
        for name, tensor in spec.tensors.items():
            if tensor.kind in kinds and name not in tensors:
                raise SpecError(f"{role}: {tensor.kind} {name!r} is missing")
    shapes = spec.batch_shape(weights), spec.batch_shape(reference)
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise SpecError(
            f"weights: batch shape {list(shapes[0])} does not broadcast against the reference's {list(shapes[1])}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Place:
    """One dim that runs over the group; ``odd`` where a flip of the unit flips the sign."""

    tensor: str
    cell: Cell
    dim: int
    odd: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one group is matched.

    Args:
        group: its name.
        permute: whether its units may change places.
        sign: the scaling by which its units may be flipped, if any.
        places: where it occurs in parameters.
        neighbours: groups that share a cell with it: their similarities change when it moves.
    """

    group: str
    permute: bool
    sign: str | None
    places: tuple[_Place, ...]
    neighbours: frozenset[str]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that it moves."""
        return tuple(dict.fromkeys(place.tensor for place in self.places))

    @property
    def values(self) -> tuple[str, ...]:
        """The names in an element that it decides."""
        return (*([self.group] if self.permute else []), *([self.sign] if self.sign is not None else []))


def _plan(spec: WeightSpec, kinds: Sequence[str]) -> tuple[_Plan, ...]:
    """One plan per group that parameters know, in the order of the spec."""
    for group in spec.groups.values():
        if group.within:
            raise SpecError(
                f"group {group.name!r} is nested within {', '.join(group.within)}: "
                "not yet supported by weight_matching"
            )
    plans = []
    for name in spec.groups:
        sign = _sign_scaling(spec, name) if "sign" in kinds else None
        places = _places(spec, name, sign)
        shared = {dim.group for place in places for dim in place.cell.dims} - {name, None}
        if places:
            neighbours = frozenset(other for other in shared if other is not None)
            plans.append(_Plan(name, "permutation" in kinds, sign, places, neighbours))
    return tuple(plans)


def _sign_scaling(spec: WeightSpec, group: str) -> str | None:
    found = [name for name, s in spec.scalings.items() if s.group == group and s.kind == "sign"]
    if len(found) > 1:
        raise SpecError(
            f"group {group!r} has the sign scalings {', '.join(found)}: "
            "more than one is not yet supported by weight_matching"
        )
    return found[0] if found else None


def _places(spec: WeightSpec, group: str, sign: str | None) -> tuple[_Place, ...]:
    exponents = spec.scalings[sign].exponents if sign is not None else ()
    odd = {(place.tensor, place.cell, place.dim) for place in exponents if place.power % 2}
    places = []
    for name, tensor in spec.tensors.items():
        for number, cell in enumerate(tensor.cells if tensor.kind == "parameter" else ()):
            dims = [position for position, dim in enumerate(cell.dims) if dim.group == group]
            if len(dims) > 1:
                raise SpecError(
                    f"group {group!r} is repeated in a cell of tensor {name!r}: "
                    "not yet supported by weight_matching"
                )
            places += [_Place(name, cell, dim, (name, number, dim) in odd) for dim in dims]
    return tuple(places)


# -- the pairs, and where a run stands ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    """The parameters of all pairs, in the dtype of accumulation, and what may be done to them.

    Args:
        spec: the weight space.
        plans: one per group.
        reference: tensors ``(pairs, *shape)``.
        weights: tensors ``(pairs, *shape)``.
        scale: per tensor and pair ``||A|| ||B||``, which no inner product can exceed.
        tolerance: share of the scale that counts as progress.
    """

    spec: WeightSpec
    plans: tuple[_Plan, ...]
    reference: Weights
    weights: Weights
    scale: dict[str, Tensor]
    tolerance: float

    @classmethod
    def of(
        cls,
        spec: WeightSpec,
        plans: tuple[_Plan, ...],
        reference: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        batch: tuple[int, ...],
    ) -> _Problem:
        shapes = {name: tensor.shape for name, tensor in spec.tensors.items() if tensor.kind == "parameter"}
        dtypes = [side[name].dtype for side in (reference, weights) for name in shapes]
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        if dtype not in _TOLERANCE:
            raise SpecError(f"weights: expected real parameters, found {dtype}")
        a, b = (
            {
                name: side[name].to(dtype).expand((*batch, *shape)).reshape(math.prod(batch), *shape)
                for name, shape in shapes.items()
            }
            for side in (reference, weights)
        )
        norms_a, norms_b = _norms("reference", a), _norms("weights", b)
        scale = {name: norms_a[name] * norms_b[name] for name in shapes}
        return cls(spec, plans, a, b, scale, _TOLERANCE[dtype])

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(next(iter(self.scale.values())))

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return next(iter(self.scale.values())).device

    def threshold(self, names: Sequence[str]) -> Tensor:
        """The gain in these tensors' inner product, per pair, that is no more than rounding."""
        return self.tolerance * torch.stack([self.scale[name] for name in names]).sum(0)


def _norms(role: str, tensors: Weights) -> dict[str, Tensor]:
    norms = {name: torch.linalg.vector_norm(_flat(tensor), dim=-1) for name, tensor in tensors.items()}
    for name, norm in norms.items():
        if not bool(norm.isfinite().all()):
            pair = int(norm.isfinite().logical_not().nonzero()[0, 0])
            raise SpecError(
                f"{role}: expected finite values, but tensor {name!r} of pair {pair} has norm {norm[pair].item()}"
            )
    return {name: norm.double() for name, norm in norms.items()}


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


def _start(problem: _Problem, generator: torch.Generator | None) -> _Run:
    """All pairs at one element: the identity, or with a generator a random one."""
    spec, pairs, device = problem.spec, problem.pairs, problem.device
    matched = {name for plan in problem.plans for name in plan.values}
    drawn = spec.random_element(symmetries=MATCHED, generator=generator) if generator else spec.identity()
    element = {
        name: value.to(device).expand(pairs, -1).clone() for name, value in drawn.items() if name in matched
    }
    stale = {plan.group: torch.ones(pairs, dtype=torch.bool, device=device) for plan in problem.plans}
    sweeps = torch.zeros(pairs, dtype=torch.long, device=device)
    return _Run(element, spec.act(element, problem.weights), stale, sweeps)


def _match_forward(problem: _Problem, run: _Run) -> None:
    """Match the groups one after the other, each by what it shares with those before it alone.

    Two shuffled copies of one network agree on nothing behind a layer that is still shuffled; layer by layer
    from the input they agree on everything.
    """
    done: set[str | None] = {None}
    everyone = torch.arange(problem.pairs, device=problem.device)
    for plan in problem.plans:
        done.add(plan.group)
        settled = [p for p in plan.places if done.issuperset(dim.group for dim in p.cell.dims)]
        _match(problem, run, plan, everyone, settled)
    for stale in run.stale.values():
        stale.fill_(True)


def _run(problem: _Problem, restart: int, max_sweeps: int, seed: int) -> _Run:
    """Sweep over the groups until no pair has anything left to gain."""
    entropy = np.random.SeedSequence([seed, restart]).generate_state(1)
    generator = torch.Generator().manual_seed(int(entropy[0]))
    run = _start(problem, generator if restart > 1 else None)
    if restart == 1:
        _match_forward(problem, run)
    for _ in range(max_sweeps if problem.plans else 0):
        active = torch.stack(list(run.stale.values())).any(0)
        if not bool(active.any()):
            break
        run.sweeps += active
        for position in torch.randperm(len(problem.plans), generator=generator).tolist():
            plan = problem.plans[position]
            _match(problem, run, plan, run.stale[plan.group].nonzero()[:, 0], plan.places)
    return run


# -- one group ---------------------------------------------------------------------------------------------


def _match(problem: _Problem, run: _Run, plan: _Plan, rows: Tensor, places: Sequence[_Place]) -> None:
    """Match the group in the pairs ``rows`` by what it holds at ``places``, in place."""
    for part in rows.split(max(1, _CHUNK // problem.spec.groups[plan.group].size ** 2)):
        if len(part) and places:
            _match_part(problem, run, plan, part, places)


def _match_part(problem: _Problem, run: _Run, plan: _Plan, rows: Tensor, places: Sequence[_Place]) -> None:
    """Find the best permutation, and signs, and take it where it is better than what is."""
    even, odd = _similarities(problem, run, places, rows)
    now, score = (even, even) if odd is None else (even + odd, even + odd.abs())
    source = _assign(score) if plan.permute else _stay(score)
    found = _taken(score, source).sum(-1, dtype=torch.float64)
    better = (
        found - _taken(now, _stay(now)).sum(-1, dtype=torch.float64) > problem.threshold(plan.tensors)[rows]
    )
    run.stale[plan.group][rows] = False
    move: Element = {plan.group: source[better]} if plan.permute else {}
    if odd is not None:
        assert plan.sign is not None
        move[plan.sign] = torch.where(_taken(odd, source) < 0, -1.0, 1.0)[better]
    if bool(better.any()):
        _apply(problem.spec, run, plan, rows[better], move)


def _similarities(
    problem: _Problem, run: _Run, places: Sequence[_Place], rows: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Inner products of the units as they stand, (rows, size, size): what a flip keeps, and what it turns.

    The second is None where a flip turns nothing.
    """
    sums: dict[bool, Tensor] = {}
    for place in places:
        left = _units(problem.reference[place.tensor], place, rows)
        right = _units(run.moved[place.tensor], place, rows).mT
        sums[place.odd] = (
            torch.baddbmm(sums[place.odd], left, right) if place.odd in sums else torch.bmm(left, right)
        )
    odd = sums.get(True)
    return sums[False] if odd is None else sums.get(False, torch.zeros_like(odd)), odd


def _units(tensor: Tensor, place: _Place, rows: Tensor) -> Tensor:
    """One row per unit, (rows, size, everything else in the cell); a view of a plain matrix."""
    some = tensor if len(rows) == len(tensor) else tensor[rows]
    units = cell_view(_flat(some), place.cell).movedim(1 + place.dim, 1)
    return units.reshape(*units.shape[:2], math.prod(units.shape[2:]))


def _assign(score: Tensor) -> Tensor:
    """For every place the unit that goes there, such that the sum of scores is largest, (rows, size)."""
    costs = score.neg().double().cpu().numpy()
    # SciPy holds the interpreter's lock here, so threads gain nothing: 25 microseconds for 32 units.
    columns = [linear_sum_assignment(cost)[1] for cost in costs]
    return torch.from_numpy(np.stack(columns)).to(score.device)


def _stay(score: Tensor) -> Tensor:
    """Every unit where it is, (rows, size)."""
    return torch.arange(score.shape[-1], device=score.device).expand(score.shape[:2])


def _taken(score: Tensor, source: Tensor) -> Tensor:
    """``score[row, i, source[row, i]]``."""
    return score.gather(2, source.unsqueeze(2)).squeeze(2)


def _apply(spec: WeightSpec, run: _Run, plan: _Plan, rows: Tensor, move: Element) -> None:
    """Let ``move`` act in the pairs ``rows``; it moves one group, so only that group's tensors change."""
    old = {name: run.element[name][rows] for name in move}
    for name, value in spec.compose(move, old).items():
        run.element[name][rows] = value
    before = {name: run.moved[name][rows] for name in plan.tensors}
    for name, tensor in spec.act(move, before).items():
        run.moved[name][rows] = tensor
    for neighbour in plan.neighbours:
        run.stale[neighbour][rows] = True


# -- scores ------------------------------------------------------------------------------------------------


def _better(problem: _Problem, kept: _Run, other: _Run) -> _Run:
    """Per pair, the run that ended higher; the earlier one on ties."""
    gain = _objective(problem, other.moved) - _objective(problem, kept.moved)
    wins = gain > problem.threshold(list(problem.scale))

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(wins.view(-1, *[1] * (new.ndim - 1)), new, old)

    return _Run(
        {name: choose(other.element[name], value) for name, value in kept.element.items()},
        {name: choose(other.moved[name], tensor) for name, tensor in kept.moved.items()},
        {},
        choose(other.sweeps, kept.sweeps),
    )


def _report(problem: _Problem, run: _Run, batch: tuple[int, ...]) -> MatchReport:
    return MatchReport(
        element={name: value.view(*batch, value.shape[-1]) for name, value in run.element.items()},
        objective=_objective(problem, run.moved).view(batch),
        distance_before=_distance(problem, problem.weights).view(batch),
        distance_after=_distance(problem, run.moved).view(batch),
        sweeps=run.sweeps.view(batch),
    )


def _objective(problem: _Problem, moved: Weights) -> Tensor:
    products = [
        (_flat(tensor) * _flat(moved[name])).sum(-1, dtype=torch.float64)
        for name, tensor in problem.reference.items()
    ]
    return torch.stack(products).sum(0)


def _distance(problem: _Problem, moved: Weights) -> Tensor:
    squares = [
        (_flat(tensor) - _flat(moved[name])).square().sum(-1, dtype=torch.float64)
        for name, tensor in problem.reference.items()
    ]
    return torch.stack(squares).sum(0).sqrt()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
