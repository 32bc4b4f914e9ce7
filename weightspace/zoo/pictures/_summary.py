"""Populations as one table: every network at its last checkpoint, its columns by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from weightspace.zoo._zoo import Population

FEW = 8  # so many different values are drawn as boxes, more as points
DECADES = 30.0  # what spans a larger factor is drawn on a logarithmic axis

Scale = Literal["values", "linear", "log", "symlog"]
Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Variable:
    """What may differ between networks: a hyperparameter, a label.

    Args:
        name: of it.
        values: one per network, NaN where it has none; codes where there are ``choices``.
        choices: the names of the codes.
    """

    name: str
    values: Float[np.ndarray, " networks"]
    choices: tuple[str, ...] = ()

    @cached_property
    def distinct(self) -> Float[np.ndarray, " values"]:
        """The different values, sorted."""
        return np.unique(self.values[np.isfinite(self.values)])

    @property
    def varies(self) -> bool:
        """Whether there are two values, and not merely a new one for every network, as of a seed."""
        numbering = self.name == "seed" and len(self.distinct) > max(FEW, len(self.values) // 2)
        return len(self.distinct) > 1 and not numbering

    @property
    def scale(self) -> Scale:
        """How its axis is drawn: its few values side by side, or numbers on an axis."""
        if self.choices or len(self.distinct) <= FEW:
            return "values"
        if self.distinct[0] < 0 or not decades(self.values[self.values > 0]):
            return "linear"
        return "log" if self.distinct[0] > 0 else "symlog"

    def called(self, value: float) -> str:
        """A value as it is written: the name of a code, or the number."""
        if self.choices:
            return self.choices[int(value)]
        return short(value)


@dataclass(frozen=True)
class Summary:
    """All networks of some populations, each at its last checkpoint.

    Args:
        populations: which.
        population: (networks,) position of its population.
        row: (networks,) its last checkpoint, a row of its population.
        metrics: at that checkpoint, by name; NaN where a population lacks the metric.
        labels: by name.
        hyperparameters: by name.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> summary = Summary.of(tiny_zoo(networks=6).populations)
        >>> len(summary), summary.score, list(summary.labels)
        (6, 'psnr', ['label'])
    """

    populations: Mapping[str, Population]
    population: Int[np.ndarray, " networks"]
    row: Int[np.ndarray, " networks"]
    metrics: Columns
    labels: Mapping[str, Variable]
    hyperparameters: Mapping[str, Variable]

    @classmethod
    def of(cls, populations: Mapping[str, Population]) -> Summary:
        """The table of some populations."""
        members = list(populations.values())
        rows = [last_rows(population) for population in members]
        networks = [population.network[row] for population, row in zip(members, rows, strict=True)]
        sizes = [len(row) for row in rows]
        metrics = {
            name: _column([population.metrics.get(name) for population in members], rows)
            for name in _names(population.metrics for population in members)
        }
        return cls(
            populations,
            np.repeat(np.arange(len(members)), sizes),
            np.concatenate([np.empty(0, np.int64), *rows]),
            metrics,
            _variables(members, networks, "labels"),
            _variables(members, networks, "hyperparameters"),
        )

    def __len__(self) -> int:
        return len(self.row)

    @property
    def score(self) -> str | None:
        """The metric by which its networks are compared, where there is one."""
        return next((name for name in ("test_accuracy", "psnr") if name in self.metrics), None)

    @cached_property
    def diverged(self) -> Bool[np.ndarray, " networks"]:
        """Which networks have diverged: those that say so, and those whose score is no number."""
        found = np.zeros(len(self), dtype=bool)
        if "diverged" in self.metrics:
            found |= self.metrics["diverged"] > 0
        return found if self.score is None else found | ~np.isfinite(self.metrics[self.score])

    @property
    def sizes(self) -> Variable:
        """The number of parameters of each network; few populations are named, in order of their size."""
        sizes = [population.spec.num_parameters for population in self.populations.values()]
        if len(sizes) > FEW:
            return Variable("parameters", np.array(sizes, np.float64)[self.population])
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        names = list(self.populations)
        place = np.argsort(order).astype(np.float64)
        return Variable(
            "population (parameters)",
            place[self.population],
            tuple(f"{names[at]} ({short(sizes[at])})" for at in order),
        )

    @property
    def varying(self) -> list[Variable]:
        """The hyperparameters that differ between networks."""
        return [variable for variable in self.hyperparameters.values() if variable.varies]

    @property
    def variables(self) -> list[Variable]:
        """All against which a score is drawn: sizes of networks, hyperparameters that differ, labels that differ."""
        sizes = [self.sizes] if len(self.populations) > 1 else []
        labels = [label for label in self.labels.values() if label.varies]
        return [*sizes, *self.varying, *labels]

    @property
    def time(self) -> str:
        """What checkpoints are counted in: epochs where all populations know them, else optimiser steps."""
        known = all("epoch" in population.metrics for population in self.populations.values())
        return "epoch" if known else "step"

    def trajectories(self, metric: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Time and metric at every checkpoint of each network, in order of the networks of this table."""
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for population in self.populations.values():
            order, ends = _by_network(population)
            values = population.metrics.get(metric)
            values = np.full(population.rows, np.nan) if values is None else values
            time = population.metrics["epoch"] if self.time == "epoch" else population.step
            cuts = ends[:-1] + 1
            found += zip(
                np.split(np.asarray(time, np.float64)[order], cuts),
                np.split(np.asarray(values, np.float64)[order], cuts),
                strict=True,
            )
        return found


