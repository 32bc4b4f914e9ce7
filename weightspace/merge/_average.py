"""The average of networks, tensor by tensor: the plainest of all merge methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Weights, WeightSpec


def average(
    networks: Sequence[Mapping[str, Tensor]],
    weights: Sequence[int | float] | None = None,
    *,
    spec: WeightSpec | None = None,
) -> Weights:
    """Combine networks linearly, tensor by tensor: ``sum_i weights[i] * networks[i]``.

    It is meant for networks that are aligned, or that were fine-tuned from one: between others it averages
    units that have nothing to do with each other.

    Args:
        networks: at least one; all with the same names and shapes. Leading batch axes stand for many merges at
            once.
        weights: one coefficient per network, taken as given: they need not sum to 1, and 0 is a coefficient
            like any other. ``1 / len(networks)`` each by default.
        spec: the weight space. With it, names and shapes are checked against it, and constants must be equal
            in all networks.

    Returns:
        New tensors, in the dtype of the networks' (the wider one where they differ). Half precision is
        averaged in float32. Statistics are averaged like parameters: estimate them again on data where that
        matters. Integers and booleans (counters, masks) are those of the first network.

    Shapes:
        Those of the networks' tensors.

    Raises:
        SpecError: names, shapes, or constants that differ, or that do not fit the spec.
        ConfigError: no networks, a wrong number of coefficients, or one that is not finite.

    Reference:
        Wortsman et al. 2022, "Model soups", arXiv:2203.05482 (uniform soup).

    Example:
        >>> a, b = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
        >>> average([a, b])["w"]
        tensor([2., 4.])
        >>> average([a, b], weights=[1.0, -1.0])["w"]
        tensor([-2., -4.])
    """
    if not networks:
        raise ConfigError("networks: expected at least one, found none")
    coefficients = _coefficients(len(networks), weights)
    _check_alike(networks, spec)
    merged = {}
    for name in networks[0]:
        tensors = [network[name] for network in networks]
        constant = spec is not None and name in spec.constants and tensors[0].is_floating_point()
        merged[name] = _same(name, tensors) if constant else _combine(tensors, coefficients)
    return merged


def _coefficients(count: int, weights: Sequence[int | float] | None) -> list[float]:
    if weights is None:
        return [1.0 / count] * count
    coefficients = [float(weight) for weight in weights]
    if len(coefficients) != count:
        raise ConfigError(f"weights: expected one per network, {count}, found {len(coefficients)}")
    for position, coefficient in enumerate(coefficients):
        if not math.isfinite(coefficient):
            raise ConfigError(f"weights: expected finite coefficients, found {coefficient} at {position}")
    return coefficients


def _check_alike(networks: Sequence[Mapping[str, Tensor]], spec: WeightSpec | None) -> None:
    first = networks[0]
    for number, network in enumerate(networks):
        for name in [*first, *network]:
            if name not in network or name not in first:
                lacking, having = (number, 0) if name in first else (0, number)
                raise SpecError(f"network {lacking}: tensor {name!r} of network {having} is missing")
            if network[name].shape != first[name].shape:
                raise SpecError(
                    f"network {number}: {name!r} should have shape {list(first[name].shape)} as in network 0, "
                    f"found {list(network[name].shape)}"
                )
    if spec is not None:
        spec.batch_shape(first)


def _combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point and not dtype.is_complex:
        return tensors[0].clone()
    wide = torch.promote_types(dtype, torch.float32)
    total = tensors[0].to(wide) * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total = torch.add(total, tensor.to(wide), alpha=coefficient)
    return total.to(dtype)


def _same(name: str, tensors: Sequence[Tensor]) -> Tensor:
    for number, tensor in enumerate(tensors):
        if not torch.equal(tensor, tensors[0]):
            raise SpecError(f"network {number}: constant {name!r} differs from that of network 0")
    return tensors[0].clone()
