"""What every exporter is: it says what it can keep, and writes some rows into a new folder. The driver does the rest."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from weightspace.configuration import Registry
from weightspace.errors import ConfigError
from weightspace.spec import Weights
from weightspace.zoo._zoo import SPLITS, Population

SPLITS_FILE = "splits.json"
_ROWS = 1024  # read at once


@dataclass(frozen=True)
class Part:
    """What is exported of one population.

    Args:
        name: of the population.
        population: as it is in the zoo.
        rows: (n,) numbers of rows.
    """

    name: str
    population: Population
    rows: np.ndarray

    @property
    def networks(self) -> np.ndarray:
        """The network of each row."""
        return self.population.network[self.rows]

    def states(self) -> Iterator[tuple[int, Weights]]:
        """Each row with its weights under their names."""
        for start in range(0, len(self.rows), _ROWS):
            rows = self.rows[start : start + _ROWS]
            for row, flat in zip(rows.tolist(), self.population.read(rows), strict=True):
                yield row, self.population.spec.unflatten(flat)

    def split_of(self, row: int) -> str:
        """The split of a row's network."""
        return SPLITS[self.population.split[self.population.network[row]]]

    def values(self, table: str, row: int, *, decoded: bool = False) -> dict[str, Any]:
        """The row's numbers of a table; names for codes if ``decoded``."""
        at = row if table == "metrics" else self.population.network[row]
        found = {name: plain(column[at]) for name, column in getattr(self.population, table).items()}
        choices = self.population.protocol.get("choices", {}) if decoded else {}
        return {name: choices[name][value] if name in choices else value for name, value in found.items()}


class Exporter:
    """Writes one layout.

    Args:
        parts: what is written.

    Attributes:
        format: under which it is registered in ``EXPORTERS``.
        keeps: what the layout has a place for, of ``labels``, ``metrics``, ``hyperparameters``, ``step`` and
            ``splits``.
    """

    format: ClassVar[str]
    keeps: ClassVar[tuple[str, ...]] = ()

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def check(self) -> None:
        """Raise ConfigError for networks that the layout has no place for."""

    def write(self, folder: Path) -> Iterator[None]:
        """Write all rows, and yield after each."""
        raise NotImplementedError

    def left_out(self) -> list[str]:
        """What the zoo has and the layout has no place for."""
        tables = ("labels", "metrics", "hyperparameters")
        names = {
            f"{table}/{name}"
            for part in self.parts
            for table in tables
            if table not in self.keeps
            for name in getattr(part.population, table)
        }
        steps = any(part.population.step[part.rows].any() for part in self.parts)
        return sorted(names) + (["step"] if steps and "step" not in self.keeps else [])

    # -- what several layouts ask --------------------------------------------------------------------------

    def check_inrs(self, views: bool) -> Part:
        """The one population, if it is of MLPs with a label each, one checkpoint per network."""
        if len(self.parts) != 1:
            names = ", ".join(part.name for part in self.parts)
            raise self.refusal(f"one population, found {names}; say --population NAME")
        part = self.parts[0]
        population = part.population
        if (population.architecture or {}).get("kind") != "mlp":
            raise self.refusal(f"MLPs, and population {part.name} is of other networks")
        label = population.labels.get("label")
        if label is None or label.dtype != np.int64 or label.min() < 0:
            raise self.refusal(f"a label of whole numbers, called label, in population {part.name}")
        if len(np.unique(part.networks)) != len(part.rows):
            raise self.refusal('one checkpoint per network; say --where "step == last"')
        if population.source.min() < 0:
            raise self.refusal(f"item numbers of at least 0, found {population.source.min()}")
        items = np.stack([population.source[part.networks], population.view[part.networks]])
        if not views and len(np.unique(items[0])) != len(part.rows):
            raise self.refusal('one network per item; say --where "view == 0"')
        if np.unique(items, axis=1).shape[1] != len(part.rows):
            raise self.refusal("one network per item and view, as these name its files")
        return part

    def check_steps(self) -> None:
        """Refuse checkpoints whose files would have one name."""
        for part in self.parts:
            names = np.stack([part.networks, part.population.step[part.rows]])
            if np.unique(names, axis=1).shape[1] != len(part.rows):
                raise self.refusal(
                    f"one checkpoint per network and step, and population {part.name} has several"
                )

    def refusal(self, expected: str) -> ConfigError:
        """An error that says what the format takes."""
        return ConfigError(f"export: format {self.format} takes {expected}")

    def write_splits(self, folder: Path, entries: Sequence[tuple[str, str, int | None]]) -> None:
        """A splits file of paths, with their splits and labels."""
        document: dict[str, dict[str, list[Any]]] = {}
        for name in SPLITS:
            chosen = [entry for entry in entries if entry[1] == name]
            document[name] = {"path": [path for path, _, _ in chosen]}
            if any(label is not None for _, _, label in chosen):
                document[name]["label"] = [label for _, _, label in chosen]
        (folder / SPLITS_FILE).write_text(json.dumps(document, indent=1))


EXPORTERS: Registry[type[Exporter]] = Registry("exporter", "format")
"""The layouts that ``weightspace export`` writes; ``@EXPORTERS.register("name", keeps=...)`` adds one."""


def plain(value: Any) -> int | float:
    """A number for JSON and CSV: float32 with as few digits as it takes.

    Example:
        >>> plain(np.float32(0.1)), plain(np.int64(3))
        (0.1, 3)
    """
    return int(value) if isinstance(value, np.integer) else float(str(np.float32(value)))


def json_ready(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without NaN, which JSON does not have."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def save_state(path: Path, value: Any) -> None:
    """``torch.save`` of tensors that do not share their memory with others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # on a full disk torch's own writer raises what nobody understands
    torch.save(value, content)
    path.write_bytes(content.getbuffer())
