"""From any layout to a zoo: validate, read, keep what was read, write. Formats say only what they look like."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from weightspace.configuration import validated
from weightspace.errors import ConfigError, DataError
from weightspace.zoo._files import canonical_json, check_output
from weightspace.zoo._row_store import RowStore
from weightspace.zoo._zoo import SPLITS, Population, Zoo, split_items
from weightspace.zoo.transfer._assemble import assemble, check_splits
from weightspace.zoo.transfer._importer import IMPORTERS, Block, Importer, Note
from weightspace.zoo.transfer._listing import Listing, Problem
from weightspace.zoo.transfer._splits import apply_splits

_NAMED = 10  # what was left out and is named in the report


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        output: the zoo.
        format: of the source.
        digest: of the zoo's content.
        populations: names and numbers of networks.
        networks: in the zoo.
        rows: in the zoo, one for each checkpoint.
        splits: networks in each.
        skipped: files, or lines of tables, that were left out.
        skipped_first: the first of them, each with the reason.
        read: checkpoints that this call read.
        seconds: that this call took.
        rows_per_second: of those that this call read.
    """

    output: Path
    format: str
    digest: str
    populations: dict[str, int]
    networks: int
    rows: int
    splits: dict[str, int]
    skipped: int
    skipped_first: list[str]
    read: int
    seconds: float
    rows_per_second: float


def import_zoo(
    format: str,
    source: str | Path,
    output: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    splits: str | Path | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ImportReport:
    """Bring networks from another layout into a zoo; the same call resumes what was interrupted.

    Nothing is unpickled, whatever a file says. Memory does not grow with the weights: what was read waits in
    ``<output>.parts``.

    Args:
        format: a name in ``IMPORTERS``.
        source: the folder.
        output: the zoo to write.
        options: fields of the format's options, such as ``w0`` of coordinate networks.
        splits: JSON of which networks are in ``train``, ``val`` and ``test``; by default what the layout says, and
            otherwise items are drawn.
        skip_bad: leave out files that are damaged, hold numbers that are not finite, or do not fit to the others or to
            the tables, and count them; otherwise the first one ends the import.
        overwrite: replace an existing zoo, or the beginning of another import.
        progress: show a bar on standard error.

    Raises:
        ConfigError: an unknown format or option.
        DataError: the source is missing or of another layout, or a file of it is bad.
        OutputError: the output exists, is being written by another process, or cannot be written.
    """
    begun = time.perf_counter()
    source, output = Path(source), Path(output)
    importer = make_importer(format, source, options, skip_bad=skip_bad)
    check_output(output, overwrite=overwrite)
    listing = _listed(importer, None if splits is None else Path(splits))
    work = _work(importer, listing, splits)
    with RowStore(output, work, overwrite=overwrite) as store:
        done = len(store.notes)
        _meet_again(importer, listing, store.notes)
        _read_all(importer, listing, store, progress)
        skipped = _skipped(listing, store.notes)
        recipe = _recipe(importer, splits, skipped)
        zoo_of = _Maker(importer, listing, store.notes, recipe)
        digest = store.finish(zoo_of)
    seconds = time.perf_counter() - begun
    return _report(output, importer, digest, zoo_of.zoo, skipped, len(listing.paths) - done, seconds)


def make_importer(
    format: str, source: Path, options: Mapping[str, Any] | None = None, *, skip_bad: bool = False
) -> Importer:
    """The importer of a format, with options that were checked, of a source that is there.

    Raises:
        ConfigError: an unknown format or option.
        DataError: the source is missing, or of another kind.
    """
    if format not in IMPORTERS:
        raise ConfigError(f"format: expected one of {', '.join(IMPORTERS)}, found {format!r}")
    kind = IMPORTERS[format]
    chosen = validated(
        kind.options_type, options or {}, ConfigError, "", f"unknown option of format {format}"
    )
    split_items(np.zeros(1, dtype=np.int64), chosen.fractions, chosen.seed)  # refuses fractions that are none
    importer = kind(source, chosen, skip_bad=skip_bad)
    importer.check_source()
    return importer


# -- before the work ---------------------------------------------------------------------------------------


def _listed(importer: Importer, splits: Path | None) -> Listing:
    listing = importer.listing()
    if not listing.paths and not listing.problems:
        raise importer.nothing()
    if splits is not None:
        listing = apply_splits(listing, splits)
    listing = _without_duplicates(listing)
    if listing.problems and not importer.skip_bad:
        first, more = listing.problems[0], len(listing.problems) - 1
        others = f" (and {more:,} more such problems)" if more else ""
        raise DataError(
            f"source {importer.source}: {first.name}: {first.reason}{others}; --skip-bad leaves out what does not fit"
        )
    if not listing.paths:
        raise importer.nothing()
    for name in {*(listing.population or ()), getattr(importer.options, "population", "networks")}:
        if not name or name == "." or "/" in name:
            raise DataError(
                f"population: expected a name that is not empty, '.' or with a '/', found {name!r}"
            )
    check_splits(listing)
    return listing


def _without_duplicates(listing: Listing) -> Listing:
    """The first of those that are called the same."""
    count = len(listing.paths)
    network = listing.network if listing.network is not None else listing.paths
    step = listing.step or [0] * count
    view = listing.view or [0] * count
    population = listing.population or [""] * count
    seen: dict[Any, int] = {}
    kept, problems = [], []
    for place in range(count):
        keys: list[Any] = [(network[place], step[place])]
        what = f"network {network[place]}, step {step[place]}"
        if listing.item is not None:
            keys.append((population[place], listing.item[place], view[place], step[place]))
            what = f"item {listing.item[place]}, view {view[place]}"
        other = next((seen[key] for key in keys if key in seen), None)
        if other is None:
            kept.append(place)
            seen.update(dict.fromkeys(keys, place))
        else:
            problems.append(
                Problem(listing.paths[place], f"{what} twice: it is {listing.paths[other]} as well")
            )
    return replace(listing, problems=listing.problems + problems).take(kept) if problems else listing


def _work(importer: Importer, listing: Listing, splits: str | Path | None) -> dict[str, Any]:
    """All that the rows depend on."""
    digest = hashlib.sha256()
    for each in fields(listing):
        value = getattr(listing, each.name)
        if each.name == "problems":
            value = [[problem.name, problem.reason] for problem in value]
        digest.update(canonical_json({each.name: _plain(value)}).encode())
    return {
        "command": "import",
        "format": importer.format,
        "options": importer.options.model_dump(mode="json"),
        "skip_bad": importer.skip_bad,
        "splits": None if splits is None else Path(splits).name,
        "source": str(importer.source.resolve()),
        "checkpoints in the source": len(listing.paths),
        "listing of the source": digest.hexdigest(),
    }


def _stamp(path: str | Path) -> str:
    """What shows that a file is no longer what it was."""
    try:
        found = os.stat(path)
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(column) for name, column in value.items()}
    return value


