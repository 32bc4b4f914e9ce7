"""Does a function of weights respect the symmetries of their spec?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.spec import Weights, WeightSpec
from weightspace.testing._specs import random_weights

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class EquivarianceError(AssertionError):
    """The output changed in a way in which it should not."""


def assert_equivariant(
    function: Callable[[Weights], Weights],
    spec: WeightSpec,
    *,
    symmetries: Sequence[str] = ("permutation",),
    batch: Sequence[int] = (3,),
    tolerance: Mapping[torch.dtype, float] | None = None,
    seed: int = 0,
) -> dict[torch.dtype, float]:
    """Assert ``f(g . W) == g . f(W)`` for weights in, weights out, at float32 and float64.

    ``g . W`` lies in memory with the first axis innermost, as in a transposed array: no layout may matter.

    Returns:
        The worst relative error per dtype.

    Raises:
        EquivarianceError: an error above its tolerance (1e-5 and 1e-12 by default), or an output that does
            not depend on the input, about which the check says nothing.
    """

    def error(module: Callable[[Weights], Weights], weights: Weights, moved: Weights, element: Any) -> float:
        expected = spec.flatten(spec.act(element, module(weights)))
        return _relative(spec.flatten(module(moved)), expected, spec.flatten(module(_other(spec, weights))))

    return _assert(function, spec, error, symmetries, batch, tolerance, seed)


def assert_invariant(
    function: Callable[[Weights], Tensor],
    spec: WeightSpec,
    *,
    symmetries: Sequence[str] = ("permutation",),
    batch: Sequence[int] = (3,),
    tolerance: Mapping[torch.dtype, float] | None = None,
    seed: int = 0,
) -> dict[torch.dtype, float]:
    """Assert ``f(g . W) == f(W)`` at float32 and float64; see :func:`assert_equivariant`."""

    def error(module: Callable[[Weights], Tensor], weights: Weights, moved: Weights, element: Any) -> float:
        return _relative(module(moved), module(weights), module(_other(spec, weights)))

    return _assert(function, spec, error, symmetries, batch, tolerance, seed)


def _assert(
    function: Callable[..., Any],
    spec: WeightSpec,
    error: Callable[..., float],
    symmetries: Sequence[str],
    batch: Sequence[int],
    tolerance: Mapping[torch.dtype, float] | None,
    seed: int,
) -> dict[torch.dtype, float]:
    errors: dict[torch.dtype, float] = {}
    for dtype, limit in (tolerance or TOLERANCE).items():
        module = copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) else function
        generator = torch.Generator().manual_seed(seed)
        weights = random_weights(spec, batch, seed, dtype)
        element = spec.random_element(batch, symmetries=symmetries, generator=generator)
        with torch.no_grad():
            moved = {name: _relaid(tensor) for name, tensor in spec.act(element, weights).items()}
            errors[dtype] = error(module, weights, moved, element)
        if not errors[dtype] <= limit:
            raise EquivarianceError(
                f"relative error {errors[dtype]:.1e} in {dtype}, expected at most {limit:.0e}, "
                f"under {', '.join(symmetries)}"
            )
    return errors


def _relaid(tensor: Tensor) -> Tensor:
    """The same numbers with the first axis innermost in memory."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.ndim > 1 else tensor


def _relative(found: Tensor, expected: Tensor, unrelated: Tensor) -> float:
    scale = expected.abs().max().clamp_min(1e-30)
    if bool((unrelated - expected).abs().max() <= 1e-6 * scale):
        raise EquivarianceError("the output does not depend on the weights: the check would be vacuous")
    return ((found - expected).abs().max() / scale).item()


def _other(spec: WeightSpec, weights: Weights) -> Weights:
    return {name: tensor.flip(0).roll(1) + 1.0 for name, tensor in weights.items()}
