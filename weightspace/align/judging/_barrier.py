"""Barriers: how much worse the networks between two networks are than the line between their losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._data import Batches, Loss
from weightspace.align._registry import align_networks, find_matcher
from weightspace.align._report import Stopwatch
from weightspace.align.judging._path import (
    Repair,
    Restore,
    Score,
    check_networks,
    check_suits,
    class_axis,
    combine,
    on_device,
    restorer,
    score,
)
from weightspace.errors import ConfigError
from weightspace.spec import WeightSpec

SUFFIXES: Mapping[Repair, str] = {"none": ", statistics averaged", "batch-norm": "", "repair": " + repair"}
"""What :func:`compare_barriers` adds to the name of a method."""


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy on the straight line from one network to another.

    Args:
        lambdas: places on the line, from 0 (the first network) to 1 (the second).
        loss: mean loss at each place.
        accuracy: in [0, 1]; None where targets are no classes.
    """

    lambdas: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] | None = None

    @property
    def loss_barrier(self) -> float:
        """The most by which the loss is above the line between its ends; infinite if it is not finite somewhere."""
        return self.loss_peak[1]

    @property
    def accuracy_barrier(self) -> float | None:
        """The most by which the accuracy is below the line between its ends."""
        return None if self.accuracy is None else self.accuracy_dip[1]

    @property
    def loss_peak(self) -> tuple[float, float]:
        """The place of the loss barrier, and its height."""
        return _largest(self.lambdas, self.loss)

    @property
    def accuracy_dip(self) -> tuple[float, float]:
        """The place of the accuracy barrier, and its depth."""
        assert self.accuracy is not None
        return _largest(self.lambdas, [-value for value in self.accuracy])

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes None."""
        accuracies = self.accuracy or [None] * len(self.lambdas)
        rows = zip(self.lambdas, self.loss, accuracies, strict=True)
        return {
            "loss_barrier": _plain(self.loss_barrier),
            "accuracy_barrier": _plain(self.accuracy_barrier),
            "curve": [{"lambda": t, "loss": _plain(x), "accuracy": _plain(y)} for t, x, y in rows],
        }


@dataclass(frozen=True)
class BarrierReport:
    """Loss and accuracy between two networks.

    Args:
        train: on the data of which statistics were taken.
        test: on other data, where there were some.
        repair: what was done to the networks between the two.
        seconds: wall time.
    """

    train: Curve
    test: Curve | None
    repair: Repair
    seconds: float

    @property
    def curve(self) -> Curve:
        """On the test data where there were some, else on the training data."""
        return self.train if self.test is None else self.test

    @property
    def lambdas(self) -> tuple[float, ...]:
        """Places on the line."""
        return self.train.lambdas

    @property
    def loss_barrier(self) -> float:
        """That of :attr:`curve`."""
        return self.curve.loss_barrier

    @property
    def accuracy_barrier(self) -> float | None:
        """That of :attr:`curve`, in [0, 1]; None where targets are no classes."""
        return self.curve.accuracy_barrier

    def as_dict(self) -> dict[str, Any]:
        """Plain values: those of :attr:`curve`, and those on both data."""
        return {
            **self.curve.as_dict(),
            "measured_on": "train" if self.test is None else "test",
            "repair": self.repair,
            "seconds": self.seconds,
            "train": self.train.as_dict(),
            "test": None if self.test is None else self.test.as_dict(),
        }

    def to_json(self) -> str:
        """``loss_barrier``, ``accuracy_barrier``, ``curve`` (``lambda``, ``loss``, ``accuracy``), ``train``, ``test``."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def summary(self) -> str:
        """One line for each data."""
        curves = {"train": self.train} | ({} if self.test is None else {"test": self.test})
        return "\n".join(f"{name}: {_curve_text(curve)}" for name, curve in curves.items())

    def __str__(self) -> str:
        return self.summary()

    def draw(
        self, output: str | Path | BufferedIOBase, *, title: str | None = None, format: str | None = None
    ) -> None:
        """Draw the curves; see :func:`draw_barriers`."""
        draw_barriers({"": self}, output, title=title, format=format)