# -- the work ----------------------------------------------------------------------------------------------


def _meet_again(importer: Importer, listing: Listing, notes: Sequence[Note]) -> None:
    """The designs of populations of which there are rows already, in the same order.

    Raises:
        DataError: a file has changed since it was read.
    """
    seen: set[str] = set()
    for place, note in enumerate(notes):
        if note["file"] != _stamp(importer.file(listing, place)):
            raise DataError(
                f"{importer.source / listing.paths[place]}: has changed since it was read; --overwrite begins anew"
            )
        name = note.get("population")
        if name is not None and name not in seen:
            seen.add(name)
            importer.meet(listing, place)


def _read_all(importer: Importer, listing: Listing, store: RowStore, progress: bool) -> None:
    total, done = len(listing.paths), len(store.notes)
    with tqdm(
        total=total, initial=done, unit=" networks", desc="import", file=sys.stderr, disable=not progress
    ) as bar:
        for block in importer.blocks(listing, done):
            at = len(store.notes)
            finite = _finite(block, importer, listing, at)
            stamped = [
                {**note, "file": _stamp(importer.file(listing, place))}
                for place, note in enumerate(finite.notes, at)
            ]
            store.append(finite.rows, stamped)
            bar.update(len(stamped))
    if store.done == 0:
        raise DataError(f"source {importer.source}: none of {total:,} checkpoints can be imported")


def _finite(block: Block, importer: Importer, listing: Listing, start: int) -> Block:
    """The block without networks that are NaN somewhere, which are bad."""
    wrong = {name: ~np.isfinite(rows).all(axis=1) for name, rows in block.rows.items()}
    if not any(found.any() for found in wrong.values()):
        return block
    notes = list(block.notes)
    for name, found in wrong.items():
        places = [at for at, note in enumerate(notes) if note.get("population") == name]
        for at in np.flatnonzero(found):
            path = listing.paths[start + places[at]]
            if not importer.skip_bad:
                raise DataError(
                    f"{importer.source / path}: weights that are NaN or infinite; --skip-bad leaves such files out"
                )
            notes[places[at]] = {"bad": "weights that are NaN or infinite"}
    return Block({name: rows[~wrong[name]] for name, rows in block.rows.items()}, notes)


def _skipped(listing: Listing, notes: Sequence[Note]) -> list[str]:
    """What was left out, and why."""
    listed = [f"{problem.name}: {problem.reason}" for problem in listing.problems]
    bad = [f"{listing.paths[place]}: {note['bad']}" for place, note in enumerate(notes) if "bad" in note]
    return listed + bad


def _recipe(importer: Importer, splits: str | Path | None, skipped: Sequence[str]) -> dict[str, Any]:
    """How the zoo was made, for itself."""
    return {
        "name": f"import {importer.format}",
        "format": importer.format,
        "folder": importer.source.resolve().name,
        "options": importer.options.model_dump(mode="json"),
        "splits": None if splits is None else Path(splits).name,
        "skipped": len(skipped),
    }


class _Maker:
    """Makes the zoo, once the rows are there, and keeps it for the report."""

    def __init__(
        self, importer: Importer, listing: Listing, notes: Sequence[Note], recipe: Mapping[str, Any]
    ) -> None:
        self.importer, self.listing, self.notes, self.recipe = importer, listing, notes, recipe
        self.zoo = Zoo({})

    def __call__(self, rows: Mapping[str, np.ndarray]) -> Zoo:
        importer = self.importer
        protocol = {"imported_from": importer.format, "step_unit": importer.step_unit}
        self.zoo = assemble(
            self.listing, self.notes, rows, importer.designs, importer.options, protocol, self.recipe
        )
        return self.zoo


def _report(
    output: Path, importer: Importer, digest: str, zoo: Zoo, skipped: Sequence[str], read: int, seconds: float
) -> ImportReport:
    populations: list[Population] = list(zoo.populations.values())
    splits = {
        name: int(sum((population.split == at).sum() for population in populations))
        for at, name in enumerate(SPLITS)
    }
    return ImportReport(
        output=output,
        format=importer.format,
        digest=digest,
        populations={name: population.networks for name, population in zoo.populations.items()},
        networks=sum(population.networks for population in populations),
        rows=sum(population.rows for population in populations),
        splits=splits,
        skipped=len(skipped),
        skipped_first=list(skipped[:_NAMED]),
        read=read,
        seconds=seconds,
        rows_per_second=read / seconds,
    )
