"""Copies of trained networks in which something was done to the weights: pruned, quantised, noised."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from weightspace.configuration import Registry
from weightspace.datagen._distributions import Distribution
from weightspace.datagen._recipe import STRICT
from weightspace.datagen.classifiers._families import Rate
from weightspace.spec import Weights, WeightSpec


class Copy(BaseModel):
    """Base of an entry under ``copies:``; every network of the recipe gets one copy of each entry."""

    model_config = STRICT
    kind: ClassVar[str]

    def labels(self, seed: int, networks: np.ndarray) -> dict[str, np.ndarray]:
        """What is done to each network, by name: (networks,) each, keyed by their numbers."""
        return {
            name: value.sample(f"copies.{self.kind}.{name}", seed, networks)
            for name, value in self
            if isinstance(value, Distribution)
        }

    def apply(
        self,
        spec: WeightSpec,
        weights: Weights,
        labels: dict[str, np.ndarray],
        seed: int,
        networks: np.ndarray,
    ) -> Weights:
        """The copies' weights.

        Args:
            spec: of the weight space; statistics stay as they are.
            weights: with a leading axis of networks.
            labels: what to do, from :meth:`labels`.
            seed: of the recipe.
            networks: their numbers.
        """
        raise AssertionError(f"{type(self).__name__} copies nothing")


COPIES: Registry[type[Copy]] = Registry("copy", "kind")
"""What ``copies: [{kind: ...}]`` names; ``@COPIES.register("kind")`` adds one."""


@COPIES.register("pruned")
class Pruned(Copy):
    """The smallest weights are set to zero."""

    sparsity: Distribution[Rate] = Field(Distribution.constant(0.5), description="share that is set to zero")
    scope: Literal["network", "tensor"] = Field(
        "network", description="of which the smallest are taken; vectors (biases, norms) are never pruned"
    )

    def apply(
        self,
        spec: WeightSpec,
        weights: Weights,
        labels: dict[str, np.ndarray],
        seed: int,
        networks: np.ndarray,
    ) -> Weights:
        return prune(weights, torch.from_numpy(labels["sparsity"]), together=self.scope == "network")


@COPIES.register("quantised")
class Quantised(Copy):
    """Weights are rounded to evenly spaced values, symmetric about zero, per tensor."""

    bits: Distribution[PositiveInt] = Field(Distribution.constant(4), ge=2, le=16, description="per weight")

    def apply(
        self,
        spec: WeightSpec,
        weights: Weights,
        labels: dict[str, np.ndarray],
        seed: int,
        networks: np.ndarray,
    ) -> Weights:
        parameters = _parameters(spec, weights)
        return {**weights, **quantise(parameters, torch.from_numpy(labels["bits"]))}


@COPIES.register("noised")
class Noised(Copy):
    """Gaussian noise is added to every weight."""

    noise: Distribution[Rate] = Field(
        Distribution.constant(0.1), description="its standard deviation, relative to that of each tensor"
    )

    def apply(
        self,
        spec: WeightSpec,
        weights: Weights,
        labels: dict[str, np.ndarray],
        seed: int,
        networks: np.ndarray,
    ) -> Weights:
        generators = [np.random.default_rng([seed, 7, int(number)]) for number in networks]
        found = dict(weights)
        for name, tensor in _parameters(spec, weights).items():
            shape = tensor.shape[1:]
            draws = np.stack([random.standard_normal(shape, dtype=np.float32) for random in generators])
            spread = tensor.flatten(1).std(1, correction=0) * torch.from_numpy(labels["noise"])
            found[name] = tensor + torch.from_numpy(draws) * _beside(spread, tensor)
        return found


def prune(weights: Weights, sparsity: Float[Tensor, " networks"], *, together: bool = True) -> Weights:
    """Set the smallest entries of matrices and kernels to zero.

    Args:
        weights: with a leading axis of networks.
        sparsity: share of the entries to set to zero, in [0, 1), rounded to a number of them.
        together: the smallest of the whole network, or of each tensor by itself.

    Example:
        >>> weights = {"w": torch.tensor([[[0.1, -0.5], [0.3, -0.2]]]), "b": torch.tensor([[0.01, 0.02]])}
        >>> {name: tensor.tolist() for name, tensor in prune(weights, torch.tensor([0.5])).items()}["w"]
        [[[0.0, -0.5], [0.30000001192092896, 0.0]]]
    """
    names = [name for name, tensor in weights.items() if tensor.ndim > 2]
    sets = [names] if together else [[name] for name in names]
    found = dict(weights)
    for group in sets:
        flat = torch.cat([weights[name].flatten(1) for name in group], 1)
        order = flat.abs().argsort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1]).expand_as(order))
        kept = torch.where(rank < (sparsity.to(torch.float64) * flat.shape[1]).round()[:, None], 0.0, flat)
        parts = kept.split([weights[name][0].numel() for name in group], 1)
        found |= {name: part.view_as(weights[name]) for name, part in zip(group, parts, strict=True)}
    return found


def quantise(weights: Weights, bits: Tensor) -> Weights:
    """Round each tensor of each network to ``2**bits - 1`` values from minus its largest entry to it.

    Args:
        weights: with a leading axis of networks.
        bits: (networks,) whole numbers from 2.

    Example:
        >>> quantise({"w": torch.tensor([[1.0, 0.4, -0.2]])}, torch.tensor([2]))["w"].tolist()
        [[1.0, 0.0, 0.0]]
    """
    found = {}
    for name, tensor in weights.items():
        largest = tensor.flatten(1).abs().amax(1)
        step = largest / (2.0 ** (bits.to(tensor.dtype) - 1.0) - 1.0)
        step = _beside(torch.where(step > 0, step, 1.0), tensor)
        found[name] = torch.round(tensor / step) * step + 0.0  # no minus zero
    return found


def _parameters(spec: WeightSpec, weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if spec.tensors[name].kind == "parameter"}


def _beside(values: Tensor, tensor: Tensor) -> Tensor:
    """(networks,) as (networks, 1, ...) beside a tensor of networks."""
    return values.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