def barrier(
    module: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    data: Batches,
    *,
    test: Batches | None = None,
    loss: Loss = F.cross_entropy,
    points: int = 25,
    repair: Repair = "batch-norm",
    accuracy: bool | None = None,
) -> BarrierReport:
    """Loss and accuracy of the networks between two networks, and how far they fall behind the line.

    With theta(t) = (1 - t) A + t B and t in [0, 1], the barriers are

        max over t of  L(theta(t)) - ((1 - t) L(A) + t L(B))       (loss)
        max over t of  ((1 - t) acc(A) + t acc(B)) - acc(theta(t))    (accuracy)

    They are at least 0, as both differences vanish at the ends. A and B are evaluated as they are; what ``repair``
    says happens to every network strictly between them, each on its own.

    Args:
        module: that computes the networks' function; it is copied and evaluated in evaluation mode.
        a: network A, at t = 0.
        b: network B, at t = 1: align it first.
        data: training data: statistics are taken of them, and one curve is measured on them.
        test: other data, for a second curve.
        loss: the mean loss of a batch; batches count by their number of samples.
        points: places on the line, ends included, evenly spaced.
        repair: ``"batch-norm"`` estimates the running statistics again on ``data`` (networks without BatchNorm stay
            as they are), ``"repair"`` rescales every channel as well (:func:`weightspace.align.repair`), ``"none"``
            interpolates statistics like weights.
        accuracy: whether targets are classes, one integer per vector of outputs along the last axis, or along the
            second, as PyTorch's losses have it; found out by default. Targets below 0 do not count.

    Raises:
        ConfigError: fewer than three points, or an unknown repair.
        SpecError: networks of different names or shapes, of another module, or with values that are not finite.
        DataError: data that the module or the loss refuse.

    Reference:
        Frankle et al. 2020, arXiv:1912.05671 (the barrier); Ainsworth et al. 2023, arXiv:2209.04836 (25 points
        after alignment); Jordan et al. 2023, arXiv:2211.08403 (statistics at every interior point).

    Example:
        >>> import torch
        >>> module = nn.Linear(1, 1, bias=False)
        >>> a, b = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[1.0]])}
        >>> square = lambda outputs, targets: (1 - outputs.square()).square().mean()
        >>> report = barrier(module, a, b, [(torch.ones(1, 1), torch.zeros(1, 1))], loss=square)
        >>> report.loss_barrier
        1.0
    """
    stopwatch = Stopwatch()
    _check_options(points, repair)
    a, b = dict(a), dict(b)  # a lazy one is read once
    check_networks({"A": a, "B": b})
    sources = _sources(data, test)
    axes = {name: _checked(module, (a, b), given, loss, accuracy, name) for name, given in sources.items()}
    lambdas = tuple(place / (points - 1) for place in range(points))
    scores: dict[str, list[Score]] = {name: [] for name in sources}
    restore, run = restorer(module, (a, b), data, repair), on_device(module, a)
    for t in lambdas:
        network = _between(a, b, t, restore)
        for name, given in sources.items():
            scores[name].append(score(run, network, given, loss, axis=axes[name]))
    curves = {name: _curve(lambdas, found) for name, found in scores.items()}
    return BarrierReport(curves["data"], curves.get("test"), repair, stopwatch.seconds)


def compare_barriers(
    spec: WeightSpec,
    module: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    data: Batches,
    *,
    methods: Sequence[str] = ("weight-matching",),
    repairs: Sequence[Repair] = ("batch-norm", "repair"),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    test: Batches | None = None,
    loss: Loss = F.cross_entropy,
    points: int = 25,
    seed: int = 0,
    accuracy: bool | None = None,
) -> dict[str, BarrierReport]:
    """Barriers between two networks as they are, and after each of several alignments.

    Args:
        spec: the weight space.
        module: that computes the networks' function.
        a: network A.
        b: network B, which each method brings onto A (or both onto each other).
        data: training data, for the curves, for statistics, and for matchers that need data.
        methods: names of matchers, some of ``MATCHERS``.
        repairs: what is done to networks between aligned ones, in turn; see :func:`barrier`.
        options: of matchers, by their names.
        test: other data, for a second curve.
        loss: the mean loss of a batch.
        points: places on the line.
        seed: of the matchers.
        accuracy: whether targets are classes; found out by default.

    Returns:
        Reports under ``"naive"`` (without REPAIR), the methods' names, and those with ``" + repair"``; with
        ``", statistics averaged"`` where ``repairs`` holds ``"none"``. :func:`draw_barriers` draws them.

    Raises:
        ConfigError: an unknown method or option, or options of a method that is not used; also what
            :func:`barrier` raises.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> spec = WeightSpec.trace(module, torch.ones(1, 2))
        >>> a = dict(module.state_dict())
        >>> b = spec.act(spec.random_element(symmetries=["permutation"]), a)
        >>> data = [(torch.randn(20, 2), torch.randint(3, (20,)))]
        >>> reports = compare_barriers(spec, module, a, b, data, repairs=["none"])
        >>> list(reports)
        ['naive, statistics averaged', 'weight-matching, statistics averaged']
        >>> reports["weight-matching, statistics averaged"].loss_barrier < 1e-6
        True
    """
    _check_options(points, *repairs)
    a, b = dict(a), dict(b)
    check_networks({"A": a, "B": b})
    matchers = [find_matcher(method) for method in methods]
    for name in options or {}:
        if name not in methods:
            raise ConfigError(f"options: expected some of the methods {', '.join(methods)}, found {name!r}")
    for what, given in _sources(data, test).items():
        _checked(module, (a, b), given, loss, accuracy, what)
    pairs: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {"naive": (a, b)}
    for found in matchers:
        chosen = (options or {}).get(found.name, {})
        (one, other), _ = align_networks(
            spec, (a, b), found.name, module=module, data=data, loss=loss, seed=seed, **chosen
        )
        pairs[found.name] = (one, other)
    return {
        f"{name}{SUFFIXES[how]}": barrier(
            module, one, other, data, test=test, loss=loss, points=points, repair=how, accuracy=accuracy
        )
        for name, (one, other) in pairs.items()
        for how in repairs
        if (name, how) != ("naive", "repair")
    }


