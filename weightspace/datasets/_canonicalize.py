"""A whole zoo in canonical form: every network sorted, or aligned to one of them; none computes anything else."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from weightspace.align import MATCHED, weight_matching
from weightspace.datasets._dataset import population_names
from weightspace.errors import ConfigError, OutputError, SpecError
from weightspace.spec import Element, WeightSpec
from weightspace.zoo import (
    Population,
    RowStore,
    Zoo,
    check_output,
    largest_change,
    stored_weights,
    verify_digest,
)

METHODS = ("sort", "align")
RECORD = "canonical"  # in the protocol of a population
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BLOCK = 2**20  # weights that are handled at once: 4 MB, a second of alignment
_ROUNDS = 100  # of matching; the second nearly always finds nothing
_SAMPLE = 16  # networks whose outputs are compared


@dataclass(frozen=True)
class CanonicalPopulation:
    """What became of one population.

    Args:
        rows: all that there are.
        networks: of which they are checkpoints.
        moved: rows whose weights are others now.
        kept: rows that stay as they are because they have no canonical form: those with weights that are NaN or
            infinite, or so large that their squares are; and all of a network of which one would become so.
        symmetries: that were taken away.
        reference: row to which the others were aligned; None for ``"sort"``.
        distance_before: mean L2 distance of the parameters to those of the reference, of all rows but those kept;
            None for ``"sort"``.
        distance_after: the same of what was written.
        compared: rows, drawn from those that are finite, whose outputs before and after were compared on random inputs.
        max_relative_change: largest change of their outputs, relative to the largest absolute output; None where the
            zoo does not say how to rebuild the networks.
    """

    rows: int
    networks: int
    moved: int
    kept: int
    symmetries: tuple[str, ...]
    reference: int | None
    distance_before: float | None
    distance_after: float | None
    compared: int
    max_relative_change: float | None


@dataclass(frozen=True)
class CanonicalReport:
    """What :func:`canonicalize_zoo` wrote.

    Args:
        output: the zoo.
        digest: of its content.
        method: ``"sort"`` or ``"align"``.
        seconds: that this call took; what an interrupted one had done is not in it.
        populations: those that were brought into form; others were copied.
    """

    output: Path
    digest: str
    method: str
    seconds: float
    populations: Mapping[str, CanonicalPopulation]


def canonicalize_zoo(
    zoo: str | Path | Zoo,
    output: str | Path,
    *,
    method: str = "sort",
    reference: int | None = None,
    population: str | Sequence[str] | None = None,
    symmetries: Sequence[str] | None = None,
    seed: int = 0,
    block: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CanonicalReport:
    """Write a zoo with every network replaced by an equal one: one that symmetry leaves less choice.

    - ``"sort"``: the canonical form of :func:`weightspace.spec.canonicalize`. It takes away every symmetry of the
      spec, so that equal networks become the same one, and needs no reference.
    - ``"align"``: weight matching (:func:`weightspace.align.weight_matching`) to one network of the population,
      repeated until it finds nothing to gain. It brings networks that only resemble each other close.

    Both are exact: each network is acted on by one element of the spec's group. Permutations and signs keep every
    weight's bits; positive factors and phases, which ``"sort"`` fixes as well, round once in the type of storage.
    Both are idempotent: what was written comes back in the same bits, and with the same digest.

    All checkpoints of a network get the element that its last one needs, so that they stay one trajectory. Rows that
    have no canonical form stay as they are, and are counted. Labels, metrics, splits, stored signals and the recipe
    stay; the protocol of the population says under ``canonical`` what was done.

    What is done is kept in ``OUT.h5.parts`` until the zoo is complete: an interrupted call goes on there. Memory
    does not grow with the number of networks.

    Args:
        zoo: the path of a zoo file, whose digest is checked first, or an open zoo.
        output: the zoo to write.
        method: ``"sort"`` or ``"align"``.
        reference: row that the others are aligned to, which stays as it is; by default the last checkpoint of the
            first network of the training split.
        population: which ones; all by default. Each is aligned within itself, and others are copied.
        symmetries: those to align by, some of :data:`weightspace.align.MATCHED`; by default all that the spec has.
        seed: of the alignment's search.
        block: rows that are handled at once; as many as make a million weights by default.
        overwrite: replace an existing file, and throw away the beginning of other work.
        progress: show a bar.

    Raises:
        ConfigError: an unknown method or population, a symmetry that a population lacks, a reference that is out of
            range or has no finite weights, or an option that the method does not have.
        ZooError: the zoo cannot be opened, or is damaged.
        SpecError: weight matching does not support the spec.
        OutputError: ``output`` is the zoo itself, exists, or cannot be written, or its ``.parts`` hold other work.

    Example:
        >>> import tempfile
        >>> from weightspace.testing import tiny_zoo
        >>> zoo, folder = tiny_zoo(networks=4), Path(tempfile.mkdtemp())
        >>> report = canonicalize_zoo(zoo, folder / "sorted.h5", progress=False)
        >>> report.populations["inr"].symmetries, report.populations["inr"].moved
        (('permutation', 'sign', 'phase'), 4)
        >>> again = canonicalize_zoo(folder / "sorted.h5", folder / "again.h5", progress=False)
        >>> again.populations["inr"].moved, again.digest == report.digest
        (0, True)
    """
    start = time.perf_counter()
    _check_options(method, reference, symmetries, seed, block)
    opened = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    names = _names(opened, population, reference)
    output = Path(output)
    _check_output(opened, output, overwrite=overwrite)
    digest = opened.digest if opened.path is None else verify_digest(opened.path)
    asked = _Asked(method, reference, symmetries, seed)
    parts = [_Part.of(name, opened[name], asked) for name in names]
    work = {
        "command": "canonicalize",
        "zoo": digest,
        "method": method,
        "seed": seed,
        "symmetries": {part.name: part.form.symmetries for part in parts},
        "reference": {part.name: part.form.row for part in parts},
    }
    with RowStore(output, work, overwrite=overwrite) as store:
        _fill(store, parts, block, progress)
        digest = store.finish(partial(_canonical, opened, parts))
    written = Zoo.open(output)
    found = {part.name: _told(part, written[part.name], store.notes, seed) for part in parts}
    return CanonicalReport(output, digest, method, time.perf_counter() - start, found)


# -- what is asked -----------------------------------------------------------------------------------------


def _check_options(
    method: str, reference: int | None, symmetries: Sequence[str] | None, seed: int, block: int | None
) -> None:
    if method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    for name, value in {"reference": reference, "symmetries": symmetries}.items():
        if method == "sort" and value is not None:
            raise ConfigError(f"{name}: only method 'align' has one, found {value!r} with method 'sort'")
    for name, number, least in (("seed", seed, 0), ("block", 1 if block is None else block, 1)):
        if number < least:
            raise ConfigError(f"{name}: expected at least {least}, found {number}")


def _names(zoo: Zoo, population: str | Sequence[str] | None, reference: int | None) -> tuple[str, ...]:
    if population is None:
        names = tuple(zoo)
    elif isinstance(population, str):
        names = population_names(zoo, population)
    else:
        names = tuple(dict.fromkeys(population))
        for name in names:
            zoo[name]  # refuses one that is not there
    if not names or (reference is not None and len(names) > 1):
        why = "one with a reference" if names else "at least one"
        raise ConfigError(f"population: expected {why}, found {', '.join(names) or 'none'}")
    return names


def _check_output(zoo: Zoo, output: Path, *, overwrite: bool) -> None:
    if zoo.path is not None and output.exists() and output.samefile(zoo.path):
        raise OutputError(f"output: {output} is the zoo itself; choose another name")
    check_output(output, overwrite=overwrite)


# -- the two forms -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sorted:
    """The canonical form of each network."""

    spec: WeightSpec
    symmetries: tuple[str, ...]
    reference: None = None
    row: None = None

    @property
    def record(self) -> dict[str, Any]:
        """How it was done, for the protocol."""
        return {"method": "sort", "symmetries": list(self.symmetries)}

    def __call__(self, flat: Tensor) -> tuple[Tensor, Element]:
        """Networks, (networks, P), in form, and the elements that bring them there.

        A network whose factors overflow or vanish in the type of storage is refused, and its whole batch with it: such
        batches are halved until it is found. It comes back as NaN.
        """
        try:
            canonical, element = self.spec.canonicalize(self.spec.unflatten(flat))
        except SpecError:
            if len(flat) > 1:
                (one, first), (other, second) = (self(half) for half in flat.tensor_split(2))
                return torch.cat([one, other]), {
                    name: torch.cat([first[name], second[name]]) for name in first
                }
            nothing = {name: value[None] for name, value in self.spec.identity().items()}
            return torch.full_like(flat, torch.nan), nothing
        return self.spec.flatten(canonical), element


@dataclass(frozen=True, eq=False)
class _Aligned:
    """What weight matching to one network, ``reference``, leaves as it is; ``row`` is where that stands."""

    spec: WeightSpec
    symmetries: tuple[str, ...]
    reference: Tensor
    row: int
    seed: int
    digest: str

    @property
    def record(self) -> dict[str, Any]:
        """How it was done, with nothing of the zoo it was done to: what is in form already keeps its digest."""
        return {
            "method": "align",
            "symmetries": list(self.symmetries),
            "reference": {"row": self.row, "digest": self.digest},
            "seed": self.seed,
        }

    def __call__(self, flat: Tensor) -> tuple[Tensor, Element]:
        """Match until nothing moves: what was matched once may be matched better from where it stands."""
        aligned, todo = flat.clone(), torch.arange(len(flat))
        element = {
            name: value.repeat(len(flat), *[1] * value.ndim) for name, value in self.spec.identity().items()
        }
        for _ in range(_ROUNDS):  # each gains, were it not for rounding
            if not len(todo):
                break
            before = aligned[todo]
            after, move = self.matched(before)
            moved = _differ(after, before)  # others keep the signs of their zeros, too
            todo = todo[moved]
            aligned[todo] = after[moved]
            old = {name: value[todo] for name, value in element.items()}
            for name, value in self.spec.compose({k: v[moved] for k, v in move.items()}, old).items():
                element[name][todo] = value
        return aligned, element

    def matched(self, flat: Tensor) -> tuple[Tensor, Element]:
        """Networks, (networks, P), matched once.

        Raises:
            SpecError: weight matching does not support the spec.
        """
        aligned, report = weight_matching(
            self.spec,
            self.spec.unflatten(self.reference),
            self.spec.unflatten(flat),
            symmetries=self.symmetries,
            seed=self.seed,
        )
        return self.spec.flatten(aligned), {name: value.clone() for name, value in report.element.items()}


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Which rows do."""
    return (one != other).any(-1).nonzero()[:, 0]


