"""What augmentations work on: a batch of networks, and what is to be predicted of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightspace.datasets.augment._draws import Draws
from weightspace.errors import ConfigError
from weightspace.spec import Weights, WeightSpec

Targets = Tensor | Weights


@dataclass(frozen=True)
class Signal:
    """How the outputs of coordinate networks are read.

    Args:
        offset: constant that is added to what the last layer gives, and is no weight.
        middle: of the values of a signal: 0.5 where they are in [0, 1], 0 where they are in [-1, 1].
    """

    offset: float = 0.0
    middle: float = 0.5


@dataclass(frozen=True)
class Batch:
    """Networks of one weight space on their way to a metanetwork.

    Args:
        spec: the weight space.
        weights: with a leading batch axis, and one of checkpoints behind it for trajectories.
        targets: what is to be predicted: class numbers (integers), shares of classes ``(batch, classes)`` once they are
            mixed or smoothed, numbers to regress (floating), or weights of the same space.
        classes: how many there are, where targets are class numbers.
        signal: how outputs are read, for coordinate networks.
        siblings: given draws, the weights of another view of each network's item; None where that is not known.

    Attributes:
        shape: the batch axes of the weights: networks, and checkpoints where they are trajectories.

    Raises:
        SpecError: weights that do not fit the spec.
        ConfigError: weights without a batch axis, or another number of targets.

    Example:
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="sine", w0=30.0)
        >>> len(Batch(spec, spec.unflatten(torch.randn(64, spec.num_parameters)), torch.zeros(64)))
        64
    """

    spec: WeightSpec
    weights: Weights
    targets: Targets | None = None
    classes: int | None = None
    signal: Signal = Signal()
    siblings: Callable[[Draws], Weights] | None = None
    shape: tuple[int, ...] = field(init=False, compare=False)
    _flat: Tensor | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        shape = self.spec.batch_shape(self.weights)
        self.__dict__.update(shape=shape, _flat=None)
        if not shape:
            raise ConfigError("batch: expected weights with a leading batch axis, found those of one network")
        if self.targets is None:
            return
        counts = self.targets.values() if isinstance(self.targets, Mapping) else [self.targets]
        for tensor in counts:
            if tensor.shape[:1] != shape[:1]:
                raise ConfigError(
                    f"batch: expected targets of {shape[0]} networks, found shape {list(tensor.shape)}"
                )

    def __len__(self) -> int:
        return self.shape[0]

    def with_(self, **changes: Any) -> Batch:
        """A copy in which some fields are others; only its shape is looked at."""
        unknown = changes.keys() - self.__dict__.keys()
        if unknown:
            raise TypeError(f"batch: it has no field {', '.join(sorted(unknown))}")
        other = object.__new__(Batch)
        if "weights" in changes:
            name, tensor = next(iter(changes["weights"].items()))
            shape = tuple(tensor.shape[: tensor.ndim - len(self.spec.shape_of(name))])
            changes = {"shape": shape, "_flat": None, **changes}
        other.__dict__.update({**self.__dict__, **changes})
        return other

    def flat(self) -> Tensor:
        """The weights flattened, ``(*shape, parameters)``; not to be changed in place."""
        if self._flat is None:
            self.__dict__["_flat"] = self.spec.flatten(self.weights)
        found = self._flat
        assert found is not None
        return found

    def with_flat(self, flat: Tensor, **changes: Any) -> Batch:
        """A copy with other weights, given flattened."""
        return self.with_(weights=self.spec.unflatten(flat), _flat=flat, **changes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    @property
    def has_classes(self) -> bool:
        """Whether targets are class numbers, or shares of a known number of classes."""
        targets = self.targets
        if not isinstance(targets, Tensor):
            return False
        return not targets.is_floating_point() or (
            self.classes is not None and targets.shape[1:] == (self.classes,)
        )

    def shares(self) -> Tensor:
        """Targets as shares of classes, (batch, classes) float32.

        Raises:
            ConfigError: targets that are no class numbers, or of how many classes is not known.
        """
        targets = self.targets
        if not isinstance(targets, Tensor) or not self.has_classes:
            raise ConfigError(f"batch: expected class numbers as targets, found {kind_of(targets)}")
        if targets.is_floating_point():
            return targets
        if self.classes is None:
            raise ConfigError(
                "batch: expected classes=, the number of classes, beside class numbers, found none"
            )
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.classes:
            raise ConfigError(
                f"batch: expected class numbers in 0 .. {self.classes - 1}, found {targets.min()} .. {targets.max()}"
            )
        return torch.nn.functional.one_hot(targets.long(), self.classes).float()


def kind_of(targets: Targets | None) -> str:
    """What targets are, in words."""
    if targets is None:
        return "none"
    if isinstance(targets, Mapping):
        return "weights"
    return f"{targets.dtype} of shape {list(targets.shape)}".removeprefix("torch.")


def along(values: Tensor, batch: Sequence[int]) -> Tensor:
    """One value per network for each of the later batch axes, (*batch, ...)."""
    later = [1] * (len(batch) - 1)
    return values.reshape(*batch[:1], *later, *values.shape[1:]).expand(*batch, *values.shape[1:])
