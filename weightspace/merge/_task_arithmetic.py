"""Task arithmetic: what fine-tuning changed, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from weightspace.merge._checks import coefficients
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Block, Stack, linear
from weightspace.spec import Weights, WeightSpec

SCALE = 0.4
"""What Yadav et al. 2023 (arXiv:2306.01708) use where there are no data to choose the coefficients with."""


def _plan(stack: Stack, *, weights: Sequence[int | float] | None) -> Rule:
    scales = coefficients(len(stack), weights, SCALE)

    def add(block: Block) -> Tensor:
        return block.origin + linear(block.deltas, scales)

    return lambda name: stack.elementwise(name, add)


@merger("task-arithmetic", _plan, paper="arXiv:2212.04089", base=True, least=1)
def task_arithmetic(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    weights: Sequence[int | float] | None = None,
    spec: WeightSpec | None = None,
) -> Weights:
    """Add what fine-tuning changed: ``base + sum_i weights[i] * (networks[i] - base)``.

    Args:
        networks: one or more, fine-tuned from the base.
        base: the network that they were fine-tuned from.
        weights: one coefficient per network, taken as given; a negative one takes away what the network
            learnt. 0.4 each by default.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: no networks, a base that is one of them, or a wrong number of coefficients.

    Reference:
        Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089 (section 2; lambda is
        ``weights``).

    Example:
        >>> import torch
        >>> base, a, b = ({"w": torch.tensor([value])} for value in (1.0, 3.0, 0.0))
        >>> task_arithmetic([a, b], base=base, weights=[1, 1])["w"]
        tensor([2.])
    """
    return merge_networks("task-arithmetic", networks, base=base, weights=weights, spec=spec)