def decades(values: np.ndarray) -> bool:
    """Whether positive numbers are better told apart by their logarithms.

    They span a large factor, and not merely because one of many even numbers comes close to zero: their median lies
    nearer to the middle of the logarithms.

    Example:
        >>> decades(np.geomspace(1e-4, 1e-1, 50)), decades(np.linspace(1e-4, 1e-1, 50))
        (True, False)
    """
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.max() <= DECADES * finite.min():
        return False
    return _off_centre(np.log(finite)) < _off_centre(finite)


def _off_centre(values: np.ndarray) -> float:
    low, high = float(values.min()), float(values.max())
    return abs((float(np.median(values)) - low) / (high - low) - 0.5)


def last_rows(population: Population) -> Int[np.ndarray, " networks"]:
    """The last checkpoint of every network that has one, in order of the networks' numbers."""
    order, ends = _by_network(population)
    return order[ends]


def _by_network(population: Population) -> tuple[np.ndarray, np.ndarray]:
    """The rows in order of network and step, and where in that order each network ends."""
    order = np.lexsort((population.step, population.network))
    network = population.network[order]
    return order, np.flatnonzero(np.append(network[1:] != network[:-1], True)[: len(network)])


def _names(tables: Iterable[Columns]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def _column(tables: Sequence[np.ndarray | None], at: Sequence[np.ndarray]) -> np.ndarray:
    """Some entries of every table, one after the other, NaN where there is none."""
    parts = [
        np.full(len(places), np.nan) if values is None else np.asarray(values[places], np.float64)
        for values, places in zip(tables, at, strict=True)
    ]
    return np.concatenate([np.empty(0), *parts])


def _variables(
    members: Sequence[Population], networks: Sequence[np.ndarray], table: str
) -> dict[str, Variable]:
    found = {}
    for name in _names(getattr(population, table) for population in members):
        tables = [getattr(population, table).get(name) for population in members]
        lists = [choices_of(population, name) for population in members]
        known = tuple(dict.fromkeys(choice for choices in lists for choice in choices))
        # populations may number the same names differently
        recoded = [
            values if values is None or not choices else _recoded(values, choices, known)
            for values, choices in zip(tables, lists, strict=True)
        ]
        complete = all(values is None or choices for values, choices in zip(tables, lists, strict=True))
        found[name] = Variable(name, _column(recoded, networks), known if complete else ())
    return found


def choices_of(population: Population, name: str) -> tuple[str, ...]:
    """The names of the codes of a hyperparameter or label, in their order; empty where it has none."""
    choices = population.protocol.get("choices")
    named = choices.get(name) if isinstance(choices, Mapping) else None
    return tuple(str(choice) for choice in named) if isinstance(named, list | tuple) else ()


def _recoded(values: np.ndarray, choices: tuple[str, ...], known: tuple[str, ...]) -> np.ndarray:
    places = np.array([known.index(choice) for choice in choices], dtype=np.float64)
    codes = np.asarray(values, np.float64)
    fits = (codes >= 0) & (codes < len(choices))
    return np.where(fits, places[np.where(fits, codes, 0).astype(np.int64)], np.nan)


def short(value: int | float) -> str:
    """A number in few characters: ``0.001``, ``1e-5``, ``4,970``."""
    if not np.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