@dataclass(frozen=True)
class _Asked:
    """The options of a call, as :func:`canonicalize_zoo` describes them."""

    method: str
    reference: int | None
    symmetries: Sequence[str] | None
    seed: int

    def form(
        self, name: str, population: Population, good: np.ndarray, leader: np.ndarray
    ) -> _Sorted | _Aligned:
        """What a population is brought into, where some rows are good, and one leads each network."""
        if self.method == "sort":
            return _Sorted(population.spec, population.spec.symmetries)
        kinds = self._kinds(name, population.spec)
        row = _first(name, population, leader) if self.reference is None else self.reference
        if not 0 <= row < population.rows:
            raise ConfigError(
                f"reference: expected a row of population {name!r}, 0 .. {population.rows - 1}, found {row}"
            )
        if not good[row]:
            raise ConfigError(f"reference: row {row} of population {name!r} has weights that are not finite")
        digest = hashlib.sha256(np.ascontiguousarray(population.weights[row]).tobytes()).hexdigest()
        reference = _read(population, row)
        form = _Aligned(population.spec, kinds, reference, row, self.seed, f"sha256:{digest}")
        form.matched(reference[None])  # which raises where matching does not support the spec
        return form

    def _kinds(self, name: str, spec: WeightSpec) -> tuple[str, ...]:
        """The symmetries to align by."""
        matched = tuple(kind for kind in MATCHED if kind in spec.symmetries)
        if self.symmetries is None:
            return matched or MATCHED[:1]  # without any, all stays as it is
        asked = (self.symmetries,) if isinstance(self.symmetries, str) else self.symmetries
        wrong = [kind for kind in asked if kind not in matched]
        if wrong or not asked:
            found = repr(wrong[0]) if wrong else "none"
            raise ConfigError(
                f"symmetries: population {name!r} can be aligned by {', '.join(matched) or 'none'}, found {found}"
            )
        return tuple(kind for kind in matched if kind in asked)


