"""Weight matching: coordinate ascent over the groups of a spec, one assignment problem per group and pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.align import _compiled, _sweeps
from weightspace.align._plans import make_plans
from weightspace.align._problem import Outcome, Problem, accumulation_dtype
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Weights, WeightSpec

MATCHED = ("permutation", "sign", "phase")


@matcher("weight-matching", paper="arXiv:2209.04836", batched=True)
def weight_matching(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    symmetries: Sequence[str] = ("permutation",),
    restarts: int = 2,
    first: str = "given",
    max_sweeps: int = 100,
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
    growth of the squared norm.
    What a network computes is never changed. Statistics and constants do not count, but statistics move along.

    On a CPU, pairs of small networks are matched in compiled code, one pair per thread, as many threads as PyTorch
    uses; the first call compiles it, and later processes find it on disk. 64 pairs of SIRENs 2-32-32-1 take 5 to
    10 ms on two cores (``benchmarks/weight_matching.py``, ``benchmarks/mixup.py``).

    Args:
        spec: the weight space.
        reference: A, the networks that stay; every parameter of the spec.
        weights: B, the networks that are reordered; every parameter and statistic of the spec.
        symmetries: some of ``"permutation"``, ``"sign"`` and ``"phase"``. Those that the spec lacks do nothing.
        restarts: runs per pair, of which the best is kept. The first starts from the order as it is; the second
            matches layer by layer from the input first, which restores a shuffled feed-forward network; the
            others start from random elements.
        first: ``"given"``, or ``"layers"`` to have the first two the other way round: the better choice where there
            is time for one run.
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
        SpecError: weights that do not fit the spec, are not finite or so large that products overflow, batch axes
            that do not broadcast, or a spec with nested or repeated groups, which are not yet supported.
        ConfigError: unknown symmetries or first start, fewer than one restart or sweep, or a negative seed.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        algorithm 1. Signs, phases, the second start, and keeping the old permutation on ties are additions.

    Example:
        >>> spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
        >>> generator = torch.Generator().manual_seed(0)
        >>> a = spec.unflatten(torch.randn(100, spec.num_parameters, generator=generator))
        >>> b = spec.act(spec.random_element((100,), symmetries=["permutation"], generator=generator), a)
        >>> aligned, report = weight_matching(spec, reference=a, weights=b, restarts=2)
        >>> int((report.distance_after == 0).sum())
        100
    """
    stopwatch = Stopwatch()
    kinds = _check_options(symmetries, first, restarts=restarts, max_sweeps=max_sweeps, seed=seed)
    batch = _joint_batch(spec, reference, weights)
    problem = Problem(
        spec,
        kinds,
        make_plans(spec, kinds),
        reference,
        weights,
        batch,
        accumulation_dtype(spec, reference, weights),
        restarts,
        0 if first == "layers" else 1,
        max_sweeps,
        seed,
    )
    # Inside a training step under autocast, products would be rounded to half precision.
    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        report = _report(_match(problem), batch, stopwatch)
    together = {name: w.expand((*batch, *spec.tensors[name].shape)) for name, w in weights.items()}
    return spec.act(report.element, together), report


def _match(problem: Problem) -> Outcome:
    return _compiled.match(problem) if _compiled.can_match(problem) else _sweeps.match(problem)


def _report(found: Outcome, batch: tuple[int, ...], stopwatch: Stopwatch) -> MatchReport:
    return MatchReport(
        method="weight-matching",
        element={name: value.view(*batch, value.shape[-1]) for name, value in found.element.items()},
        objective=found.objective.view(batch),
        distance_before=found.distance_before.view(batch),
        distance_after=found.distance_after.view(batch),
        sweeps=found.sweeps.view(batch),
        seconds=stopwatch.seconds,
    )


# -- what is asked -----------------------------------------------------------------------------------------


def _check_options(symmetries: Sequence[str], first: str, **counts: int) -> tuple[str, ...]:
    kinds = (symmetries,) if isinstance(symmetries, str) else tuple(symmetries)
    wrong = [kind for kind in kinds if kind not in MATCHED]
    if wrong or not kinds:
        found = repr(wrong[0]) if wrong else "none"
        raise ConfigError(f"symmetries: expected some of {', '.join(MATCHED)}, found {found}")
    if first not in ("given", "layers"):
        raise ConfigError(f"first: expected given or layers, found {first!r}")
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
