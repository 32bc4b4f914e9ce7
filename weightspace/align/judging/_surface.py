"""Loss surfaces: how networks do on the plane through three of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._report import Stopwatch
from weightspace.align.judging._path import (
    Score,
    check_networks,
    check_suits,
    class_axis,
    combine,
    on_device,
    restorer,
    score,
)
from weightspace.errors import ConfigError, SpecError


@dataclass(frozen=True, eq=False)
class LossSurface:
    """Loss and accuracy on a grid of the plane through three networks.

    Args:
        names: of the three.
        positions: of the three in the plane, in units of L2 distance; the first is the origin, the second lies on the
            first axis. float64.
        x: places of the grid's columns, float64.
        y: places of its rows, float64.
        loss: mean loss at each, float64.
        accuracy: in [0, 1]; None where targets are no classes.
        scores: of the three networks themselves.
        measured_on: ``"train"`` or ``"test"``.
        repair: what was done to the networks of the grid.
        seconds: wall time.
    """

    names: tuple[str, str, str]
    positions: Float[Tensor, "3 2"]
    x: Float[Tensor, "columns"]
    y: Float[Tensor, "rows"]
    loss: Float[Tensor, "rows columns"]
    accuracy: Float[Tensor, "rows columns"] | None
    scores: tuple[Score, Score, Score]
    measured_on: Literal["train", "test"]
    repair: Literal["none", "batch-norm"]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        grids = {"loss": self.loss, "accuracy": self.accuracy}
        networks = [
            {"name": name, "position": place, "loss": found.loss, "accuracy": found.accuracy}
            for name, place, found in zip(self.names, self.positions.tolist(), self.scores, strict=True)
        ]
        return {
            "networks": networks,
            "x": self.x.tolist(),
            "y": self.y.tolist(),
            **{name: None if grid is None else _plain(grid) for name, grid in grids.items()},
            "measured_on": self.measured_on,
            "repair": self.repair,
            "seconds": self.seconds,
        }

    def to_json(self) -> str:
        """``networks``, ``x``, ``y``, ``loss`` and ``accuracy`` (a list per row)."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def draw(
        self, output: str | Path | BufferedIOBase, *, title: str | None = None, format: str | None = None
    ) -> None:
        """Draw contours of the loss, and of the accuracy where there is one, with the three networks.

        Args:
            output: a path, or a binary file that is open for writing.
            title: above the figure.
            format: ``"png"``, ``"pdf"`` or ``"svg"``; by default the suffix of the path, PNG for a file.

        Raises:
            ConfigError: another format.
        """
        from weightspace.align.judging._figures import saved, surface_figure

        with saved(output, format, title) as figure:
            surface_figure(figure, self)


def loss_surface(
    module: nn.Module,
    networks: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
    data: Batches,
    *,
    test: Batches | None = None,
    loss: Loss = F.cross_entropy,
    resolution: int = 21,
    margin: float = 0.2,
    repair: Literal["none", "batch-norm"] = "batch-norm",
    accuracy: bool | None = None,
) -> LossSurface:
    """Loss and accuracy on the plane through three networks.

    With parameters w1, w2, w3, the axes are orthonormal by Gram and Schmidt:

        u = (w2 - w1) / ||w2 - w1||,    v = (d - <d, u> u) / ||d - <d, u> u||,    d = w3 - w1

    and the grid holds the networks w1 + x u + y v. Each is an affine combination of the three, and statistics are
    combined with the same coefficients. What lies beyond the three is extrapolated, where variances may fall below 0 and
    the loss is then not a number: BatchNorm's statistics are better estimated again, as they are by default.

    Args:
        module: that computes the networks' function; it is copied and evaluated in evaluation mode.
        networks: three, possibly by name.
        data: training data, of which statistics are taken.
        test: data on which the surface is measured; the training data by default.
        loss: the mean loss of a batch; batches count by their number of samples.
        resolution: columns, and rows, of the grid.
        margin: how far the grid reaches beyond the three, as a share of their extent along each axis.
        repair: ``"batch-norm"`` estimates running statistics again on ``data`` at every place, ``"none"`` does not.
        accuracy: whether targets are classes, as :func:`barrier` has it; found out by default.

    Raises:
        ConfigError: a resolution below 2, a negative margin, an unknown repair, or other than three networks.
        SpecError: networks of different names or shapes, of another module, with values that are not finite, or on
            one line.
        DataError: data that the module or the loss refuse.

    Reference:
        Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", arXiv:1802.10026,
        section 3 (figure 1).

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> corners = [{"weight": torch.tensor([place])} for place in ([0.0, 0.0], [3.0, 0.0], [1.0, 2.0])]
        >>> data = [(torch.eye(2), torch.zeros(2, 1))]
        >>> surface = loss_surface(module, corners, data, loss=F.mse_loss, resolution=5)
        >>> surface.positions.tolist()
        [[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]
    """
    stopwatch = Stopwatch()
    named = _three(networks)
    _check_options(resolution, margin, repair)
    check_networks(named)
    names, corners = tuple(named), list(named.values())
    positions = _positions(_gram(module, corners))
    what, measured = ("data", data) if test is None else ("test", test)
    for title, given in {"data": data, what: measured}.items():
        check_suits(module, corners, given, loss, title)
    axis = class_axis(module, corners[0], measured, loss, accuracy, what)
    run, restore = on_device(module, corners[0]), restorer(module, corners, data, repair)

    def scored(weights: Mapping[str, Tensor]) -> Score:
        return score(run, weights, measured, loss, axis=axis)

    x, y = (_axis(positions[:, at], resolution, margin) for at in (0, 1))
    found = [
        [scored(restore(combine(corners, shares), shares)) for shares in row]
        for row in _coefficients(positions, x, y).tolist()
    ]
    losses, right = (
        [[getattr(each, name) for each in row] for row in found] for name in ("loss", "accuracy")
    )
    return LossSurface(
        names=(names[0], names[1], names[2]),
        positions=positions,
        x=x,
        y=y,
        loss=torch.tensor(losses, dtype=torch.float64),
        accuracy=None if axis is None else torch.tensor(right, dtype=torch.float64),
        scores=(scored(corners[0]), scored(corners[1]), scored(corners[2])),
        measured_on="train" if test is None else "test",
        repair=repair,
        seconds=stopwatch.seconds,
    )


