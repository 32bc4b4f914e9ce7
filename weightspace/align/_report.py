"""What a matcher found, and how much closer networks are for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weightspace.spec import Element, Weights, WeightSpec


@dataclass(frozen=True, eq=False)
class MatchReport:
    """What a matcher found, with one entry per network that was moved.

    The batch axes of the entries are those of the networks; matchers that move several networks together put an
    axis in front of them, one entry per network, and compare each with the mean of all, before and after.

    Args:
        method: name of the matcher.
        element: the group element whose action on the given weights gives exactly the aligned weights.
        objective: inner product of reference and aligned weights over all parameters, float64.
        distance_before: L2 distance between reference and weights over all parameters, float64.
        distance_after: L2 distance between reference and aligned weights, float64.
        sweeps: how often the method went over the groups, or its steps, in the run that was kept.
        seconds: wall time of the call.
        center: what the networks were brought onto, where it is none of those that were given (a star model).
    """

    method: str
    element: Element
    objective: Float[Tensor, "*batch"]
    distance_before: Float[Tensor, "*batch"]
    distance_after: Float[Tensor, "*batch"]
    sweeps: Int[Tensor, "*batch"]
    seconds: float
    center: Weights | None = None

    def summary(self) -> str:
        """One line: distances, inner product and sweeps; means over the networks when there are many."""
        before, after, objective = (
            f"{value.mean().item():.4g}"
            for value in (self.distance_before, self.distance_after, self.objective)
        )
        pairs = self.sweeps.numel()
        which, most = ("", "") if pairs == 1 else (f" of {pairs:,} networks, means", "at most ")
        sweeps = int(self.sweeps.max()) if pairs else 0
        return (
            f"{self.method}{which}: distance {before} -> {after}, inner product {objective}, "
            f"{most}{sweeps} sweep{'' if sweeps == 1 else 's'}, {self.seconds:.2g} s"
        )

    def __str__(self) -> str:
        return self.summary()


@dataclass
class Stopwatch:
    """Wall time since it was made."""

    begin: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self.begin


def finish(
    spec: WeightSpec,
    method: str,
    reference: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    element: Element,
    sweeps: int | Tensor,
    stopwatch: Stopwatch,
) -> tuple[Weights, MatchReport]:
    """Let an element act, and report how much closer the weights are to the reference for it.

    Args:
        spec: the weight space.
        method: name of the matcher.
        reference: what stays; every parameter of the spec.
        weights: what moves.
        element: that was found; its batch axes are the joint ones of both sides.
        sweeps: one for all, or a tensor of the joint batch shape.
        stopwatch: started when the matcher was called.
    """
    with torch.no_grad():
        aligned = spec.act(element, weights)
        objective, after = compare(spec, reference, aligned)
        before = compare(spec, reference, weights)[1].expand(after.shape)
    counts = torch.as_tensor(sweeps, dtype=torch.long).expand(after.shape)
    report = MatchReport(method, element, objective, before, after, counts, stopwatch.seconds)
    return aligned, report


def compare(
    spec: WeightSpec, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Inner product and L2 distance of two networks over all parameters, float64; statistics do not count."""
    product: Tensor | float = 0.0
    square: Tensor | float = 0.0
    for name, tensor in spec.tensors.items():
        if tensor.kind == "parameter":
            dims = list(range(-len(tensor.shape), 0))
            a, b = first[name].double(), second[name].double()
            product = product + ((a * b).sum(dims) if dims else a * b)
            square = square + ((a - b).square().sum(dims) if dims else (a - b).square())
    return torch.as_tensor(product, dtype=torch.float64), torch.as_tensor(square, dtype=torch.float64).sqrt()