def _first(name: str, population: Population, leader: np.ndarray) -> int:
    """The last checkpoint of the first network of the training split, or of all where that has none."""
    for split in ("train", None):
        found = leader[population.network[population.rows_of(split)]]
        if (found >= 0).any():
            return int(found[found >= 0][0])
    raise ConfigError(f"reference: population {name!r} has no row with finite weights")


# -- rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """One population on its way.

    Args:
        name: of it.
        population: as it is.
        order: the rows with finite weights, in the order of their networks.
        leader: (networks,) the row that decides for all of its network; -1 where none is good.
        form: to bring them into.
        counts: (P,) which weights are parameters.
    """

    name: str
    population: Population
    order: np.ndarray
    leader: np.ndarray
    form: _Sorted | _Aligned
    counts: Tensor

    @classmethod
    def of(cls, name: str, population: Population, asked: _Asked) -> _Part:
        good = _good(population)
        leader = _leaders(population, good)
        form = asked.form(name, population, good, leader)
        if form.row is not None:
            leader[population.network[form.row]] = form.row  # or the reference itself would be aligned
        tensors = population.spec.tensors.items()
        counts = {key: torch.full(tensor.shape, tensor.kind == "parameter") for key, tensor in tensors}
        order = np.flatnonzero(good)
        order = order[np.argsort(population.network[order], kind="stable")]
        return cls(name, population, order, leader, form, population.spec.flatten(counts))

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Rows as they are to be stored, and what is to be told of them."""
        rows, before, after = self._moved(start, stop)
        stored = np.array(self.population.weights[start:stop])
        stored[rows - start] = stored_weights(after.float().numpy(), self.population.dtype)
        note = {
            "population": self.name,
            "moved": len(_differ(after, before)),
            "kept": stop - start - len(rows),
            "before": self._distance(before),
            "after": self._distance(after),
        }
        return stored, note

    def _moved(self, start: int, stop: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """Those rows of a block that have a canonical form, as they are and in it.

        All checkpoints of their networks are looked at, wherever they stand: one that would not stay finite keeps its
        whole network as it is.
        """
        spec = self.population.spec
        networks = np.unique(self.population.network[start:stop])
        networks = networks[self.leader[networks] >= 0]
        rows, which = self._checkpoints(networks)
        before = _read(self.population, rows)
        if not len(rows):
            return rows, before, before
        formed, element = self.form(_read(self.population, self.leader[networks]))
        after = spec.flatten(spec.act({k: v[which] for k, v in element.items()}, spec.unflatten(before)))
        leads = rows == self.leader[networks][which]
        after[leads] = formed[which[leads]]  # to the bit, where acting would round once more
        broken = np.zeros(len(networks), dtype=bool)
        broken[which[~_is_finite(after)]] = True
        here = (rows >= start) & (rows < stop) & ~broken[which]
        return rows[here], before[here], after[here]

    def _checkpoints(self, networks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The good rows of some networks, one network after the other, and which of the networks each belongs to."""
        first, last = (
            np.searchsorted(self.population.network[self.order], networks, side=side)
            for side in ("left", "right")
        )
        counts = last - first
        which = np.repeat(np.arange(len(networks)), counts)
        return self.order[(first - np.cumsum(counts) + counts)[which] + np.arange(counts.sum())], which

    def _distance(self, flat: Tensor) -> float:
        """Summed over the rows, from the reference."""
        if self.form.reference is None:
            return 0.0
        difference = flat[:, self.counts].double() - self.form.reference[self.counts].double()
        return float(difference.norm(dim=-1).sum())


def _good(population: Population) -> np.ndarray:
    """Which rows have finite weights, (rows,)."""
    return np.concatenate(
        [_is_finite(population.read(slice(start, stop))) for start, stop in _blocks(population)]
    )


def _is_finite(flat: Tensor) -> np.ndarray:
    """Which networks, (networks, P), have weights that are finite, and so are their squares, which distances need."""
    return flat.float().norm(dim=-1).isfinite().numpy()


def _leaders(population: Population, good: np.ndarray) -> np.ndarray:
    """The last good row of each network, (networks,); -1 where there is none."""
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(population.step[rows], kind="stable")]
    leader = np.full(population.networks, -1, dtype=np.int64)
    leader[population.network[rows]] = rows  # of several, the last stays
    return leader


def _blocks(population: Population, block: int | None = None, *, first: int = 0) -> Iterator[tuple[int, int]]:
    size = block or max(1, _BLOCK // max(1, population.spec.num_parameters))
    return ((start, min(start + size, population.rows)) for start in range(first, population.rows, size))


def _read(population: Population, rows: int | np.ndarray) -> Tensor:
    """Flattened weights in the type of storage: rounded to it, what is in form already stays so."""
    return population.read(rows).to(_DTYPES[population.dtype])


def _fill(store: RowStore, parts: Sequence[_Part], block: int | None, progress: bool) -> None:
    """Append all rows that are not there yet, one population after the other."""
    total, first = sum(part.population.rows for part in parts), 0
    with tqdm(
        total=total,
        initial=store.done,
        unit=" rows",
        desc="canonicalize",
        disable=not progress,
        file=sys.stderr,
    ) as bar:
        for part in parts:
            done = min(max(store.done - first, 0), part.population.rows)
            for start, stop in _blocks(part.population, block, first=done):
                rows, note = part.rows(start, stop)
                store.append({part.name: rows}, [note])
                bar.update(stop - start)
            first += part.population.rows


# -- the zoo, and what is told of it -----------------------------------------------------------------------


def _canonical(zoo: Zoo, parts: Sequence[_Part], rows: Mapping[str, np.ndarray]) -> Zoo:
    """The zoo with other weights, and the record of what was done."""
    populations = dict(zoo.populations)
    for part in parts:
        protocol = {**part.population.protocol, RECORD: part.form.record}
        populations[part.name] = replace(part.population, weights=rows[part.name], protocol=protocol)
    return Zoo(populations, zoo.sources, zoo.recipe)


def _told(
    part: _Part, written: Population, notes: Sequence[Mapping[str, Any]], seed: int
) -> CanonicalPopulation:
    mine = [note for note in notes if note["population"] == part.name]
    sums = {key: sum(note[key] for note in mine) for key in ("moved", "kept", "before", "after")}
    formed = part.population.rows - sums["kept"]
    aligned = part.form.reference is not None
    sample = np.random.default_rng(seed).choice(part.order, min(_SAMPLE, len(part.order)), replace=False)
    change = largest_change(part.population, written, sample, seed=seed)
    return CanonicalPopulation(
        rows=part.population.rows,
        networks=part.population.networks,
        moved=sums["moved"],
        kept=sums["kept"],
        symmetries=part.form.symmetries,
        reference=part.form.row,
        distance_before=sums["before"] / formed if aligned else None,
        distance_after=sums["after"] / formed if aligned else None,
        compared=0 if change is None else len(sample),
        max_relative_change=change,
    )
