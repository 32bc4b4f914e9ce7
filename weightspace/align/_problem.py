"""The pairs to be matched, with what may be done to them, and what is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from torch import Tensor

from weightspace.align._plans import Plan
from weightspace.errors import SpecError
from weightspace.spec import Element, WeightSpec

# A move must gain more than this share of ||A|| ||B||: rounding alone can fake a gain between equal choices.
_ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-12}
_ORDERS = 64  # sweeps after which the orders of the groups come round again; few need more than ten


@dataclass(frozen=True)
class Problem:
    """What is to be matched.

    Args:
        spec: the weight space.
        symmetries: the kinds that are matched.
        plans: one per group.
        reference: A, tensors ``(*batch, *shape)`` of which the batch axes broadcast.
        weights: B, likewise.
        batch: the joint batch shape.
        dtype: of accumulation, float32 or float64.
        restarts: runs per pair.
        by_layer: which of them matches layer by layer first.
        max_sweeps: upper limit of sweeps per run.
        seed: of orders and random starts.
        tolerance: a pair is done after a sweep that gains no more than this share of what the inner product can be.
    """

    spec: WeightSpec
    symmetries: tuple[str, ...]
    plans: tuple[Plan, ...]
    reference: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    batch: tuple[int, ...]
    dtype: torch.dtype
    restarts: int
    by_layer: int
    max_sweeps: int
    seed: int
    tolerance: float = 0.0

    @property
    def parameters(self) -> tuple[str, ...]:
        """The tensors that count: parameters, as far as they are given."""
        tensors = self.spec.tensors.items()
        return tuple(
            name for name, tensor in tensors if tensor.kind == "parameter" and name in self.reference
        )

    @property
    def pairs(self) -> int:
        """How many there are."""
        return math.prod(self.batch)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    @property
    def rounding(self) -> float:
        """The share of what an inner product can be that a move must gain to be taken."""
        return _ROUNDING[self.dtype]

    @property
    def limit(self) -> float:
        """What the square of the sum of all norms may not exceed, so that no sum of products overflows."""
        return float(torch.finfo(self.dtype).max) / 8

    @cached_property
    def changed(self) -> frozenset[str]:
        """The tensors that phases shift or factors multiply: what matching does to them changes their norms."""
        found = set()
        for name in {name for plan in self.plans for name in plan.values if name in self.spec.scalings}:
            scaling = self.spec.scalings[name]
            found |= {place.tensor for place in scaling.shifts}
            found |= {place.tensor for place in scaling.exponents if scaling.kind == "positive"}
        return frozenset(found & set(self.parameters))

    def orders(self, restart: int) -> np.ndarray:
        """The groups in the order of each sweep, (sweeps, groups) int64; they come round again."""
        generator = np.random.default_rng([self.seed, restart])
        rows = np.tile(np.arange(len(self.plans)), (min(self.max_sweeps, _ORDERS), 1))
        return generator.permuted(rows, axis=1)

    def start(self, restart: int) -> Element:
        """The element with which a run begins, for all pairs: the identity, or from the third on a random one."""
        element = self.spec.identity()
        if restart > 1:
            entropy = np.random.SeedSequence([self.seed, restart, 1]).generate_state(1)
            element = self.spec.random_element(generator=torch.Generator().manual_seed(int(entropy[0])))
        return {name: self._value(name, element) for plan in self.plans for name in plan.values}

    def _value(self, name: str, element: Element) -> Tensor:
        """A random factor is farther from any than 1 is."""
        scaling = self.spec.scalings.get(name)
        factor = scaling is not None and scaling.kind == "positive"
        return torch.ones_like(element[name], dtype=self.dtype) if factor else element[name]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found, one row per pair; see :class:`MatchReport`."""

    element: Element
    objective: Tensor
    distance_before: Tensor
    distance_after: Tensor
    sweeps: Tensor


def accumulation_dtype(spec: WeightSpec, *sides: Mapping[str, Tensor]) -> torch.dtype:
    """float32, or float64 where some tensor needs it.

    Raises:
        SpecError: parameters that are not real.
    """
    names = [name for name, tensor in spec.tensors.items() if tensor.kind == "parameter"]
    dtypes = {side[name].dtype for side in sides for name in names if name in side}
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    if dtype not in _ROUNDING:
        raise SpecError(f"weights: expected real parameters, found {dtype}")
    return dtype


def check_norms(problem: Problem, norms: np.ndarray) -> None:
    """Refuse what is not finite, and what is so large that products overflow.

    Args:
        problem: what is to be matched.
        norms: (pairs, 2, parameters) float64: of the reference's tensors, then of the weights'.

    Raises:
        SpecError: the first such tensor is named.
    """
    sums = norms.sum((1, 2))
    if bool((sums <= math.sqrt(problem.limit)).all()):
        return
    for side, role in enumerate(("reference", "weights")):
        for number, name in enumerate(problem.parameters):
            wrong = ~np.isfinite(norms[:, side, number])
            if wrong.any():
                pair = int(wrong.argmax())
                raise SpecError(
                    f"{role}: expected finite values, but tensor {name!r} of pair {pair} has norm "
                    f"{norms[pair, side, number]}"
                )
    pair = int(sums.argmax())
    side, number = np.unravel_index(norms[pair].argmax(), norms[pair].shape)
    raise SpecError(
        f"{('reference', 'weights')[side]}: tensor {problem.parameters[number]!r} of pair {pair} has norm "
        f"{norms[pair, side, number]:.3g}, whose products overflow {str(problem.dtype).removeprefix('torch.')}"
    )
