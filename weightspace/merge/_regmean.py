"""Linear layers that answer as those of the networks do, in the sense of least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weightspace.errors import SpecError
from weightspace.merge._registry import Rule, merge_networks, merger
from weightspace.merge._stack import Stack, describe
from weightspace.spec import Weights, WeightSpec

RIDGES = (1e-10, 1e-7, 1e-5)
"""Of the mean diagonal: with the first, the matrix of inputs of which some are always 0 has an inverse, too; the others
are for matrices that were computed or stored in single precision."""


def _plan(stack: Stack, *, alpha: float) -> Rule:
    for index, grams in enumerate(stack.statistics):
        for name in grams:
            _check_gram(stack, index, name)

    def rule(name: str) -> Tensor:
        if name not in stack.informed:
            return stack.mean(name)
        return _solved(stack, name, alpha)

    return rule


def _check_gram(stack: Stack, index: int, name: str) -> None:
    shape = stack.meta(name).shape
    expected = [shape[1:].numel()] * 2
    found = list(describe(stack.statistics[index], name).shape)
    if len(shape) < 2 or found != expected:
        raise SpecError(
            f"statistics {index}: {name!r} of shape {list(shape)} should have a Gram matrix of shape {expected}, "
            f"found {found}"
        )
    diagonal = stack.statistics[index][name].diagonal()
    low = diagonal.min().item() if diagonal.numel() else 0.0
    if low < 0:
        raise SpecError(
            f"statistics {index}: the Gram matrix of {name!r} should have no number below 0 on its diagonal, "
            f"found {low:g}"
        )


def _solved(stack: Stack, name: str, alpha: float) -> Tensor:
    """What the mean lacks is solved for, so that inputs that never occur keep the mean."""
    tensors = stack.tensors(name)
    mean = sum(tensor.double() for tensor in tensors) / len(tensors)
    assert isinstance(mean, Tensor)
    lacking = torch.zeros_like(mean.flatten(1))
    total: Tensor | float = 0.0
    for tensor, grams in zip(tensors, stack.statistics, strict=True):
        gram = _scaled(grams[stack.informed[name]].to(mean), alpha)
        lacking += (tensor.double() - mean).flatten(1) @ gram
        total = total + gram
    assert isinstance(total, Tensor)
    change = torch.cholesky_solve(lacking.mT, _root(total, name)).mT
    return (mean + change.reshape(mean.shape)).to(stack.dtype(name))


def _root(gram: Float[Tensor, "inputs inputs"], name: str) -> Float[Tensor, "inputs inputs"]:
    """The Cholesky factor of a Gram matrix that a ridge makes regular."""
    scale = gram.diagonal().mean().clamp_min(1e-30)
    for ridge in RIDGES:
        root, failed = torch.linalg.cholesky_ex(gram + ridge * scale * torch.eye(len(gram)).to(gram))
        if not failed:
            return root
    raise SpecError(f"statistics: the Gram matrices of {name!r} should be X^T X, found a negative eigenvalue")


def _scaled(gram: Float[Tensor, "inputs inputs"], alpha: float) -> Float[Tensor, "inputs inputs"]:
    """With the entries beside the diagonal multiplied by ``alpha``."""
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


@merger("regmean", _plan, paper="arXiv:2212.09849", statistics="grams")
def regmean(
    networks: Sequence[Mapping[str, Tensor]],
    *,
    statistics: Sequence[Mapping[str, Tensor]],
    alpha: Annotated[float, Field(ge=0, le=1, description="what correlations of inputs count")] = 0.9,
    spec: WeightSpec | None = None,
) -> Weights:
    """Merge linear layers in closed form, so that their outputs stay near those of the networks (RegMean).

    ``W = (sum_i W_i G_i) (sum_i G_i)^-1`` with ``G_i = X_i^T X_i``, which minimises
    ``sum_i ||X_i W^T - X_i W_i^T||^2`` when ``alpha`` is 1. Other tensors, biases among them, are averaged.

    Args:
        networks: two or more.
        statistics: of each network, the Gram matrix of the inputs of each linear layer and convolution under the
            name of its weight: :func:`input_grams`.
        alpha: what the entries beside the diagonal are multiplied by, in [0, 1].
        spec: the weight space.

    Returns:
        New tensors in the networks' dtype. Statistics such as running means are the mean of the networks'.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec; NaN or infinite numbers;
            Gram matrices that do not fit the weights.
        ConfigError: fewer than two networks, a wrong number of statistics, or ``alpha`` out of range.

    Reference:
        Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models", arXiv:2212.09849
        (with weights as (out, in)).

    Example:
        >>> a, b = {"fc.weight": torch.tensor([[1.0, 0.0]])}, {"fc.weight": torch.tensor([[0.0, 1.0]])}
        >>> grams = [{"fc.weight": torch.diag(torch.tensor([3.0, 1.0]))}, {"fc.weight": torch.eye(2)}]
        >>> regmean([a, b], statistics=grams)["fc.weight"]
        tensor([[0.7500, 0.5000]])
    """
    return merge_networks("regmean", networks, statistics=statistics, alpha=alpha, spec=spec)
