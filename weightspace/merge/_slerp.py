"""Spherical interpolation between two networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Stack
from weightspace.spec import Weights, WeightSpec

PARALLEL = 1e-6
"""Squared sine of the angle below which the arc and the chord are the same to float32, or no arc is determined."""


def _plan(stack: Stack, *, t: float) -> Rule:
    def rule(name: str) -> Tensor:
        line = (1 - t, t)
        return stack.mean(name, line if stack.kind(name) == "statistic" else arc(*_products(stack, name), t))

    return rule


def arc(first: float, cross: float, second: float, t: float) -> tuple[float, float]:
    """The coefficients of two vectors, from their products with themselves and with each other."""
    lengths = math.sqrt(first) * math.sqrt(
        second
    )  # the product of the squares may overflow, or underflow to 0
    cosine = cross / lengths if lengths > 0 else 1.0
    if 1 - cosine * cosine < PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _products(stack: Stack, name: str) -> tuple[float, float, float]:
    total = torch.zeros(3, dtype=torch.float64)
    for block in stack.blocks(name):
        a, b = (network.double() for network in block.networks)
        total += torch.stack([a.dot(a), a.dot(b), b.dot(b)]).cpu()
    first, cross, second = total.tolist()
    return first, cross, second


@merger("slerp", _plan, everywhere=True, most=2)
def slerp(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    t: Annotated[float, Field(ge=0, le=1, description="where on the arc")] = 0.5,
    spec: WeightSpec | None = None,
) -> Weights:
    """Spherical interpolation of two networks, tensor by tensor.

    ``sin((1 - t) phi) / sin(phi) * a + sin(t phi) / sin(phi) * b``, where ``phi`` is the angle between the
    tensors ``a`` and ``b``. Between tensors of equal length the length stays, where the straight line would
    cut it short. Tensors that are nearly parallel, opposite, or zero are interpolated linearly, as are
    statistics.

    Args:
        networks: two.
        t: where on the arc, from 0, the first network, to 1, the second.
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite weights.
        ConfigError: other than two networks, or ``t`` out of range.

    Reference:
        Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH.

    Example:
        >>> a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
        >>> slerp([a, b])["w"]
        tensor([1.4142, 1.4142])
    """
    return merge_networks("slerp", networks, t=t, spec=spec)
