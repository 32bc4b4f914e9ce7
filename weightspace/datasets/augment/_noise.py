"""Augmentations that know nothing of what networks compute: noise, dropped weights, smoothed labels."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from weightspace.datasets.augment._augmentation import AUGMENTATIONS, Augmentation, options
from weightspace.datasets.augment._batch import Batch, kind_of
from weightspace.datasets.augment._draws import Draws
from weightspace.datasets.augment._symmetries import SHAMSIAN
from weightspace.errors import ConfigError
from weightspace.spec import WeightSpec


@AUGMENTATIONS.register("noise", keeps="approximately", effect="slightly another", paper=SHAMSIAN)
class GaussianNoise(Augmentation):
    """Add Gaussian noise relative to the spread of each tensor of each network (approximate).

    A tensor whose entries are all equal, as that of a single bias, gets none.

    Args:
        scale: standard deviation of the noise in units of that of the tensor's entries, at least 0.
    """

    @options
    def __init__(
        self,
        scale: Annotated[
            float, Field(ge=0, allow_inf_nan=False, description="in units of each tensor's spread")
        ] = 0.1,
    ) -> None:
        self.scale = scale

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """One draw for all tensors together."""
        flat = batch.flat()
        rows = flat.reshape(len(batch), -1, flat.shape[-1])
        noise = draws.normal(*rows.shape[1:])
        sizes = [tensor.numel for tensor in batch.spec.tensors.values()]
        noisy = _with_noise(rows, noise, sizes, self.scale)
        return _with_parameters(batch, noisy.view(flat.shape))


def _with_parameters(batch: Batch, flat: Tensor) -> Batch:
    """A batch with other parameters; statistics stay, as a running variance of zero or less would change everything."""
    trained = _trained(batch.spec)
    if trained is None:
        return batch.with_flat(flat)
    return batch.with_flat(torch.where(trained.to(flat.device), flat, batch.flat()))


@lru_cache(maxsize=32)
def _trained(spec: WeightSpec) -> Tensor | None:
    """Which numbers of a flattened network are parameters, (parameters,) bool; None for all."""
    tensors = spec.tensors.values()
    if all(tensor.kind == "parameter" for tensor in tensors):
        return None
    return torch.cat([torch.full((tensor.numel,), tensor.kind == "parameter") for tensor in tensors])


def _with_noise(values: Tensor, noise: Tensor, sizes: list[int], scale: float) -> Tensor:
    """``values + scale * spread * noise``, with the spread of each part of the last axis."""
    if values.device.type == "cpu" and values.dtype == torch.float32 and not values.requires_grad:
        from weightspace.datasets.augment._kernels import add_scaled

        rows = np.ascontiguousarray(values.flatten(0, -2).numpy())
        add_scaled(rows, np.array(sizes), scale, noise.flatten(0, -2).numpy())
        return noise
    noise = noise.to(values)
    parts = zip(values.split(sizes, -1), noise.split(sizes, -1), strict=True)
    return torch.cat([part + scale * part.std(-1, correction=0, keepdim=True) * n for part, n in parts], -1)


@AUGMENTATIONS.register("dropout", keeps="approximately", effect="slightly another", paper=SHAMSIAN)
class WeightDropout(Augmentation):
    """Set weights to zero with probability ``p``; the others stay as they are (approximate).

    Args:
        p: probability, in [0, 1).
    """

    @options
    def __init__(
        self,
        p: Annotated[float, Field(ge=0, lt=1, description="probability that a weight becomes zero")] = 0.1,
    ) -> None:
        self.p = p

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """One draw per weight."""
        flat = batch.flat()
        kept = draws.uniform(*flat.shape[1:]) >= self.p
        return _with_parameters(batch, flat * kept.to(flat.dtype))


@AUGMENTATIONS.register("quantile", keeps="approximately", effect="slightly another", paper=SHAMSIAN)
class QuantileDropout(Augmentation):
    """Set the smallest weights of each tensor to zero: those below a random quantile of ``|w|`` (approximate).

    Args:
        most: quantiles are uniform in [0, most), one per network and tensor; in [0, 1].
    """

    @options
    def __init__(
        self,
        most: Annotated[
            float, Field(ge=0, le=1, description="the largest share of weights that become zero")
        ] = 0.1,
    ) -> None:
        self.most = most

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """One quantile per network and tensor."""
        flat = batch.flat()
        sizes = [tensor.numel for tensor in batch.spec.tensors.values()]
        quantiles = draws.uniform(*flat.shape[1:-1], len(sizes)) * self.most
        parts = zip(flat.split(sizes, -1), quantiles.unbind(-1), strict=True)
        return _with_parameters(batch, torch.cat([_without(part, q) for part, q in parts], -1))


def _without(weights: Tensor, quantile: Tensor) -> Tensor:
    """Weights (..., n) without the ``floor(quantile n)`` smallest of each network."""
    size = weights.detach().abs()
    count = (quantile * weights.shape[-1]).long().unsqueeze(-1)
    least = _sorted(size).gather(-1, count)
    return weights * (size >= least).to(weights.dtype)


def _sorted(values: Tensor) -> Tensor:
    """In ascending order; NumPy's is ten times as fast for many short rows on a CPU."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sort(values.numpy(), -1))
    return values.sort(-1).values


@AUGMENTATIONS.register("smoothing", keeps="exactly", effect="the same; labels are softened", paper=SHAMSIAN)
class LabelSmoothing(Augmentation):
    """Spread a share of each label over all classes.

    Args:
        share: in [0, 1).
    """

    @options
    def __init__(
        self,
        share: Annotated[
            float, Field(ge=0, lt=1, description="share of the label spread over all classes")
        ] = 0.1,
    ) -> None:
        self.share = share

    def check(self, batch: Batch) -> None:
        """Targets are classes."""
        if not batch.has_classes:
            raise ConfigError(f"smoothing: expected class numbers as targets, found {kind_of(batch.targets)}")
        batch.shares()

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Labels become shares of classes."""
        shares = batch.shares()
        return batch.with_(targets=(1.0 - self.share) * shares + self.share / shares.shape[-1])
