"""Task arithmetic that reckons with what each change does to the losses of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from weightspace.errors import ConfigError
from weightspace.merge._checks import masses
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Block, Stack, linear
from weightspace.spec import Weights, WeightSpec

Prior = Annotated[float, Field(gt=0, description="curvature that is assumed everywhere")]
Count = Annotated[float, Field(ge=0, description="what the base's Fisher information is multiplied by")]


def _plan(
    stack: Stack,
    *,
    weights: Sequence[int | float] | None,
    samples: Sequence[int | float] | None,
    base_samples: float,
    prior: float,
) -> Rule:
    parts = masses(len(stack), weights)
    counts = _counts(len(stack), samples)

    def match(block: Block) -> Tensor:
        own = block.statistics
        held = prior + (0.0 if block.base_statistics is None else base_samples * block.base_statistics)
        total = held + linear(own, [part * count for part, count in zip(parts, counts, strict=True)])
        merged = block.origin
        for delta, information, part, count in zip(block.deltas, own, parts, counts, strict=True):
            merged = merged + part * (count * information + held) / total * delta
        return merged

    def rule(name: str) -> Tensor:
        if name in stack.informed:
            return stack.elementwise(name, match, statistics=True)
        return stack.elementwise(name, lambda block: block.origin + linear(block.deltas, parts))

    return rule


def _counts(count: int, samples: Sequence[int | float] | None) -> list[float]:
    found = [1.0] * count if samples is None else [float(number) for number in samples]
    if len(found) != count or not all(0 < number < math.inf for number in found):
        raise ConfigError(
            f"samples: expected {count} finite numbers above 0, one per network, found {list(samples or ())}"
        )
    return found


@merger("gradient-matching", _plan, paper="arXiv:2310.12808", base=True, statistics="fisher", least=1)
def gradient_matching(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    statistics: Sequence[Mapping[str, Tensor]],
    base_statistics: Mapping[str, Tensor] | None = None,
    weights: Sequence[int | float] | None = None,
    samples: Sequence[int | float] | None = None,
    base_samples: Count = 1.0,
    prior: Prior = 1e-8,
    spec: WeightSpec | None = None,
) -> Weights:
    """Task arithmetic, each change scaled by its share of the curvature (uncertainty-based gradient matching).

    An estimate of the network that was fine-tuned on all tasks together: with ``P = prior + s_0 H_0``,
    ``base + sum_i w_i (s_i H_i + P) / (P + sum_j w_j s_j H_j) (networks[i] - base)``, entry by entry. Where
    one network alone has information, its change counts in full; where none has any, task arithmetic.

    Args:
        networks: one or more, fine-tuned from the base.
        base: the network that they were fine-tuned from.
        statistics: ``H_i``, the Fisher information of each network on its task: :func:`fisher_information`.
        base_statistics: ``H_0``, that of the base on what it was trained on; 0 by default.
        weights: ``w_i``, how much each task counts, at least 0; 1 each by default.
        samples: ``s_i``, what ``H_i`` is multiplied by: the sizes of the tasks' data, when they differ; 1 each by
            default.
        base_samples: ``s_0``, the same of the base.
        prior: curvature that is assumed everywhere, in units of ``s_i H_i``.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Tensors without information are merged by task arithmetic;
        statistics such as running means are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN, infinite or negative
            numbers.
        ConfigError: no networks, a base that is one of them, a wrong number of statistics, weights or samples,
            one below 0, or a prior that is not above 0.

    Reference:
        Daheim et al. 2024, "Model merging by uncertainty-based gradient matching", arXiv:2310.12808 (alpha
        is ``weights``, delta_0 is ``prior``).

    Example:
        >>> import torch
        >>> base, a, b = ({"w": torch.tensor([value, value])} for value in (0.0, 1.0, 2.0))
        >>> statistics = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([0.0, 1.0])}]
        >>> gradient_matching([a, b], base=base, statistics=statistics)["w"]
        tensor([1.0000, 1.5000])
    """
    return merge_networks(
        "gradient-matching",
        networks,
        base=base,
        statistics=statistics,
        base_statistics=base_statistics,
        weights=weights,
        samples=samples,
        base_samples=base_samples,
        prior=prior,
        spec=spec,
    )
