"""DARE: changes dropped at random and the rest enlarged, before task vectors are added or elected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weightspace.merge._checks import coefficients
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Block, Stack, linear
from weightspace.merge._task_arithmetic import SCALE
from weightspace.merge._ties import Deltas, Density, plan_ties
from weightspace.spec import Weights, WeightSpec

Rate = Annotated[float, Field(ge=0, lt=1, description="share of the changes that is dropped")]
Seed = Annotated[int, Field(ge=0, description="of what is dropped")]


def _dropped(rate: float, seed: int) -> Deltas:
    """Task vectors of which a share was dropped; the same for the same seed, network and name, on any device."""
    limit = np.uint32(min(round(rate * 2**32), 2**32 - 1))

    def of(name: str) -> Callable[[Block], list[Tensor]]:
        streams: list[np.random.SFC64] = []

        def drop(block: Block) -> list[Tensor]:
            deltas = block.deltas
            if not streams:
                streams.extend(_stream(seed, network, name) for network in range(len(deltas)))
            return [
                (delta * _kept(stream, delta, limit)).mul_(1 / (1 - rate))
                for stream, delta in zip(streams, deltas, strict=True)
            ]

        return drop

    return of


def _stream(seed: int, network: int, name: str) -> np.random.SFC64:
    key = int.from_bytes(blake2b(name.encode(), digest_size=16).digest(), "little")
    return np.random.SFC64(np.random.SeedSequence([seed, network, key]))


def _kept(stream: np.random.SFC64, like: Tensor, limit: np.uint32) -> Tensor:
    """Raw bits, as torch's generator takes eight times as long. Blocks have even sizes, but for the last."""
    drawn = np.asarray(stream.random_raw((len(like) + 1) // 2)).view(np.uint32)[: len(like)]
    return torch.from_numpy(drawn >= limit).to(like.device)


def _plan(stack: Stack, *, rate: float, weights: Sequence[int | float] | None, seed: int) -> Rule:
    scales, deltas = coefficients(len(stack), weights, SCALE), _dropped(rate, seed)

    def rule(name: str) -> Tensor:
        changes = deltas(name)
        return stack.elementwise(name, lambda block: block.origin + linear(changes(block), scales))

    return rule


def _plan_ties(
    stack: Stack,
    *,
    rate: float,
    density: float,
    weights: Sequence[int | float] | None,
    scaling: float,
    seed: int,
) -> Rule:
    return plan_ties(stack, density=density, weights=weights, scaling=scaling, deltas=_dropped(rate, seed))


@merger("dare", _plan, paper="arXiv:2311.03099", base=True, least=1)
def dare(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    rate: Rate = 0.5,
    weights: Sequence[int | float] | None = None,
    seed: Seed = 0,
    spec: WeightSpec | None = None,
) -> Weights:
    """Drop changes at random, enlarge the rest, and add them to the base (DARE with task arithmetic).

    Each entry of ``networks[i] - base`` is dropped with probability ``rate``, and multiplied by
    ``1 / (1 - rate)`` otherwise, so that its mean stays.

    Args:
        networks: one or more, fine-tuned from the base.
        base: the network that they were fine-tuned from.
        rate: share of the changes that is dropped, in [0, 1).
        weights: one coefficient per network, taken as given; 0.4 each by default, as in
            :func:`task_arithmetic`.
        seed: of what is dropped. It depends on the seed, the place of the network among the others, and the
            name of the tensor, and on nothing else.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: no networks, a base that is one of them, ``rate`` out of range, or a wrong number of
            coefficients.

    Reference:
        Yu et al. 2024, "Language models are Super Mario", arXiv:2311.03099 (p is ``rate``).

    Example:
        >>> base, a = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        >>> sorted(set(dare([a], base=base, rate=0.75, weights=[1])["w"].tolist())) <= [0.0, 4.0]
        True
    """
    return merge_networks("dare", networks, base=base, rate=rate, weights=weights, seed=seed, spec=spec)


@merger("dare-ties", _plan_ties, paper="arXiv:2311.03099", base=True)
def dare_ties(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    rate: Rate = 0.5,
    density: Density = 0.2,
    weights: Sequence[int | float] | None = None,
    scaling: float = 1.0,
    seed: Seed = 0,
    spec: WeightSpec | None = None,
) -> Weights:
    """Drop changes at random, enlarge the rest, and merge them as TIES does (DARE with TIES).

    Args:
        networks: two or more, fine-tuned from the base.
        base: the network that they were fine-tuned from.
        rate: share of the changes that is dropped, in [0, 1); see :func:`dare`.
        density: share of all changes, dropped ones included, that is kept; see :func:`ties`.
        weights: one per network, at least 0; equal by default.
        scaling: what the merged change is multiplied by.
        seed: of what is dropped.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics are the mean of the networks'.

    Raises:
        SpecError: as :func:`ties` does.
        ConfigError: as :func:`ties` does, or ``rate`` out of range.

    Reference:
        Yu et al. 2024, "Language models are Super Mario", arXiv:2311.03099.

    Example:
        >>> base, a = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
        >>> dare_ties([a, a], base=base, rate=0.0, density=1.0)["w"]
        tensor([1., 1., 1., 1.])
    """
    return merge_networks(
        "dare-ties",
        networks,
        base=base,
        rate=rate,
        density=density,
        weights=weights,
        scaling=scaling,
        seed=seed,
        spec=spec,
    )
