"""TIES: task vectors trimmed, their signs elected, and those that agree averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import hardshrink

from weightspace.merge._checks import masses
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Block, Stack, linear
from weightspace.merge._threshold import largest
from weightspace.spec import Weights, WeightSpec

Density = Annotated[float, Field(gt=0, le=1, description="share of a network's changes that is kept")]

Deltas = Callable[[str], Callable[[Block], list[Tensor]]]
"""For the tensors of a name, what makes task vectors of its blocks, one after the other."""


def plain(name: str) -> Callable[[Block], list[Tensor]]:
    """What fine-tuning changed, as it is."""
    return lambda block: block.deltas


def plan_ties(
    stack: Stack,
    *,
    density: float,
    weights: Sequence[int | float] | None,
    scaling: float,
    deltas: Deltas = plain,
) -> Rule:
    """The rule of TIES for task vectors that were changed before, or not."""
    given = masses(len(stack), weights)
    exponent = math.frexp(max(given))[1]
    parts = [
        math.ldexp(weight, -exponent) for weight in given
    ]  # at most 1, and exact: what cancels still does
    thresholds = _thresholds(stack, density, deltas) if density < 1 else [0.0] * len(stack)

    def rule(name: str) -> Tensor:
        changes = deltas(name)
        return stack.elementwise(
            name, lambda block: block.origin + scaling * _agreed(changes(block), thresholds, parts)
        )

    return rule


def _agreed(deltas: Sequence[Tensor], thresholds: Sequence[float], parts: Sequence[float]) -> Tensor:
    """The weighted mean of those changes, among the large ones, that have the elected sign; 0 where there are none.

    Signs and rectifiers instead of ``torch.where``, which takes twenty times as long.
    """
    kept = [
        hardshrink(delta, _below(threshold, delta.dtype))
        for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    elected = linear(kept, parts).sign()
    agreed = [(delta * elected).relu_() for delta in kept]  # the magnitude of those that agree
    total = linear(agreed, parts)
    mass = linear([magnitude.sign_() for magnitude in agreed], parts)
    return elected * total / mass.clamp_min(1e-30)


def _below(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a type below a threshold: what exceeds it is what is at least the threshold."""
    near = torch.tensor(threshold, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    return float(near if near.item() < threshold else torch.nextafter(near, zero))


def _thresholds(stack: Stack, density: float, deltas: Deltas) -> list[float]:
    """Per network the smallest magnitude that is kept, among all tensors together."""
    size = sum(stack.meta(name).numel() for name in stack.parameters)
    dtypes = [stack.dtype(name) for name in stack.parameters]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32

    def magnitudes() -> Iterator[list[Tensor]]:
        for name in stack.parameters:
            changes = deltas(name)
            # a loop's variable would hold this name's tensors while those of the next are read
            yield from ([delta.abs().to(wide) for delta in changes(block)] for block in stack.blocks(name))

    if not size:
        return [0.0] * len(stack)
    rank = max(1, math.floor(density * size + 0.5))  # at least one, in networks however small
    device = stack.networks[0][stack.parameters[0]].device
    return largest(magnitudes, [rank] * len(stack), wide, device)


@merger("ties", plan_ties, paper="arXiv:2306.01708", base=True)
def ties(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    density: Density = 0.2,
    weights: Sequence[int | float] | None = None,
    scaling: float = 1.0,
    spec: WeightSpec | None = None,
) -> Weights:
    """Trim task vectors, elect a sign for every parameter, average those that have it (TIES).

    Of each network's changes ``d_i = networks[i] - base`` the share ``density`` with the largest magnitudes is
    kept, among all parameters of the network together. The elected sign of a parameter is that of
    ``sum_i weights[i] d_i`` over what was kept; the merged change is the weighted mean of the kept changes that
    have it, times ``scaling``. Where changes cancel, or none was kept, the base stays.

    Args:
        networks: two or more, fine-tuned from the base.
        base: the network that they were fine-tuned from.
        density: share of a network's changes that is kept, in (0, 1]; at least one is. All that equal the
            smallest one kept are kept.
        weights: one per network, at least 0; equal by default.
        scaling: what the merged change is multiplied by.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: fewer than two networks, a base that is one of them, ``density`` out of range, a wrong
            number of weights, one below 0, or a sum of 0.

    Reference:
        Yadav et al. 2023, "TIES-Merging: Resolving interference when merging models", arXiv:2306.01708
        (algorithm 1; k is ``density``, lambda is ``scaling``; the weights are an addition).

    Example:
        >>> base = {"w": torch.zeros(4)}
        >>> a, b = {"w": torch.tensor([3.0, -0.1, 2.0, 1.0])}, {"w": torch.tensor([1.0, 0.2, -4.0, 0.1])}
        >>> ties([a, b], base=base, density=0.5)["w"]
        tensor([ 2.,  0., -4.,  0.])
    """
    return merge_networks(
        "ties", networks, base=base, density=density, weights=weights, scaling=scaling, spec=spec
    )