def _three(
    networks: Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Mapping[str, Tensor]]:
    if len(networks) != 3:
        raise ConfigError(f"networks: expected three that span a plane, found {len(networks)}")
    named = networks if isinstance(networks, Mapping) else dict(zip(("A", "B", "C"), networks, strict=True))
    return {name: dict(network) for name, network in named.items()}  # a lazy one is read once


def _check_options(resolution: int, margin: float, repair: str) -> None:
    if resolution < 2:
        raise ConfigError(f"resolution: expected at least 2, found {resolution}")
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"margin: expected at least 0, found {margin}")
    if repair not in ("none", "batch-norm"):
        raise ConfigError(f"repair: expected none or batch-norm, found {repair!r}")


def _gram(module: nn.Module, networks: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, "2 2"]:
    """Inner products of ``w2 - w1`` and ``w3 - w1`` over the parameters, each tied tensor once, float64."""
    parameters = dict(module.named_parameters())
    gram = torch.zeros((2, 2), dtype=torch.float64)
    for name, origin in networks[0].items():
        if name in parameters:
            steps = [(network[name].double() - origin.double()).flatten() for network in networks[1:]]
            gram += torch.stack([torch.stack([p @ q for q in steps]) for p in steps]).detach().cpu()
    return gram


def _positions(gram: Float[Tensor, "2 2"]) -> Float[Tensor, "3 2"]:
    """Of the three in the plane."""
    length = gram[0, 0].sqrt()
    along = gram[0, 1] / length
    square = gram[1, 1] - along.square()
    # a tenth of a millionth of the area is what rounding of float32 weights leaves of none
    if not (length > 0 and square > 1e-12 * gram[1, 1]):
        raise SpecError("networks: expected three that span a plane, found them on one line")
    return torch.tensor([[0.0, 0.0], [length, 0.0], [along, square.sqrt()]], dtype=torch.float64)


def _axis(values: Float[Tensor, "3"], resolution: int, margin: float) -> Float[Tensor, "resolution"]:
    low, high = values.min(), values.max()
    beyond = margin * (high - low)
    return torch.linspace(float(low - beyond), float(high + beyond), resolution, dtype=torch.float64)


def _coefficients(
    positions: Float[Tensor, "3 2"], x: Float[Tensor, "columns"], y: Float[Tensor, "rows"]
) -> Float[Tensor, "rows columns 3"]:
    """Of the three networks, at each place; they sum to 1."""
    third = y / positions[2, 1]
    second = (x[None] - third[:, None] * positions[2, 0]) / positions[1, 0]
    third = third[:, None].expand_as(second)
    return torch.stack([1 - second - third, second, third], dim=-1)


def _plain(grid: Float[Tensor, "rows columns"]) -> list[list[float | None]]:
    return [[value if abs(value) < float("inf") else None for value in row] for row in grid.tolist()]
