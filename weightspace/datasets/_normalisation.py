"""Bring weights to a common scale before a metanetwork reads them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from weightspace.datasets._dataset import ZooDataset
from weightspace.errors import ConfigError
from weightspace.spec import Weights, WeightSpec

Mode = Literal["tensor", "entry", "fan_in"]


class Normalisation(nn.Module):
    """``(weight - mean) / std``, with what was found in the training split, and is saved with the model.

    Args:
        spec: the weight space.
        mode: ``"tensor"``: one mean and one standard deviation per tensor, which commutes with every
            permutation; ``"entry"``: one per single weight, as in the DWSNets paper, which does so only as far as
            the population itself is symmetric; ``"fan_in"``: times the root of the number of entries that are
            summed for one output, which the spec alone tells, so that it suits metanetworks that read several
            architectures.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> train = ZooDataset(tiny_zoo(networks=10), split=None)
        >>> normalise = Normalisation.fit(train)
        >>> weights, _ = train.read(range(10))
        >>> round(normalise(weights)["layers.1.weight"].std(correction=0).item(), 3)
        1.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: WeightSpec, mode: str = "tensor") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ConfigError(f"normalisation: expected {', '.join(get_args(Mode))}, found {mode!r}")
        self.spec, self.mode = spec, mode
        size = spec.num_parameters if mode == "entry" else len(spec.tensors)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", _fan_in_spread(spec) if mode == "fan_in" else torch.ones(size))

    @classmethod
    def fit(cls, dataset: ZooDataset, mode: str = "tensor", *, block: int = 4096) -> Normalisation:
        """Statistics of a data set, in one pass of blocks; ``"fan_in"`` needs none."""
        self = cls(dataset.spec, mode)
        if mode == "fan_in":
            return self
        count, total, squares = 0, torch.zeros(1), torch.zeros(1)
        rows = np.unique(dataset.rows)  # trajectories repeat some
        for start in range(0, len(rows), block):
            flat = dataset.population.read(rows[start : start + block]).double()
            count += len(flat)
            total = total + flat.sum(0)
            squares = squares + flat.square().sum(0)
        mean, second = total / count, squares / count
        if mode == "tensor":
            sizes = [tensor.numel for tensor in dataset.spec.tensors.values()]
            mean = torch.stack([part.mean() for part in mean.split(sizes)])
            second = torch.stack([part.mean() for part in second.split(sizes)])
        std = (second - mean.square()).clamp_min(0.0).sqrt()
        self.mean.copy_(mean)
        # rounding alone makes a constant vary by 1e-7 of its size
        # a tensor that never varies carries no information; dividing by 1 leaves it at 0
        self.std.copy_(torch.where(std > 1e-8 + 1e-6 * mean.abs(), std, torch.ones_like(std)))
        return self

    def forward(self, weights: Weights) -> Weights:
        """Normalise weights with any leading batch axes."""
        if self.mode == "entry":
            flat = (self.spec.flatten(weights) - self.mean) / self.std
            return self.spec.unflatten(flat)
        scales = zip(self.spec.tensors, self.mean, self.std, strict=True)
        return {name: (weights[name] - mean) / std for name, mean, std in scales}

    def restore_change(self, change: Weights) -> Weights:
        """A change of normalised weights as a change of weights: times the standard deviation."""
        if self.mode == "entry":
            return self.spec.unflatten(self.spec.flatten(change) * self.std)
        return {name: change[name] * std for name, std in zip(self.spec.tensors, self.std, strict=True)}


def _fan_in_spread(spec: WeightSpec) -> Tensor:
    """One over the root of the number of entries per output, (tensors,); 1 where nothing is summed, as in biases."""
    return torch.tensor([1.0 / math.sqrt(tensor.units.fan_in) for tensor in spec.tensors.values()])
