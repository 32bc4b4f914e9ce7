"""From a listing and the rows that were read to a zoo."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from weightspace.errors import DataError
from weightspace.zoo._zoo import SPLITS, Population, Zoo, split_items
from weightspace.zoo.transfer._designs import Design
from weightspace.zoo.transfer._importer import ImportOptions, Note
from weightspace.zoo.transfer._listing import Listing
from weightspace.zoo.transfer._tables import Table, is_whole, numbers, texts

TABLES = ("labels", "metrics", "hyperparameters")


def assemble(
    listing: Listing,
    notes: Sequence[Note],
    rows: Mapping[str, np.ndarray],
    designs: Mapping[str, Design],
    options: ImportOptions,
    protocol: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> Zoo:
    """The zoo of the checkpoints that are not bad.

    Args:
        listing: of all checkpoints.
        notes: of all checkpoints, as they were read.
        rows: (n, P) by population, of those that are not bad, in their order.
        designs: by population.
        options: which splits are drawn where the source says none.
        protocol: what the format says of all populations.
        recipe: of the zoo.
    """
    good = [place for place, note in enumerate(notes) if "bad" not in note]
    kept, found = listing.take(good), [notes[place] for place in good]
    columns = _Columns(kept, found, options)
    member = np.array([note["population"] for note in found])
    populations = {
        name: columns.population(np.flatnonzero(member == name), rows[name], design, protocol)
        for name, design in designs.items()
        if name in rows
    }
    return Zoo(populations, recipe=recipe)


class _Columns:
    """Arrays with a value per checkpoint, coded alike for all populations."""

    def __init__(self, listing: Listing, notes: Sequence[Note], options: ImportOptions) -> None:
        keys = listing.network if listing.network is not None else listing.paths
        places: dict[Any, int] = {}
        self.network = _whole([places.setdefault(key, len(places)) for key in keys])
        self.item = self.network if listing.item is None else _whole(listing.item)
        zeros = np.zeros(len(keys), dtype=np.int64)
        self.view = zeros if listing.view is None else _whole(listing.view)
        self.step = zeros if listing.step is None else _whole(listing.step)
        self.split = _splits(self.item, listing.split, options)
        self.choices: dict[str, list[str]] = {}
        self.left_out: list[str] = []
        self.whole: set[tuple[str, str]] = set()
        self.tables = {
            name: self._coded(_noted(getattr(listing, name), notes, name), name) for name in TABLES
        }

    def _coded(self, table: Table, kind: str) -> dict[str, np.ndarray]:
        coded = {}
        for name, values in table.items():
            stored = name.replace("/", "_")
            array = numbers(values)
            named = texts(values) if array is None and kind != "metrics" else None
            if named is not None:
                array, self.choices[stored] = named[0], list(named[1])
            if stored in coded:
                raise DataError(f"{kind}: {name!r} and another column would both be called {stored!r}")
            if array is None or not stored or stored == ".":
                self.left_out.append(name)
            else:
                coded[stored] = array
                if kind != "metrics" and (named is not None or is_whole(values)):
                    self.whole.add((kind, stored))
        return coded

    def _table(self, kind: str, at: np.ndarray, alone: bool) -> dict[str, np.ndarray]:
        """The columns of a table at some checkpoints, but for those that only other populations have."""
        found = {}
        for name, values in self.tables[kind].items():
            missing = np.isnan(values[at])
            if missing.all() and not alone:
                continue
            is_whole_here = (kind, name) in self.whole and not missing.any()
            found[name] = values[at].astype(np.int64 if is_whole_here else np.float32)
        return found

    def population(
        self, at: np.ndarray, weights: np.ndarray, design: Design, protocol: Mapping[str, Any]
    ) -> Population:
        """The population of some checkpoints."""
        _, first, network = np.unique(self.network[at], return_index=True, return_inverse=True)
        first, alone = at[first], len(at) == len(self.network)
        told = {**protocol, **design.protocol, "imported_from": protocol["imported_from"]}
        told |= {"choices": self.choices} if self.choices else {}
        told |= {"left_out": sorted(self.left_out)} if self.left_out else {}
        return Population(
            spec=design.spec,
            weights=weights,
            network=network.astype(np.int64),
            step=self.step[at],
            source=self.item[first],
            view=self.view[first],
            split=self.split[first],
            metrics=self._table("metrics", at, alone),
            labels=self._table("labels", first, alone),
            hyperparameters=self._table("hyperparameters", first, alone),
            architecture=design.architecture,
            protocol=told,
        )


def _whole(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _noted(table: Table, notes: Sequence[Note], kind: str) -> Table:
    """A table with what the files themselves said."""
    names = dict.fromkeys(name for note in notes for name in note.get(kind, ()))
    return {**table, **{name: [note.get(kind, {}).get(name) for note in notes] for name in names}}


def _splits(item: np.ndarray, told: Sequence[str | None] | None, options: ImportOptions) -> np.ndarray:
    """Per checkpoint; where nothing is told it is drawn by item, beside test items that are told without one."""
    if told is None:
        return split_items(item, options.fractions, options.seed)
    split = np.array([SPLITS.index(name) if name else len(SPLITS) for name in told], dtype=np.uint8)
    open_ = split == len(SPLITS)
    if open_.any():
        train, val, test = options.fractions
        if (split == SPLITS.index("test")).any() and train + val > 0:
            train, val, test = train / (train + val), val / (train + val), 0.0
        split[open_] = split_items(item[open_], (train, val, test), options.seed)
    return split


def check_splits(listing: Listing) -> None:
    """Raise DataError when what is of one item, or of one network, is told to be in different splits."""
    population = listing.population or [""] * len(listing.paths)
    for what, keys in (("item", listing.item), ("network", listing.network)):
        if listing.split is None or keys is None:
            continue
        seen: dict[tuple[str, Any], tuple[str | None, str]] = {}
        for name, key, split, path in zip(population, keys, listing.split, listing.paths, strict=True):
            other = seen.setdefault((name, key), (split, path))
            if other[0] != split:
                raise DataError(
                    f"{path} is in {split}, but {other[1]}, of the same {what} {key}, in {other[0]}"
                )
