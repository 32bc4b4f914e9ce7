"""Sinkhorn re-basin: permutations relaxed to doubly stochastic matrices, and found by gradient descent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch, compare, finish
from weightspace.align._soft import act_soft, round_matrices
from weightspace.align._together import parameters_of
from weightspace.align._training import (
    Losses,
    between,
    check_options,
    check_pair,
    training,
)
from weightspace.errors import ConfigError
from weightspace.spec import Element, Weights, WeightSpec

Objective = Literal["weights", "midpoint", "random"]

_CHECK = 10  # steps between two roundings: each costs an assignment per group, and one evaluation
_HARD = 0.01  # of a row's weight elsewhere than at its largest entry: less, and no gradient is left
_NOISE = 1e-3  # of the first scores: enough to part units that are equal, far less than any step
_RIDGE = 1e-10  # what keeps a solve in float64 regular; it is so far below the gradients' own rounding
_SHARES = (0.25, 0.5, 0.75)  # where a path is judged


class _DoublyStochastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, iterations: int) -> Tensor:
        for _ in range(iterations):
            scores = scores - scores.logsumexp(-1, keepdim=True)
            scores = scores - scores.logsumexp(-2, keepdim=True)
        matrix = scores.exp()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        # Near a permutation, almost every unit has a near null direction of its own: float32 would not do.
        wide, weighted = matrix.double(), (matrix * gradient).double()
        by_row = wide / wide.sum(-1, keepdim=True)
        system = torch.diag_embed(wide.sum(-2) + _RIDGE) - wide.mT @ by_row
        right = weighted.sum(-2, keepdim=True).mT - by_row.mT @ weighted.sum(-1, keepdim=True)
        columns = torch.linalg.solve(system, right)
        rows = (weighted.sum(-1, keepdim=True) - wide @ columns) / wide.sum(-1, keepdim=True)
        return (weighted - wide * (rows + columns.mT)).to(gradient.dtype), None


def doubly_stochastic(
    scores: Float[Tensor, "*batch size size"], iterations: int = 20
) -> Float[Tensor, "*batch size size"]:
    r"""The doubly stochastic matrix that Sinkhorn's iterations make of scores, with implicit gradients.

    Rows and columns of ``exp(scores)`` are divided by their sums in turn, as logarithms; the limit is

        P = diag(u) exp(scores) diag(v),   P 1 = 1,   P^T 1 = 1.

    The backward pass goes through none of the iterations. With G the gradient for P, that for the scores is

        P * (G - a 1^T - 1 b^T),   P 1 * a + P b = (P * G) 1,   P^T a + P^T 1 * b = (P * G)^T 1,

    one linear solve for b in float64 with a eliminated; it is exact where the iterations have converged.

    Args:
        scores: finite; the larger they are, the nearer is P to a permutation and the slower the convergence.
        iterations: how often rows and columns are normalised.

    Reference:
        Sinkhorn 1964; Eisenberger et al. 2022, "A Unified Framework for Implicit Sinkhorn Differentiation",
        arXiv:2205.06688; Pena et al. 2023, arXiv:2212.12042, section 3.

    Example:
        >>> matrix = doubly_stochastic(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        >>> (100 * matrix).round().int().tolist()
        [[88, 12], [12, 88]]
    """
    matrix: Tensor = _DoublyStochastic.apply(scores, iterations)
    return matrix


@matcher("sinkhorn", paper="arXiv:2212.12042", optional=("module", "data", "loss"))
def sinkhorn(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    module: nn.Module | None = None,
    data: Batches | None = None,
    loss: Loss = F.cross_entropy,
    objective: Objective = "weights",
    temperature: Annotated[float, Field(gt=0)] = 0.2,
    iterations: Annotated[int, Field(ge=1)] = 20,
    steps: Annotated[int, Field(ge=1)] = 200,
    learning_rate: Annotated[float, Field(gt=0)] = 0.05,
    seed: int = 0,
) -> tuple[Weights, MatchReport]:
    """Find permutations by gradient descent through doubly stochastic matrices.

    Each group has a matrix of scores X, and P = Sinkhorn(X / temperature) of all groups acts linearly on the
    weights (:func:`act_soft`). Adam lowers one of

    - ``"weights"``: ``||A - P . B||^2``, which needs no data;
    - ``"midpoint"``: the loss of ``(A + P . B) / 2`` on a batch;
    - ``"random"``: the loss of ``(1 - t) A + t P . B`` on a batch, t uniform in [0, 1].

    Scores begin at zero, but for noise of 0.001: every P is then uniform, the gradient of a layer beside a fixed
    input or output is its plain similarity, and the others sharpen as their neighbours do. Every ten steps the
    matrices are rounded by linear assignment, and the permutations of the lowest objective are kept: the distance, or
    the loss over all data at the middle of the path (for ``"random"`` also at its quarters). The search ends early
    when every matrix has become a permutation. A group that owns others (attention heads and the features within them)
    is matched as a whole by assignment (:func:`match_family`) before the first step and after each rounding.

    Args:
        spec: the weight space; only its permutations are searched.
        reference: A, the network that stays.
        weights: B, the network that is reordered.
        module: that computes the networks' function; with ``data``, needed by ``"midpoint"`` and ``"random"``.
        data: batches of inputs and targets.
        loss: of outputs and targets.
        objective: what is lowered.
        temperature: of the relaxation, in units of the scores.
        iterations: of Sinkhorn's normalisation.
        steps: of Adam at most; with data, one batch each, over and over.
        learning_rate: of Adam, in units of the scores.
        seed: of the noise and of what data loaders draw.

    Returns:
        The aligned weights, in the dtypes of ``weights``, and a report whose ``sweeps`` are the steps that were taken.

    Raises:
        SpecError: networks that do not fit the spec, are not finite or have batch axes.
        ConfigError: an objective without the module or the data that it needs, or an option out of range.
        DataError: data that do not suit the module.

    Reference:
        Pena et al. 2023, "Re-basin via Implicit Sinkhorn Differentiation", arXiv:2212.12042. Groups within groups,
        the choice of the best rounding and the early end are additions.

    Example:
        >>> spec = WeightSpec.mlp([4, 8, 8, 2])
        >>> a = spec.unflatten(torch.randn(spec.num_parameters, generator=torch.Generator().manual_seed(0)))
        >>> b = spec.act(spec.random_element(symmetries=["permutation"]), a)
        >>> aligned, report = sinkhorn(spec, a, b)
        >>> bool(torch.equal(aligned["layers.1.weight"], a["layers.1.weight"]))
        True
    """
    stopwatch = Stopwatch()
    check_options(
        steps=steps, iterations=iterations, seed=seed, temperature=temperature, learning_rate=learning_rate
    )
    check_pair(spec, reference, weights)
    judge = _judge(spec, reference, weights, objective, module, data, loss)
    with training(seed, _device(weights)):
        search = _Search.begin(spec, reference, weights, temperature, iterations, seed)
        done = _descend(search, judge, steps, learning_rate)
    return finish(spec, "sinkhorn", reference, weights, search.best, done, stopwatch)


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device


# -- what is lowered ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Judge:
    """The objective: of soft-moved weights with gradients, of hard-moved ones over all data."""

    spec: WeightSpec
    objective: Objective
    reference: Weights
    weights: Mapping[str, Tensor]
    losses: Losses | None

    def soft(self, moved: Weights, batch: tuple[Any, Tensor] | None) -> Tensor:
        if self.losses is None or batch is None:
            return torch.stack(
                [(value - moved[name]).square().sum() for name, value in self.reference.items()]
            ).sum()
        share = 0.5 if self.objective == "midpoint" else torch.rand(()).item()
        return self.losses.of_batch(between(self.reference, moved, share, self.weights), *batch)

    def hard(self, moved: Weights) -> float:
        if self.losses is None:
            return float(compare(self.spec, self.reference, moved)[1])
        shares = (0.5,) if self.objective == "midpoint" else _SHARES
        points = (between(self.reference, moved, share, self.weights) for share in shares)
        return sum(self.losses.mean(point) for point in points) / len(shares)

    def batches(self) -> Iterator[tuple[Any, Tensor] | None]:
        if self.losses is None:
            yield from repeat(None)
        else:
            while True:
                yield from self.losses.batches()


def _judge(
    spec: WeightSpec,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    objective: Objective,
    module: nn.Module | None,
    data: Batches | None,
    loss: Loss,
) -> _Judge:
    if objective not in ("weights", "midpoint", "random"):
        raise ConfigError(f"objective: expected weights, midpoint or random, found {objective!r}")
    wide = parameters_of(spec, reference)
    if objective == "weights":
        return _Judge(spec, objective, wide, weights, None)
    if module is None or data is None:
        missing = "module" if module is None else "data"
        raise ConfigError(f"objective: {objective!r} needs a module and data, found no {missing}")
    return _Judge(spec, objective, wide, weights, Losses.of(spec, module, weights, data, loss))


# -- the search --------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Search:
    """Where the search stands.

    Args:
        spec: the weight space.
        reference: A.
        weights: B.
        scores: X per group that is relaxed.
        temperature: by which they are divided.
        iterations: of Sinkhorn's normalisation.
        families: the groups that own others.
        held: the element of the families.
        moved: B after it.
        best: the element with the lowest objective so far.
        lowest: that objective.
    """

    spec: WeightSpec
    reference: Weights
    weights: Weights
    scores: dict[str, Tensor]
    temperature: float
    iterations: int
    families: tuple[str, ...]
    held: Element = field(default_factory=dict)
    moved: Weights = field(default_factory=dict)
    best: Element = field(default_factory=dict)
    lowest: float = float("inf")

    @classmethod
    def begin(
        cls,
        spec: WeightSpec,
        reference: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        temperature: float,
        iterations: int,
        seed: int,
    ) -> _Search:
        wide = parameters_of(spec, weights)
        owners = {outer for group in spec.groups.values() for outer in group.within}
        known = _known(spec)
        top = [name for name, group in spec.groups.items() if name in known and not group.within]
        generator = torch.Generator().manual_seed(seed)
        scores = {
            name: _first_scores(spec.groups[name].size, generator, _device(weights))
            for name in top
            if name not in owners
        }
        families = tuple(name for name in top if name in owners)
        search = cls(
            spec, parameters_of(spec, reference), wide, scores, temperature, iterations, families, moved=wide
        )
        search.match_families({})
        return search

    def matrices(self) -> dict[str, Tensor]:
        return {
            name: doubly_stochastic(value / self.temperature, self.iterations)
            for name, value in self.scores.items()
        }

    @torch.no_grad()
    def match_families(self, matrices: Mapping[str, Tensor]) -> None:
        """Match the families of B to A, with all other groups where their matrices have them (uniform if absent)."""
        if not self.families:
            return
        from weightspace.align._families import match_family

        matrices = matrices or self.matrices()
        for family in self.families:
            soft = act_soft(self.spec, matrices, self.moved)
            element = match_family(self.spec, family, self.reference, soft)
            self.held = self.spec.compose(element, self.held)
            self.moved = self.spec.act(self.held, self.weights)

    @torch.no_grad()
    def check(self, judge: _Judge, matrices: Mapping[str, Tensor]) -> bool:
        """Round, keep what is best, and say whether every matrix is a permutation by now."""
        element = {**round_matrices(self.spec, matrices), **self.held}
        if not _equal(element, self.best):
            value = judge.hard(self.spec.act(element, self.weights))
            if not self.best or value < self.lowest:
                self.best, self.lowest = element, value
        before = self.held
        self.match_families(matrices)
        hard = all(bool((matrix.amax(-1) > 1 - _HARD).all()) for matrix in matrices.values())
        return hard and _equal(before, self.held)


def _known(spec: WeightSpec) -> set[str | None]:
    """The groups that parameters know: of the others nothing can be learned."""
    tensors = [tensor for tensor in spec.tensors.values() if tensor.kind == "parameter"]
    return {dim.group for tensor in tensors for cell in tensor.cells for dim in cell.dims}


def _first_scores(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return (_NOISE * torch.randn(size, size, generator=generator)).to(device).requires_grad_()


def _equal(first: Element, second: Element) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _descend(search: _Search, judge: _Judge, steps: int, learning_rate: float) -> int:
    """Lower the objective; returns the steps that were taken."""
    if not search.scores:
        search.check(judge, {})
        return 0
    optimizer = torch.optim.Adam(search.scores.values(), lr=learning_rate)
    for step, batch in zip(range(1, steps + 1), judge.batches(), strict=False):
        matrices = search.matrices()
        optimizer.zero_grad()
        judge.soft(act_soft(search.spec, matrices, search.moved), batch).backward()
        optimizer.step()
        if (step % _CHECK == 0 or step == steps) and search.check(judge, matrices):
            return step
    return steps
