"""Augmentations of what coordinate networks represent: in the space of their inputs, and in that of their outputs.

Weights alone change, nothing is rendered; but for :class:`DeepTranslation` the new signal is exactly the one that is
said. ``f`` is what a network represents, its output offset included.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from weightspace.datasets.augment._augmentation import AUGMENTATIONS, Augmentation, options
from weightspace.datasets.augment._batch import Batch, Signal
from weightspace.datasets.augment._draws import Draws
from weightspace.datasets.augment._layers import Layer, bias_of, entries, last_layer, second_layer
from weightspace.datasets.augment._symmetries import SHAMSIAN
from weightspace.spec import Weights, WeightSpec

Matrix = Float[Tensor, "batch dims dims"]
Shift = Float[Tensor, "batch dims"]


def map_coordinates(
    spec: WeightSpec, weights: Weights, matrix: Matrix | None = None, shift: Shift | None = None
) -> Weights:
    """The networks that compute ``f(A x + t)``: their first weights become ``W A``, and biases ``b + W t``.

    The same wherever else coordinates are read.

    Args:
        spec: of coordinate networks.
        weights: with a leading batch axis, and perhaps one of checkpoints.
        matrix: A, one per network; the identity by default.
        shift: t, one per network; zero by default.

    Raises:
        ConfigError: networks without coordinates, or, for a shift, a layer without a bias.

    Example:
        >>> spec = WeightSpec.mlp([2, 4, 1], activation="sine")
        >>> weights = spec.unflatten(torch.ones(1, spec.num_parameters))
        >>> moved = map_coordinates(spec, weights, torch.diag(torch.tensor([2.0, 3.0]))[None], torch.ones(1, 2))
        >>> moved["layers.0.weight"][0, 0].tolist(), moved["layers.0.bias"][0, 0].item()
        ([2.0, 3.0], 3.0)
    """
    return _mapped(entries(spec, "coordinates"), weights, matrix, shift)


def _mapped(
    layers: Sequence[Layer], weights: Weights, matrix: Tensor | None, shift: Tensor | None
) -> Weights:
    moved = dict(weights)
    for layer in layers:
        own = _oriented(layer, moved[layer.weight])
        columns = own if layer.whole else own[..., layer.start : layer.start + layer.size]
        if shift is not None:
            bias = bias_of(layer, "coordinates")
            moved[bias] = moved[bias] + (columns @ _of(shift[..., None], columns))[..., 0]
        if matrix is not None:
            columns = columns @ _of(matrix, columns)
            moved[layer.weight] = _oriented(layer, columns if layer.whole else _with(layer, own, columns))
    return moved


def map_values(
    spec: WeightSpec,
    weights: Weights,
    factor: Float[Tensor, " batch"] | None = None,
    shift: Float[Tensor, " batch"] | None = None,
    signal: Signal | None = None,
) -> Weights:
    """The networks that compute ``c (f(x) - m) + m + s``, with m the middle of the signal.

    Args:
        spec: of coordinate networks.
        weights: with a leading batch axis, and perhaps one of checkpoints.
        factor: c, one per network; 1 by default.
        shift: s, one per network; 0 by default.
        signal: the output offset, which is no weight, and the middle.

    Raises:
        ConfigError: networks without coordinates, or not with one last layer that has a bias.
    """
    signal = signal or Signal()
    weight, bias = last_layer(spec, "values")
    moved = dict(weights)
    if factor is not None:
        about = signal.middle - signal.offset
        moved[weight] = moved[weight] * _of(factor, moved[weight])
        moved[bias] = about + (moved[bias] - about) * _of(factor, moved[bias])
    if shift is not None:
        moved[bias] = moved[bias] + _of(shift, moved[bias])
    return moved


def _of(values: Tensor, weights: Tensor) -> Tensor:
    """One value, or one matrix, per network, as it broadcasts against weights of all its checkpoints."""
    own = values.shape[1:]
    return values.to(weights.dtype).view(len(values), *[1] * (weights.ndim - 1 - len(own)), *own)


def _oriented(layer: Layer, matrix: Tensor) -> Tensor:
    """Outputs first, or as it was when it is already."""
    return matrix if layer.output == 0 else matrix.mT


def _with(layer: Layer, matrix: Tensor, columns: Tensor) -> Tensor:
    behind = layer.start + layer.size
    return torch.cat([matrix[..., : layer.start], columns, matrix[..., behind:]], -1)


class SpaceAugmentation(Augmentation):
    """An augmentation after which a coordinate network represents another signal, and is meant to.

    All checkpoints of a trajectory get the same draw. Targets that are weights move along.
    """

    changes_signal = True

    @abstractmethod
    def change(self, batch: Batch, draws: Draws) -> Callable[[Weights], Weights]:
        """Draw, and say what becomes of networks."""

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """Draw, and change weights."""
        change = self.change(batch, draws)
        targets = change(batch.targets) if isinstance(batch.targets, dict) else batch.targets
        return batch.with_(weights=change(batch.weights), targets=targets)


class CoordinateAugmentation(SpaceAugmentation):
    """``f'(x) = f(A x + t)``: coordinates are mapped on their way into the network (exact)."""

    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    shifts: ClassVar[bool] = False

    @abstractmethod
    def mapping(self, dims: int, draws: Draws) -> tuple[Matrix | None, Shift | None]:
        """Draw A and t for so many coordinates."""

    def check(self, batch: Batch) -> None:
        """Coordinates enter, and as many as suit; where they are shifted, layers have biases."""
        for layer in entries(batch.spec, self.name, self.dims):
            if self.shifts:
                bias_of(layer, self.name)

    def change(self, batch: Batch, draws: Draws) -> Callable[[Weights], Weights]:
        """One mapping per network."""
        layers = entries(batch.spec, self.name, self.dims)
        matrix, shift = self.mapping(layers[0].size, draws)
        return lambda weights: _mapped(layers, weights, matrix, shift)


