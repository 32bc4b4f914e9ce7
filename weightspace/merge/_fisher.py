"""The average of networks, weighted by how much each of them cares for a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.merge._checks import masses, normalised
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Block, Stack, linear
from weightspace.spec import Weights, WeightSpec

FLOOR = 1e-30
"""Below all information that float32 can tell from none: where there is none, it makes the plain average."""


def _plan(stack: Stack, *, weights: Sequence[int | float] | None) -> Rule:
    parts = normalised(masses(len(stack), weights))

    def average(block: Block) -> Tensor:
        total = linear(block.statistics, parts) + FLOOR
        merged = torch.zeros_like(total)
        for network, information, part in zip(block.networks, block.statistics, parts, strict=True):
            merged = merged + network * (part * (information + FLOOR) / total)
        return merged

    def rule(name: str) -> Tensor:
        if name not in stack.informed:
            return stack.mean(name, parts)
        return stack.elementwise(name, average, statistics=True)

    return rule


@merger("fisher", _plan, paper="arXiv:2111.09832", statistics="fisher")
def fisher(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    statistics: Sequence[Mapping[str, Tensor]],
    weights: Sequence[int | float] | None = None,
    spec: WeightSpec | None = None,
) -> Weights:
    """The average weighted by Fisher information, entry by entry.

    ``sum_i weights[i] F_i networks[i] / sum_i weights[i] F_i``, where ``F_i`` is the diagonal of the Fisher
    information. Where all of it is 0 (below 1e-30), and for tensors without any, the plain weighted average.

    Args:
        networks: two or more.
        statistics: of each network, tensors of its shapes and at least 0: :func:`fisher_information`.
        weights: one per network, at least 0; equal by default.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics such as running means are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN, infinite or negative
            numbers.
        ConfigError: fewer than two networks, a wrong number of statistics or weights, a weight below 0, or a sum
            of 0.

    Reference:
        Matena and Raffel 2022, "Merging models with Fisher-weighted averaging", arXiv:2111.09832.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 2.0])}
        >>> statistics = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]
        >>> fisher([a, b], statistics=statistics)["w"]
        tensor([1.2500, 1.5000])
    """
    return merge_networks("fisher", networks, statistics=statistics, weights=weights, spec=spec)
