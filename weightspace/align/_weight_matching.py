"""Weight matching: coordinate ascent over the groups of a spec, one assignment problem per group and pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weightspace.align import _sweeps
from weightspace.align._plans import make_plans
from weightspace.align._problem import Outcome, Problem, accumulation_dtype
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch, compare
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import SYMMETRIES, Element, Weights, WeightSpec

MATCHED = ("permutation", "sign", "phase")
"""The symmetries by which whole populations are aligned: those under which weights keep their sizes."""


@matcher("weight-matching", paper="arXiv:2209.04836", batched=True)
def weight_matching(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    symmetries: Sequence[str] = ("permutation",),
    restarts: int = 2,
    first: str = "given",
    start: Element | None = None,
    max_sweeps: int = 100,
    tolerance: float = 0.0,
    seed: int = 0,
) -> tuple[Weights, MatchReport]:
    """Reorder the units of ``weights`` so that its parameters come as close as they can to ``reference``.

    Minimises the L2 distance ``||A - g . B||`` over group elements g. Permutations and signs keep the norm of B, so
    that this maximises the inner product ``<A, g . B>``.
    Groups are visited in random order; for each, with the others held still, the best permutation is one
    linear assignment on the similarities

        S[i, j] = sum over tensors, cells and dims of the group of <A[unit i], (g . B)[unit j]>

    A permutation is replaced only by one that is better. With ``"sign"`` a unit of B may be flipped as well,
    where the spec has a sign scaling: S is then ``|odd part| + even part``, split by the scaling's exponents.
    With ``"phase"`` its phase may be shifted by any number k of steps, where the spec has a phase scaling
    (``b -> b + k pi / w0``): for every pair of units, sign and parity of k, the k that brings the bias closest is a
    division and a rounding, and S[i, j] is the largest over signs and parities of the inner product less half the
    growth of the squared norm. With ``"positive"``, where the spec has positive scalings, every pair of units is
    compared with the factor c that brings it closest: the largest ``sum over powers p of c^p <A, B>_p -
    c^2p |B|_p^2 / 2``, found by Newton's method in log c. A group may have several scalings of a kind; those that
    share no place are decided apart.

    A group with others nested in it (heads with their features) is matched with them: for every place and every
    unit that could go there, what is nested is matched as if the two were networks of their own, and one assignment
    on what that yields says which goes where. A group that runs over two dims of a cell (recurrent weights) makes
    the step quadratic: it is relaxed to doubly stochastic matrices, climbed by Frank and Wolfe's method from the
    order as it is and from the mean of all, and rounded.
    What a network computes is never changed. Statistics and constants do not count, but statistics move along.

    On a CPU, pairs of small networks are matched in compiled code, one pair per thread, as many threads as PyTorch
    uses; the first call compiles it, and later processes find it on disk. 64 pairs of SIRENs 2-32-32-1 take 5 to
    10 ms on two cores (``benchmarks/weight_matching.py``, ``benchmarks/mixup.py``).

    Args:
        spec: the weight space.
        reference: A, the networks that stay; every parameter of the spec.
        weights: B, the networks that are reordered; every parameter and statistic of the spec.
        symmetries: some of ``"permutation"``, ``"sign"``, ``"phase"`` and ``"positive"``. Those that the spec lacks do
            nothing.
        restarts: runs per pair, of which the best is kept. The first starts from the order as it is; the second
            matches layer by layer from the input first, which restores a shuffled feed-forward network; the
            others start from random elements.
        first: ``"given"``, or ``"layers"`` to have the first two the other way round: the better choice where there
            is time for one run.
        start: an element that is known to bring them close: the runs begin with it as the order as it is.
        max_sweeps: upper limit of sweeps over all groups, per run.
        tolerance: a pair is done after a sweep that gains no more than this share of the most that the inner product
            can be, the sum over parameters of ``|A| |B|``; with 0, after one that gains nothing.
        seed: of the order of the groups and of the random starts. They are drawn once per call, from the seed
            alone, and serve all pairs alike: a pair's result does not depend on which others it came with.

    Returns:
        The aligned weights, in the dtypes of ``weights``, and a report. Half precision is accumulated in
        float32.

    Shapes:
        Tensors of both arguments: ``(*batch, *shape in the spec)``, where the batch axes of the one broadcast
        against those of the other; results have the joint batch shape.

    Raises:
        SpecError: weights that do not fit the spec, are not finite or so large that products overflow, batch axes
            that do not broadcast, a start that is no element of the spec, or a spec that is not supported: a group
            within two that are independent of each other, one three times in a cell, one twice that has groups
            nested in it or a phase, or phases that shift what is not flipped unit by unit.
        ConfigError: unknown symmetries or first start, fewer than one restart or sweep, a negative seed or tolerance.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        algorithm 1. Everything but permutations of groups that are neither nested nor repeated, the second start,
        and keeping the old permutation on ties are additions. Frank and Wolfe's method for repeated groups is that of
        Vogelstein et al. 2015, "Fast Approximate Quadratic Programming for Graph Matching", PLOS ONE 10(4).

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
        >>> generator = torch.Generator().manual_seed(0)
        >>> a = spec.unflatten(torch.randn(100, spec.num_parameters, generator=generator))
        >>> b = spec.act(spec.random_element((100,), symmetries=["permutation"], generator=generator), a)
        >>> aligned, report = weight_matching(spec, reference=a, weights=b, restarts=2)
        >>> int((report.distance_after == 0).sum())
        100
    """
    report = match_units(
        spec,
        reference,
        weights,
        symmetries=symmetries,
        restarts=restarts,
        first=first,
        start=start,
        max_sweeps=max_sweeps,
        tolerance=tolerance,
        seed=seed,
    )
    batch = tuple(report.objective.shape)
    together = {name: w.expand((*batch, *spec.shape_of(name))) for name, w in weights.items()}
    return spec.act(report.element, together), report


def match_units(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    symmetries: Sequence[str] = ("permutation",),
    restarts: int = 2,
    first: str = "given",
    start: Element | None = None,
    max_sweeps: int = 100,
    tolerance: float = 0.0,
    seed: int = 0,
) -> MatchReport:
    """The report of :func:`weight_matching` alone: for those who need the element, and not what it makes of weights."""
    stopwatch = Stopwatch()
    kinds = _check_options(symmetries, first, tolerance, restarts=restarts, max_sweeps=max_sweeps, seed=seed)
    batch = _joint_batch(spec, reference, weights)
    plans = make_plans(spec, kinds)
    with torch.no_grad():
        begun = weights if start is None else spec.act(start, weights)
    if start is not None:
        batch = _joint_batch(spec, reference, begun)
    problem = Problem(
        spec,
        kinds,
        plans,
        reference,
        begun,
        batch,
        accumulation_dtype(spec, reference, weights),
        restarts,
        0 if first == "layers" else 1,
        max_sweeps,
        seed,
        tolerance,
    )
    # Inside a training step under autocast, products would be rounded to half precision.
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        report = _report(_sweeps.solve(problem), batch, stopwatch)
        return report if start is None else _from_start(spec, report, start, reference, weights)


def _report(found: Outcome, batch: tuple[int, ...], stopwatch: Stopwatch) -> MatchReport:
    return MatchReport(
        method="weight-matching",
        element={name: value.view(*batch, *value.shape[1:]) for name, value in found.element.items()},
        objective=found.objective.view(batch),
        distance_before=found.distance_before.view(batch),
        distance_after=found.distance_after.view(batch),
        sweeps=found.sweeps.view(batch),
        seconds=stopwatch.seconds,
    )


def _from_start(
    spec: WeightSpec,
    report: MatchReport,
    start: Element,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> MatchReport:
    """The report of what was found from the start on, about the way from the weights themselves."""
    batch = tuple(report.objective.shape)
    element = spec.compose(
        report.element, {name: value.to(_device(weights)) for name, value in start.items()}
    )
    shapes = {name: (*batch, *spec.unit_shape(_group(spec, name))) for name in element}
    return replace(
        report,
        element={name: value.expand(shapes[name]) for name, value in element.items()},
        distance_before=compare(spec, reference, weights)[1].expand(batch),
    )


def _group(spec: WeightSpec, name: str) -> str:
    return name if name in spec.groups else spec.scalings[name].group


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


# -- what is asked -----------------------------------------------------------------------------------------


def _check_options(symmetries: Sequence[str], first: str, tolerance: float, **counts: int) -> tuple[str, ...]:
    kinds = (symmetries,) if isinstance(symmetries, str) else tuple(symmetries)
    wrong = [kind for kind in kinds if kind not in SYMMETRIES]
    if wrong or not kinds:
        found = repr(wrong[0]) if wrong else "none"
        raise ConfigError(f"symmetries: expected some of {', '.join(SYMMETRIES)}, found {found}")
    if first not in ("given", "layers"):
        raise ConfigError(f"first: expected given or layers, found {first!r}")
    for name, value in counts.items():
        least = 0 if name == "seed" else 1
        if value < least:
            raise ConfigError(f"{name}: expected at least {least}, found {value}")
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance: expected a finite number of at least 0, found {tolerance}")
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