class ValueAugmentation(SpaceAugmentation):
    """``f'(x) = c (f(x) - m) + m + s``, with m the middle of the signal: values are mapped as they leave (exact)."""

    @abstractmethod
    def mapping(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """Draw c and s."""

    def check(self, batch: Batch) -> None:
        """Values leave through one layer with a bias, and coordinates enter."""
        last_layer(batch.spec, self.name)

    def change(self, batch: Batch, draws: Draws) -> Callable[[Weights], Weights]:
        """One mapping per network."""
        factor, shift = self.mapping(draws)
        return lambda weights: map_values(batch.spec, weights, factor, shift, batch.signal)


@AUGMENTATIONS.register("rotation", effect="the rotated signal", paper=SHAMSIAN)
class Rotation(CoordinateAugmentation):
    """Rotate the signal by a random angle, in three dimensions about a random axis: ``f'(x) = f(R x)`` (exact).

    With two coordinates R turns the first axis towards the second. For images these are row and column, and rows run
    downwards: a positive angle turns the picture clockwise.

    Args:
        degrees: angles are uniform in [-degrees, degrees); in [0, 180].
    """

    dims = (2, 3)

    @options
    def __init__(
        self, degrees: Annotated[float, Field(ge=0, le=180, description="the largest angle")] = 30.0
    ) -> None:
        self.degrees = degrees

    def mapping(self, dims: int, draws: Draws) -> tuple[Matrix | None, Shift | None]:
        """Rotations."""
        angle = _spread(draws.uniform(), math.radians(self.degrees))
        cosine, sine = angle.cos(), angle.sin()
        if dims == 2:
            return torch.stack([cosine, -sine, sine, cosine], -1).view(-1, 2, 2), None
        return _about(torch.nn.functional.normalize(draws.normal(3), dim=-1), cosine, sine), None


@AUGMENTATIONS.register("scaling", effect="the signal, larger or smaller", paper=SHAMSIAN)
class CoordinateScaling(CoordinateAugmentation):
    """Shrink or enlarge the signal about the origin: ``f'(x) = f(c x)``, one c for all coordinates (exact).

    Args:
        share: c is uniform in [1 - share, 1 + share); in [0, 1). Above 1 the signal becomes smaller.
    """

    @options
    def __init__(
        self, share: Annotated[float, Field(ge=0, lt=1, description="c is in 1 - share to 1 + share")] = 0.2
    ) -> None:
        self.share = share

    def mapping(self, dims: int, draws: Draws) -> tuple[Matrix | None, Shift | None]:
        """Multiples of the identity."""
        factor = 1.0 + _spread(draws.uniform(), self.share)
        return torch.diag_embed(factor[:, None].expand(-1, dims)), None


@AUGMENTATIONS.register("reflection", effect="the mirrored signal")
class Reflection(CoordinateAugmentation):
    """Mirror the signal along each coordinate with probability ``p``: ``f'(x) = f(x_0, -x_1)`` (exact).

    Args:
        p: probability that a coordinate is negated, in [0, 1].
    """

    @options
    def __init__(
        self, p: Annotated[float, Field(ge=0, le=1, description="probability for each coordinate")] = 0.5
    ) -> None:
        self.p = p

    def mapping(self, dims: int, draws: Draws) -> tuple[Matrix | None, Shift | None]:
        """Diagonals of signs."""
        return torch.diag_embed(_signs(draws.uniform(dims), self.p)), None


@AUGMENTATIONS.register("translation", effect="the shifted signal", paper=SHAMSIAN)
class Translation(CoordinateAugmentation):
    """Shift the signal: ``f'(x) = f(x + t)``, through the first layer into its bias (exact).

    Args:
        most: each coordinate of t is uniform in [-most, most); at least 0. Images are 2 wide.
    """

    shifts = True

    @options
    def __init__(
        self,
        most: Annotated[
            float, Field(ge=0, allow_inf_nan=False, description="the largest shift of each coordinate")
        ] = 0.25,
    ) -> None:
        self.most = most

    def mapping(self, dims: int, draws: Draws) -> tuple[Matrix | None, Shift | None]:
        """Shifts."""
        return None, _spread(draws.uniform(dims), self.most)


@AUGMENTATIONS.register(
    "deep_translation", effect="one that is shifted only where layers are linear", paper=SHAMSIAN
)
class DeepTranslation(SpaceAugmentation):
    """Push a shift of the coordinates into the bias of the second layer, ``b2' = b2 + W2 W1 t``.

    This is the published approximation of :class:`Translation`: it leaves out the activation in between, and its
    frequency. Were that the identity, the signal would be shifted by t; as it is not, the signal becomes another one.

    Args:
        most: each coordinate of t is uniform in [-most, most); at least 0.
    """

    @options
    def __init__(
        self,
        most: Annotated[
            float, Field(ge=0, allow_inf_nan=False, description="the largest shift of each coordinate")
        ] = 0.25,
    ) -> None:
        self.most = most

    def check(self, batch: Batch) -> None:
        """One layer follows the other."""
        second_layer(batch.spec, self.name)

    def change(self, batch: Batch, draws: Draws) -> Callable[[Weights], Weights]:
        """One shift per network."""
        first, second = second_layer(batch.spec, self.name)
        shift = _spread(draws.uniform(first.size), self.most)
        return lambda weights: _pushed(weights, first, second, shift)


def _pushed(weights: Weights, first: Layer, second: Layer, shift: Tensor) -> Weights:
    one, two = (_oriented(layer, weights[layer.weight]) for layer in (first, second))
    bias = bias_of(second, "coordinates")
    return {**weights, bias: weights[bias] + (two @ (one @ _of(shift[..., None], one)))[..., 0]}


@AUGMENTATIONS.register("brightness", effect="the brighter or darker signal")
class Brightness(ValueAugmentation):
    """Add a constant to the signal: ``f'(x) = f(x) + s`` (exact).

    Args:
        most: s is uniform in [-most, most); at least 0. Images have values from 0 to 1.
    """

    @options
    def __init__(
        self,
        most: Annotated[float, Field(ge=0, allow_inf_nan=False, description="the largest constant")] = 0.2,
    ) -> None:
        self.most = most

    def mapping(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """Constants."""
        return None, _spread(draws.uniform(), self.most)


@AUGMENTATIONS.register("contrast", effect="the signal with more or less contrast")
class Contrast(ValueAugmentation):
    """Multiply the signal's distance from its middle m: ``f'(x) = c (f(x) - m) + m`` (exact).

    Args:
        share: c is uniform in [1 - share, 1 + share); in [0, 1).
    """

    @options
    def __init__(
        self, share: Annotated[float, Field(ge=0, lt=1, description="c is in 1 - share to 1 + share")] = 0.2
    ) -> None:
        self.share = share

    def mapping(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """Factors."""
        return 1.0 + _spread(draws.uniform(), self.share), None


@AUGMENTATIONS.register("negation", effect="the signal or its negative")
class Negation(ValueAugmentation):
    """Turn the signal into its negative with probability ``p``: ``f'(x) = 2 m - f(x)``, m its middle (exact).

    Args:
        p: probability, in [0, 1].
    """

    @options
    def __init__(
        self, p: Annotated[float, Field(ge=0, le=1, description="probability of the negative")] = 0.5
    ) -> None:
        self.p = p

    def mapping(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        """Signs."""
        return _signs(draws.uniform(), self.p), None


def _spread(uniform: Tensor, most: float) -> Tensor:
    """Numbers in [-most, most)."""
    return uniform.mul(2.0 * most).sub_(most)


def _signs(uniform: Tensor, p: float) -> Tensor:
    """-1 with probability p, and otherwise 1."""
    return (uniform >= p).float().mul_(2.0).sub_(1.0)


def _about(axis: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotations about unit vectors (batch, 3), by Rodrigues' formula."""
    x, y, z = axis.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    outer = axis[:, :, None] * axis[:, None, :]
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    return cosine * torch.eye(3, device=axis.device) + sine * cross + (1.0 - cosine) * outer
