"""From weights to the first features: wide ends narrowed or encoded, scalars expanded."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError, SpecError
from weightspace.models._ends import free_ends
from weightspace.models._orbits import WIDEST, Features, Orbits, type_name
from weightspace.spec import Frozen, TensorSpec, Weights, WeightSpec

ENDS = ("fixed", "encoded")
WIDE = ("refuse", "encode", "project")
PROJECTED = 8  # indices that are left of a wide one


class Encoding(nn.Module):
    """Weights to features on orbit types.

    Args:
        spec: the weight space.
        ends: ``"fixed"``: input and output units are told apart by folding them into channels; ``"encoded"``: they
            are treated alike, as hidden units are, and told apart by learned vectors that are added to their
            features.
        wide: what becomes of fixed indices that are more than 16: ``"refuse"``, ``"encode"`` as above, or
            ``"project"`` onto 8 learned combinations, once, before the first layer.
        fourier: number of random frequencies f with which each weight w also becomes sin(2 pi f w) and
            cos(2 pi f w); 0 for the weight alone.
        scale: standard deviation of the frequencies, above 0.
        raw: whether the weight itself stays beside its sines and cosines.
        decodes: whether :meth:`decode` is wanted, which has parameters of its own where axes are projected.

    Shapes:
        Weights with one batch axis -> (batch, *group sizes, entries * channels) per orbit type.

    Attributes:
        orbits: the layout of the features.
        channels: per weight entry.

    Raises:
        SpecError: a wide fixed index, or more than 256 positions on those of a cell together, without a choice of
            what becomes of them; or one that cannot be projected.
        ConfigError: an option out of range.

    Reference:
        Zhou et al. 2023, "Permutation Equivariant Neural Functionals", arXiv:2302.14040, section 3 and appendix: sines
        and cosines of weights. There the positions of ends, and the number of the layer, are encoded by sinusoids
        that are concatenated to the features; here they are learned vectors that are added, and every layer has
        parameters of its own. Navon et al. 2023, arXiv:2301.12780, section 5 and appendix, narrow and widen wide
        axes inside of every layer, beside a skip connection; here they are narrowed once, and widened once where
        weights come out.
    """

    def __init__(
        self,
        spec: WeightSpec,
        *,
        ends: str = "fixed",
        wide: str = "refuse",
        fourier: int = 0,
        scale: float = 1.0,
        raw: bool = True,
        decodes: bool = True,
    ) -> None:
        super().__init__()
        if ends not in ENDS or wide not in WIDE or fourier < 0:
            raise ConfigError(
                f"encoding: expected ends in {', '.join(ENDS)}, wide in {', '.join(WIDE)} and fourier >= 0, "
                f"found {ends!r}, {wide!r}, {fourier}"
            )
        if not scale > 0 or not (raw or fourier):
            raise ConfigError(
                "encoding: expected scale > 0, and frequencies where the weight itself is left out, "
                f"found scale {scale} and fourier {fourier}"
            )
        self.narrow = Narrowing(spec, decodes) if wide == "project" else None
        if self.narrow is not None:
            spec = self.narrow.narrowed
        names: dict[str, str] = {}
        if ends == "encoded" or wide == "encode":
            widest = WIDEST if wide == "encode" else None
            spec, names = free_ends(spec, units=ends == "encoded", wide=widest)
        try:
            self.orbits = Orbits(spec)
        except SpecError as error:
            choices = "wide='encode'" if wide == "project" else "wide='project' or wide='encode'"
            raise SpecError(f"{error}; choose {choices}") from None
        self.raw, self.channels = raw, raw + 2 * fourier
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2.0 * math.pi * scale * torch.randn(fourier))
        self.positions = nn.ParameterDict()
        for orbit in self.orbits.types:
            for at, index in enumerate(orbit):
                if index.group in names:
                    shape = [
                        size if place == at else 1 for place, size in enumerate(self.orbits.sizes(orbit))
                    ]
                    width = self.orbits.entries[orbit] * self.channels
                    self.positions[f"{self.orbits.key(orbit)}_at{at}"] = nn.Parameter(
                        torch.randn(*shape, width)
                    )

    def forward(self, weights: Weights) -> Features:
        """Weights (batch, ...) to features (batch, *group sizes, entries * channels)."""
        features = self.orbits.gather(weights if self.narrow is None else self.narrow(weights))
        features = {orbit: self._expanded(x) for orbit, x in features.items()}
        for orbit in self.orbits.types:
            for at in range(len(orbit)):
                key = f"{self.orbits.key(orbit)}_at{at}"
                if key in self.positions:
                    features[orbit] = features[orbit] + self.positions[key]
        return features

    def _expanded(self, x: Tensor) -> Tensor:
        if not len(self.frequencies):
            return x
        angle = x[..., None] * self.frequencies
        weight = [x[..., None]] if self.raw else []
        return torch.cat([*weight, angle.sin(), angle.cos()], dim=-1).flatten(-2)

    def decode(self, features: Features) -> Weights:
        """Features with one channel per entry to weights (batch, ...); not without ``decodes``."""
        weights = {name: tensor[..., 0] for name, tensor in self.orbits.scatter(features).items()}
        return weights if self.narrow is None else self.narrow.widened(weights)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        types = ", ".join(f"{count} x {type_name(orbit)}" for orbit, count in self.orbits.entries.items())
        return f"{self.channels} channels per weight; {types}"


class Narrowing(nn.Module):
    """Learned projections of fixed axes of more than 16 indices onto 8, and back if ``widens``.

    Raises:
        SpecError: a wide fixed index that is not a whole axis of a tensor.
    """

    def __init__(self, spec: WeightSpec, widens: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.axes: dict[str, tuple[str, int]] = {}
        tensors: dict[str, TensorSpec] = {}
        for number, (name, tensor) in enumerate(spec.tensors.items()):
            shape = list(tensor.shape)
            for cell in tensor.cells:
                for dim in cell.dims:
                    if dim.group is not None or dim.size <= WIDEST:
                        continue
                    if len(tensor.cells) > 1 or not _is_dense(tensor):
                        raise SpecError(
                            f"tensor {name!r}: {dim.size} fixed indices on part of axis {dim.axis} cannot be projected; "
                            "choose wide='encode'"
                        )
                    key = f"t{number}_axis{dim.axis}"
                    shape[dim.axis] = PROJECTED
                    self.axes[key] = (name, dim.axis)
                    bound = 1.0 / math.sqrt(dim.size)
                    self.down[key] = nn.Parameter(torch.empty(PROJECTED, dim.size).normal_(0.0, bound))
                    if widens:
                        bound = 1.0 / math.sqrt(PROJECTED)
                        self.up[key] = nn.Parameter(torch.empty(dim.size, PROJECTED).normal_(0.0, bound))
            tensors[name] = tensor if tuple(shape) == tensor.shape else _resized(tensor, shape)
        self.narrowed = replace(spec, tensors=Frozen(tensors), scalings=Frozen())

    def forward(self, weights: Weights) -> Weights:
        """Weights of the spec to those of the narrowed one."""
        return self._mapped(weights, self.down)

    def widened(self, weights: Weights) -> Weights:
        """Weights of the narrowed spec to those of the spec."""
        return self._mapped(weights, self.up)

    def _mapped(self, weights: Weights, maps: nn.ParameterDict) -> Weights:
        out = dict(weights)
        for key, (name, axis) in self.axes.items():
            out[name] = nn.functional.linear(out[name].movedim(1 + axis, -1), maps[key]).movedim(-1, 1 + axis)
        return out


def _is_dense(tensor: TensorSpec) -> bool:
    """Whether every axis of a tensor of one cell is one dim, and none is nested."""
    dims = tensor.cells[0].dims
    return all(dim.size == tensor.shape[dim.axis] and not dim.parents for dim in dims)


def _resized(tensor: TensorSpec, shape: list[int]) -> TensorSpec:
    """The same single cell on a tensor of another shape, in which each axis is one dim."""
    groups: list[str | None] = [None] * len(shape)
    for dim in tensor.cells[0].dims:
        groups[dim.axis] = dim.group
    return TensorSpec.dense(shape, groups, tensor.kind)
