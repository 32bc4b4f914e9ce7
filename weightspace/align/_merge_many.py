"""Merge many: networks take turns, each being aligned to the mean of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weightspace.align._registry import matcher
from weightspace.align._report import MatchReport, Stopwatch
from weightspace.align._together import average, check_together, finish_together, joined, parameters_of, total
from weightspace.align._weight_matching import weight_matching
from weightspace.spec import Element, Weights, WeightSpec


@matcher("merge-many", paper="arXiv:2209.04836", together=True)
def merge_many(
    spec: WeightSpec,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    symmetries: Sequence[str] = ("permutation",),
    restarts: Annotated[int, Field(ge=1)] = 2,
    max_sweeps: Annotated[int, Field(ge=1)] = 50,
    tolerance: Annotated[float, Field(ge=0)] = 1e-7,
    seed: int = 0,
) -> tuple[list[Weights], MatchReport]:
    """Bring many networks onto each other: in turns, each is matched onto the mean of the others.

    Lowers the sum over networks of the squared distances to their mean,

        sum_i || g_i . W_i - mean_j g_j . W_j ||^2,

    by weight matching of one network at a time, which starts from where the network is and stays there unless the
    sum falls. It is the average of the networks that is wanted, and no network is the reference. For two networks this
    is weight matching of the one onto the other.

    Args:
        spec: the weight space.
        networks: two or more, without batch axes.
        symmetries: what may be done to units, as in :func:`weight_matching`.
        restarts: runs, of which the one with the lowest sum is kept. The first begins by matching each network onto
            the mean of those before it, in random order; the second from the networks as they are, as in the
            paper; the others from random elements.
        max_sweeps: upper limit of rounds in which every network has its turn, per run.
        tolerance: a run ends with a round that lowers the sum by no more than this share of it.
        seed: of the orders and of the random starts.

    Returns:
        The networks in their order, and a report with an entry per network; its sweeps are rounds.

    Raises:
        SpecError: networks that do not fit the spec or are not finite.
        ConfigError: fewer than two networks, an option out of range, or unknown symmetries.

    Reference:
        Ainsworth et al. 2023, "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv:2209.04836,
        algorithm 3. The first start and keeping the best of several runs are additions.

    Example:
        >>> spec = WeightSpec.mlp([2, 16, 1], activation="tanh")
        >>> a = spec.unflatten(torch.randn(spec.num_parameters))
        >>> elements = [spec.random_element(symmetries=["permutation"]) for _ in range(4)]
        >>> _, report = merge_many(spec, [spec.act(element, a) for element in elements])
        >>> bool((report.distance_after < 1e-5).all())
        True
    """
    stopwatch = Stopwatch()
    check_together(spec, networks, seed=seed, tolerance=tolerance, restarts=restarts, max_sweeps=max_sweeps)
    parameters = [parameters_of(spec, network) for network in networks]
    kinds = (symmetries,) if isinstance(symmetries, str) else tuple(symmetries)
    best = descend(spec, parameters, kinds, restarts, max_sweeps, tolerance, seed)
    element = joined(spec, best.elements)
    return finish_together(spec, "merge-many", networks, element, len(best.totals) - 1, stopwatch)


def descend(
    spec: WeightSpec,
    networks: Sequence[Weights],
    symmetries: tuple[str, ...] = ("permutation",),
    restarts: int = 1,
    max_sweeps: int = 50,
    tolerance: float = 1e-7,
    seed: int = 0,
) -> Descent:
    """What :func:`merge_many` does, on the parameters of all networks alone: the best of its runs."""
    runs = []
    for restart in range(restarts):
        random = np.random.default_rng([seed, restart])
        run = Descent(spec, symmetries, list(networks), random, [{} for _ in networks])
        if restart == 0:
            run.gather()
        elif restart > 1:
            run.scatter()
        run.finish(max_sweeps, tolerance)
        runs.append(run)
    return min(runs, key=lambda run: run.totals[-1])  # the earliest on ties


@dataclass
class Descent:
    """One run: where the networks are, and how they came there.

    Args:
        spec: the weight space.
        symmetries: what may be done to units.
        moved: the parameters of every network where it is now.
        random: of orders and of seeds.
        elements: by which they came there; a missing name is the identity.
        totals: the sum before the first round, and after each.
    """

    spec: WeightSpec
    symmetries: tuple[str, ...]
    moved: list[Weights]
    random: np.random.Generator
    elements: list[Element]
    totals: list[float] = field(default_factory=list)

    def gather(self) -> None:
        """In random order, each network onto the mean of those before it."""
        order = self.random.permutation(len(self.moved)).tolist()
        for count in range(1, len(order)):
            self._turn(order[count], order[:count], restarts=2)

    def scatter(self) -> None:
        """Every network to anywhere."""
        generator = torch.Generator().manual_seed(int(self.random.integers(2**62)))
        for row, moved in enumerate(self.moved):
            element = self.spec.random_element(symmetries=self.symmetries, generator=generator)
            self.move(
                row, {name: value.to(next(iter(moved.values())).device) for name, value in element.items()}
            )

    def copy(self, random: np.random.Generator) -> Descent:
        """A run that goes on from here."""
        return Descent(self.spec, self.symmetries, list(self.moved), random, list(self.elements))

    def finish(self, max_sweeps: int = 50, tolerance: float = 1e-7) -> None:
        """Rounds until one lowers the sum by no more than a share of it."""
        everyone = range(len(self.moved))
        self.totals.append(total(self.moved))
        for _ in range(max_sweeps):
            for row in self.random.permutation(len(self.moved)).tolist():
                self._turn(row, [other for other in everyone if other != row], restarts=1)
            self.totals.append(total(self.moved))
            if self.totals[-1] >= self.totals[-2] * (1 - tolerance):
                break

    def _turn(self, row: int, others: Sequence[int], restarts: int) -> None:
        """Match one network onto the mean of others, from where it is; it stays unless it comes closer."""
        mean = average([self.moved[other] for other in others])
        _, report = weight_matching(
            self.spec,
            mean,
            self._complete(self.moved[row]),
            symmetries=self.symmetries,
            restarts=restarts,
            seed=int(self.random.integers(2**31)),
        )
        if bool(report.distance_after < report.distance_before):
            self.move(row, report.element)

    def move(self, row: int, element: Element) -> None:
        """Let an element act on one network."""
        self.moved[row] = self.spec.act(element, self.moved[row])
        self.elements[row] = self.spec.compose(element, self.elements[row])

    def _complete(self, parameters: Weights) -> Weights:
        """With statistics, which do not count but are asked for."""
        like = next(iter(parameters.values()))
        missing = {
            name: like.new_zeros(tensor.shape)
            for name, tensor in self.spec.tensors.items()
            if tensor.kind != "parameter"
        }
        return {**parameters, **missing}
