"""Averages of networks, tensor by tensor: the plainest of all merge methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from weightspace.merge._checks import coefficients, normalised
from weightspace.merge._registry import LazyMerge, Rule, merge_networks, merger, prepare
from weightspace.merge._stack import Stack
from weightspace.spec import Weights, WeightSpec


def _mean(stack: Stack) -> Rule:
    return stack.mean


def _weighted(stack: Stack, *, weights: Sequence[int | float]) -> Rule:
    parts = normalised(coefficients(len(stack), weights, 1.0))
    return lambda name: stack.mean(name, parts)


@merger("average", _mean, paper="arXiv:2203.05482", everywhere=True, batched=True, least=1)
def average(
    networks: Sequence[Mapping[str, Tensor]],
    weights: Sequence[int | float] | None = None,
    *,
    spec: WeightSpec | None = None,
) -> Weights:
    """Combine networks linearly: ``sum_i weights[i] * networks[i]``.

    It is meant for networks that are aligned, or that were fine-tuned from one: between others it averages
    units that have nothing to do with each other.

    Args:
        networks: at least one; all with the same names and shapes. Leading batch axes stand for many merges at
            once.
        weights: one coefficient per network, taken as given: they need not sum to 1, and 0 is a coefficient
            like any other. ``1 / len(networks)`` each by default. :func:`weighted` normalises them.
        spec: the weight space. With it, names and shapes are checked against it, and constants must be equal
            in all networks.

    Returns:
        New tensors, in the dtype of the networks' (the wider one where they differ). Half precision is
        averaged in float32. Statistics are averaged like parameters: estimate them again on data where that
        matters. Integers and booleans (counters, masks) are those of the first network.

    Shapes:
        Those of the networks' tensors.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: no networks, a wrong number of coefficients, or one that is not finite.

    Reference:
        Wortsman et al. 2022, "Model soups", arXiv:2203.05482 (uniform soup).

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
        >>> average([a, b])["w"]
        tensor([2., 4.])
        >>> average([a, b], weights=[1.0, -1.0])["w"]
        tensor([-2., -4.])
    """
    if weights is not None and len(networks):
        given = coefficients(len(networks), weights, 1.0)
    merge = prepare("average", networks, spec=spec)
    if weights is not None:
        stack = merge.stack
        merge = LazyMerge(stack, lambda name: stack.mean(name, given), everywhere=True)
    return merge.gather()


@merger("weighted", _weighted, everywhere=True, batched=True)
def weighted(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[int | float],
    spec: WeightSpec | None = None,
) -> Weights:
    """The weighted average: ``sum_i weights[i] * networks[i] / sum_i weights[i]``.

    Args:
        networks: two or more; leading batch axes stand for many merges at once.
        weights: one per network. A negative one moves away from its network.
        spec: the weight space.

    Returns:
        As :func:`average` does.

    Raises:
        SpecError: as :func:`average` does.
        ConfigError: fewer than two networks, a wrong number of weights, one that is not finite, or a sum of 0.

    Example:
        >>> import torch
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
        >>> weighted([a, b], weights=[3, 1])["w"]
        tensor([1.5000, 3.0000])
    """
    return merge_networks("weighted", networks, weights=weights, spec=spec)