def draw_barriers(
    reports: Mapping[str, BarrierReport],
    output: str | Path | BufferedIOBase,
    *,
    title: str | None = None,
    format: str | None = None,
) -> None:
    """Draw curves of loss, and of accuracy where there is one: solid on test data, dashed on training data.

    A dotted line joins the ends. One report alone has the height of its barrier marked.

    Args:
        reports: by what the legend calls them.
        output: a path, or a binary file that is open for writing.
        title: above the figure.
        format: ``"png"``, ``"pdf"`` or ``"svg"``; by default the suffix of the path, PNG for a file.

    Raises:
        ConfigError: no reports, or another format.
    """
    from weightspace.align.judging._figures import barrier_figure, saved

    if not reports:
        raise ConfigError("reports: expected at least one to draw, found none")
    with saved(output, format, title) as figure:
        barrier_figure(figure, reports)


# -- parts -------------------------------------------------------------------------------------------------


def _check_options(points: int, *repairs: str) -> None:
    if points < 3:
        raise ConfigError(f"points: expected at least 3, found {points}")
    for repair in repairs:
        if repair not in get_args(Repair):
            raise ConfigError(f"repair: expected one of {', '.join(get_args(Repair))}, found {repair!r}")


def _sources(data: Batches, test: Batches | None) -> dict[str, Batches]:
    """By what messages call them."""
    return {"data": data} if test is None else {"data": data, "test": test}


def _checked(
    module: nn.Module,
    networks: Sequence[Mapping[str, Tensor]],
    data: Batches,
    loss: Loss,
    accuracy: bool | None,
    what: str,
) -> int | None:
    """The axis of the outputs' classes, if the targets of these data, which suit the module, are classes."""
    check_suits(module, networks, data, loss, what)
    return class_axis(module, networks[0], data, loss, accuracy, what)


def _between(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float, restore: Restore
) -> Mapping[str, Tensor]:
    if t in (0.0, 1.0):
        return b if t else a
    return restore(combine((a, b), (1 - t, t)), (1 - t, t))


def _curve(lambdas: tuple[float, ...], scores: Sequence[Score]) -> Curve:
    accuracies = [found.accuracy for found in scores if found.accuracy is not None]
    return Curve(lambdas, tuple(found.loss for found in scores), tuple(accuracies) or None)


def _largest(lambdas: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Where values are farthest above the line between their ends, and how far."""
    begin, end = values[0], values[-1]
    excess = [value - ((1 - t) * begin + t * end) for t, value in zip(lambdas, values, strict=True)]
    height, at = max(
        (value if math.isfinite(value) else math.inf, -place) for place, value in enumerate(excess)
    )
    return lambdas[-at], height


def _plain(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _curve_text(curve: Curve) -> str:
    at, height = curve.loss_peak
    middle = curve.loss[len(curve.loss) // 2]
    text = (
        f"loss barrier {height:.4g} at lambda {at:.2g} (ends {curve.loss[0]:.4g} and {curve.loss[-1]:.4g}, "
        f"middle {middle:.4g})"
    )
    if curve.accuracy is None:
        return text
    at, depth = curve.accuracy_dip
    first, last = curve.accuracy[0], curve.accuracy[-1]
    return (
        f"{text}; accuracy barrier {100 * depth:.2f} points at lambda {at:.2g} "
        f"(ends {100 * first:.2f} % and {100 * last:.2f} %)"
    )
