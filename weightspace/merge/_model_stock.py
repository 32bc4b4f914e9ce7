"""Model Stock: how far from the base the mean of networks should be, told by the angle between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Stack, linear
from weightspace.spec import Weights, WeightSpec


def _plan(stack: Stack) -> Rule:
    count = len(stack)
    equal = [1 / count] * count

    def rule(name: str) -> Tensor:
        cosine = _cosine(stack, name)
        share = count * cosine / (1 + (count - 1) * cosine)
        return stack.elementwise(
            name, lambda block: torch.lerp(block.origin, linear(block.networks, equal), share)
        )

    return rule


def _cosine(stack: Stack, name: str) -> float:
    """The mean cosine of the angles between changes, in [0, 1]; a change of 0 is at right angles to all."""
    count = len(stack)
    products = torch.zeros(count, count, dtype=torch.float64)
    for block in stack.blocks(name):
        rows = torch.stack(block.deltas).double()
        products += (rows @ rows.mT).cpu()
    lengths = products.diagonal().sqrt()
    scales = lengths[:, None] * lengths
    cosines = torch.where(scales > 0, products / torch.where(scales > 0, scales, 1.0), 0.0)
    mean = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
    return mean.clamp(0, 1).item()


@merger("model-stock", _plan, paper="arXiv:2403.19522", base=True)
def model_stock(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor],
    spec: WeightSpec | None = None,
) -> Weights:
    """Interpolate between the base and the mean, by the angle between the changes (Model Stock).

    ``t mean_i(networks[i]) + (1 - t) base`` with ``t = N c / (1 + (N - 1) c)``, tensor by tensor, where ``c``
    is the mean cosine of the angles between ``networks[i] - base``, at least 0: the point nearest to the centre
    of the shell on which fine-tuned networks lie.

    Args:
        networks: two or more, fine-tuned from the base on the same task.
        base: the network that they were fine-tuned from.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: fewer than two networks, or a base that is one of them.

    Reference:
        Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", arXiv:2403.19522
        (cos theta is ``c``).

    Example:
        >>> base = {"w": torch.zeros(2)}
        >>> a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.0, 0.0])}
        >>> model_stock([a, b], base=base)["w"]  # c = 0.7071, t = 0.8284
        tensor([0.8284, 0.4142])
    """
    return merge_networks("model-stock", networks, base=base, spec=spec)
