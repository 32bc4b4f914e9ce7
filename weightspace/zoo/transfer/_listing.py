"""What a source holds, before a single weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from weightspace.errors import DataError
from weightspace.zoo.transfer._tables import Table

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Problem:
    """Something that cannot be imported.

    Args:
        name: of a file or a line.
        reason: in words.
    """

    name: str
    reason: str


@dataclass
class Listing:
    """One place per checkpoint, in the order in which they are read; all but ``problems`` are lists of one length.

    Args:
        paths: names of the checkpoints, for messages: of files below the source.
        network: of which network it is one; equal keys are one network. By default each is its own.
        item: of the source data set; by default the number of the network.
        view: which of several networks of the item; 0 by default.
        step: optimiser updates, or what the format counts; 0 by default.
        split: ``"train"``, ``"val"``, ``"test"``, or None where the source does not say.
        population: whose items are numbered by themselves; by default all are one.
        known_as: what a splits file calls it; its path by default.
        labels: by name.
        metrics: by name.
        hyperparameters: by name; texts become codes.
        problems: what was found but does not fit.
    """

    paths: list[str]
    network: list[Any] | None = None
    item: list[int] | None = None
    view: list[int] | None = None
    step: list[int] | None = None
    split: list[str | None] | None = None
    population: list[str] | None = None
    known_as: list[str] | None = None
    labels: Table = field(default_factory=dict)
    metrics: Table = field(default_factory=dict)
    hyperparameters: Table = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def take(self, places: Sequence[int]) -> Listing:
        """Some of the checkpoints."""
        if len(places) == len(self.paths) and list(places) == list(range(len(places))):
            return self
        changed: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "problems" or value is None:
                continue
            if isinstance(value, dict):
                changed[each.name] = {name: [column[at] for at in places] for name, column in value.items()}
            else:
                changed[each.name] = [value[at] for at in places]
        return replace(self, **changed)

    def sorted_by(self, keys: Sequence[Any]) -> Listing:
        """In the order of some keys."""
        return self.take(sorted(range(len(keys)), key=keys.__getitem__))


def natural(name: str) -> tuple[Any, ...]:
    """A key to sort names by in which 10 follows 9.

    Example:
        >>> sorted(["net10.pth", "net9.pth"], key=natural)
        ['net9.pth', 'net10.pth']
    """
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in _DIGITS.split(name))


def walk(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Paths, below a folder, of the files with some endings; what is hidden is left out.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[str] = []
    base = os.path.join(
        folder, ""
    )  # joining strings: a tree of 10,000 small folders is walked in half the time
    todo = [""]
    while todo:
        below = todo.pop()
        try:
            with os.scandir(f"{base}{below}") as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        todo.append(f"{below}{entry.name}/")
                    elif entry.name.endswith(suffixes) and not _is_device(entry):
                        found.append(f"{below}{entry.name}")
        except OSError as error:
            raise DataError(f"source {folder / below}: cannot be read ({error.strerror})") from None
    return sorted(found, key=natural)


def _is_device(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe or the like, which could be read for ever; a link to nothing is none."""
    return not entry.is_file() and os.path.exists(entry.path)
