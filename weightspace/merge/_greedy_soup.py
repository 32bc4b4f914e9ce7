"""The average of those networks whose average is best, found greedily."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from weightspace.errors import DataError
from weightspace.merge._checks import check_stack
from weightspace.merge._registry import (
    LazyMerge,
    Rule,
    Score,
    check_count,
    find_merger,
    merge_networks,
    merger,
)
from weightspace.merge._stack import Stack
from weightspace.spec import Weights, WeightSpec


def _plan(stack: Stack, *, score: Score) -> Rule:
    members = _members(stack, score)
    shares = [float(index in members) / len(members) for index in range(len(stack))]
    return lambda name: stack.mean(name, shares)


def _members(stack: Stack, score: Score) -> list[int]:
    scores = [_scored(score, network, f"network {at}") for at, network in enumerate(stack.networks)]
    first, *others = sorted(range(len(stack)), key=lambda index: -scores[index])
    members, best = [first], scores[first]
    for index in others:
        tried = Stack(tuple(stack.networks[member] for member in [*members, index]), spec=stack.spec)
        found = _scored(score, LazyMerge(tried, tried.mean, everywhere=True).gather(), "a soup")
        if found >= best:
            members, best = [*members, index], found
    return members


def _scored(score: Score, network: Mapping[str, Tensor], title: str) -> float:
    found = float(score(network))
    if not math.isfinite(found):
        raise DataError(f"score: expected a finite number, found {found} for {title}")
    return found


@merger("greedy-soup", _plan, paper="arXiv:2203.05482", score=True, everywhere=True)
def greedy_soup(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    score: Score,
    spec: WeightSpec | None = None,
) -> Weights:
    """The average of the best network and of those others that do not make it worse (greedy soup).

    From the best network to the worst, each is added to the average if the score does not fall.

    Args:
        networks: two or more.
        score: how good a network is, for instance its accuracy on validation data; higher is better. It is
            called once per network, and once per average that is tried.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype; :func:`soup_members` says of which networks.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: fewer than two networks.
        DataError: a score that is not finite.

    Reference:
        Wortsman et al. 2022, "Model soups", arXiv:2203.05482 (recipe 1).

    Example:
        >>> import torch
        >>> networks = [{"w": torch.tensor([value])} for value in (1.0, 3.0, 9.0)]
        >>> greedy_soup(networks, score=lambda network: -abs(network["w"].item() - 2.0))["w"]
        tensor([2.])
    """
    return merge_networks("greedy-soup", networks, score=score, spec=spec)


def soup_members(networks: Sequence[Mapping[str, Tensor]], score: Score) -> list[int]:
    """Which networks :func:`greedy_soup` averages, the best first.

    Args:
        networks: two or more, of the same names and shapes.
        score: how good a network is; higher is better.

    Raises:
        SpecError: names or shapes that differ; NaN or infinite weights.
        ConfigError: fewer than two networks.
        DataError: a score that is not finite.

    Example:
        >>> import torch
        >>> networks = [{"w": torch.tensor([value])} for value in (9.0, 3.0, 1.0)]
        >>> soup_members(networks, score=lambda network: -abs(network["w"].item() - 2.0))
        [1, 2]
    """
    check_count(find_merger("greedy-soup"), len(networks))
    stack = Stack(tuple(networks))
    check_stack(stack, batched=False)
    return _members(stack, score)
