"""Augmentations by the symmetries of the weight space: every network computes exactly what it did."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from weightspace.datasets.augment._augmentation import AUGMENTATIONS, SymmetryAugmentation, options
from weightspace.datasets.augment._batch import Batch
from weightspace.datasets.augment._draws import Draws
from weightspace.errors import ConfigError
from weightspace.spec import Element, Scaling, Symmetry, WeightSpec

SHAMSIAN = "Shamsian et al. 2024, arXiv:2402.04081"


@AUGMENTATIONS.register("permutation", paper=SHAMSIAN)
class Permutation(SymmetryAugmentation):
    """Reorder the units of every group at random (exact)."""

    def check(self, batch: Batch) -> None:
        """There are units."""
        if not batch.spec.groups:
            raise ConfigError("permutation: expected a weight space with groups of units, found none")

    def element(self, batch: Batch, draws: Draws) -> Element:
        """Uniform permutations."""
        return random_permutations(batch.spec, draws)


def random_permutations(spec: WeightSpec, draws: Draws) -> Element:
    """One uniform permutation of every group per network."""
    return {name: _order(draws.uniform(*spec.unit_shape(name))) for name in spec.groups}


def _order(keys: Tensor) -> Tensor:
    """``argsort``; NumPy's is three times as fast for many short rows on a CPU."""
    return torch.from_numpy(keys.numpy().argsort(-1)) if keys.device.type == "cpu" else keys.argsort(-1)


class ScalingAugmentation(SymmetryAugmentation):
    """An augmentation by one kind of scaling, all of whose units draw independently."""

    kind: ClassVar[Symmetry]

    def check(self, batch: Batch) -> None:
        """The weight space has this symmetry."""
        if self.kind not in batch.spec.symmetries:
            found = ", ".join(batch.spec.symmetries) or "none"
            raise ConfigError(
                f"{self.name}: expected a weight space with the symmetry {self.kind}, found {found}"
            )

    def element(self, batch: Batch, draws: Draws) -> Element:
        """One value per unit."""
        spec = batch.spec
        mine = {name: scaling for name, scaling in spec.scalings.items() if scaling.kind == self.kind}
        return {
            name: self._values(scaling, _of_units(spec, scaling, draws)) for name, scaling in mine.items()
        }

    def _values(self, scaling: Scaling, uniform: Tensor) -> Tensor:
        raise NotImplementedError


def _of_units(spec: WeightSpec, scaling: Scaling, draws: Draws) -> Tensor:
    return draws.uniform(*spec.unit_shape(scaling.group))


@AUGMENTATIONS.register("sign", paper=SHAMSIAN)
class SignFlip(ScalingAugmentation):
    """Flip units of odd (or even) activations with probability ``p`` (exact).

    Args:
        p: probability of a flip, in [0, 1].
    """

    kind: ClassVar[Symmetry] = "sign"

    @options
    def __init__(
        self, p: Annotated[float, Field(ge=0, le=1, description="probability of a flip")] = 0.5
    ) -> None:
        self.p = p

    def _values(self, scaling: Scaling, uniform: Tensor) -> Tensor:
        return (uniform >= self.p).float().mul_(2.0).sub_(1.0)


@AUGMENTATIONS.register("positive", paper=SHAMSIAN)
class PositiveScaling(ScalingAugmentation):
    """Scale units of ReLU and its like by positive factors, which the next layer divides by (exact).

    Args:
        factor: factors are log-uniform in [1/factor, factor]; at least 1.
    """

    kind: ClassVar[Symmetry] = "positive"

    @options
    def __init__(
        self,
        factor: Annotated[float, Field(ge=1, allow_inf_nan=False, description="the largest factor")] = 2.0,
    ) -> None:
        self.factor = factor

    def _values(self, scaling: Scaling, uniform: Tensor) -> Tensor:
        return torch.exp((2.0 * uniform - 1.0) * math.log(self.factor))


@AUGMENTATIONS.register("phase", paper=SHAMSIAN)
class PhaseShift(ScalingAugmentation):
    """Shift the biases of sine units by multiples of pi/w0, and flip what leaves them where those are odd (exact).

    Args:
        steps: multiples are uniform in {-steps, ..., steps - 1}; at least 1.
    """

    kind: ClassVar[Symmetry] = "phase"

    @options
    def __init__(
        self,
        steps: Annotated[int, Field(ge=1, le=1000, description="multiples from -steps to steps - 1")] = 4,
    ) -> None:
        self.steps = steps

    def _values(self, scaling: Scaling, uniform: Tensor) -> Tensor:
        return (uniform * (2 * self.steps)).long() - self.steps
