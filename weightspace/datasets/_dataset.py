"""A zoo as a PyTorch data set: weights in, labels out, whole batches at a time."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data._utils.collate import default_collate_fn_map  # PyTorch's documented hook for collating

from weightspace.datasets._coordinates import signal_of
from weightspace.datasets._siblings import Siblings
from weightspace.datasets.augment import Augmentation, Batch, Draws, Signal
from weightspace.errors import ConfigError, TaskError
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo import SPLITS, Population, Zoo, rows_where, split_items


@dataclass(frozen=True)
class _Whole:
    """A batch that is whole already: collating it means unwrapping it."""

    weights: Weights
    targets: Tensor


def _unwrap(batch: Sequence[_Whole], **_: Any) -> tuple[Weights, Tensor]:
    return batch[0].weights, batch[0].targets


default_collate_fn_map[_Whole] = _unwrap


ALL = "all"


class ZooDataset(Dataset[tuple[Weights, Tensor]]):
    """Networks of a zoo and what is to be predicted of them.

    ``dataset[i]`` is ``(Weights, target)``. A plain ``DataLoader`` reads whole batches with one gather from
    the mapped file, and augments them as a batch.

    Args:
        zoo: the path of a zoo file, or an open zoo.
        split: ``"train"``, ``"val"``, ``"test"``, or None for all networks.
        target: name of a label or hyperparameter (per network) or of a metric (per row); with None the targets are
            the numbers of the rows.
        population: which one, for zoos with several.
        augment: applied to each batch that is read; see :mod:`weightspace.datasets.augment`.
        seed: of the augmentation: the random numbers of a network depend on it, on ``epoch`` and on its row, not on
            what else is in the batch.
        fractions: draw the splits anew: share of the source items in train, val and test. The zoo's own
            splits are used by default. Either way all networks of one item share a split.
        split_seed: of splits that are drawn anew.
        skip_bad: leave out rows of which a weight or the target is NaN or infinite: one diverged network would
            spoil the batch statistics of all others. Otherwise they are refused.
        where: which rows are used, such as ``"test_accuracy > 0.3 and epoch == last"``; see
            :func:`weightspace.zoo.rows_where`. All of the split without one.
        sequences: whether a member is the trajectory of one network, its rows in the order of their steps, instead of
            one row. Weights then have a leading axis of checkpoints, and so have targets that are metrics; labels and
            hyperparameters are one per network. Networks with fewer rows than others repeat their last one, and
            ``lengths`` says how many there are. Augmentations by symmetries draw one element per trajectory.

    Attributes:
        spec: the weight space.
        population: from which the networks are read.
        rows: (len,) int64 numbers of rows in the population; (len, checkpoints) for sequences.
        lengths: (len,) int64, rows that the members have of their own: all 1 without sequences.
        targets: (len, ...) what is to be predicted, by default the target by name; a task may put others there.
        classes: number of classes where targets are class numbers, for augmentations that mix or smooth them.
        copies: how often each network is in a batch, augmented anew each time: a batch of 64 networks becomes one of
            ``64 copies``, all of the first copies before all of the second.
        skipped: number of rows left out because they are bad.
        epoch: set it before each pass to draw new augmentations and another order (workers that are kept
            alive between passes do not see the change).

    Raises:
        ZooError: the file cannot be opened.
        TaskError: the zoo has no such target, no networks in the split, or bad ones that are not to be skipped.
        ConfigError: an unknown split, a zoo with several populations and none named, or a ``where`` that is no
            expression of its kind or holds for no row of the split.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> dataset = ZooDataset(tiny_zoo(networks=10), split=None)
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=4)
        >>> weights, labels = next(iter(loader))
        >>> weights["layers.0.weight"].shape, labels.shape
        (torch.Size([4, 8, 2]), torch.Size([4]))
    """

    def __init__(
        self,
        zoo: str | Path | Zoo,
        split: str | None = "train",
        *,
        target: str | None = "label",
        population: str | None = None,
        augment: Augmentation | None = None,
        seed: int = 0,
        fractions: tuple[float, float, float] | None = None,
        split_seed: int = 0,
        skip_bad: bool = True,
        where: str | None = None,
        sequences: bool = False,
    ) -> None:
        self.zoo = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
        self.population = choose_population(self.zoo, population)
        self.spec: WeightSpec = self.population.spec
        self.split, self.target, self.seed = split, target, seed
        self.epoch, self.copies = 0, 1
        self.where, self.sequences = where, sequences
        self.rows = _rows(self.population, split, fractions, split_seed, where)
        self.targets = _targets(self.population, target, self.rows)
        good = self._good(skip_bad)
        self.skipped = int((~good).sum())
        self.rows, self.targets = self.rows[good], self.targets[torch.from_numpy(good)]
        if len(self.rows) == 0:
            raise TaskError(f"zoo {self.zoo.path or ''}: no networks with finite weights in split {split!r}")
        self.lengths = torch.ones(len(self.rows), dtype=torch.int64)
        if sequences:
            self._gather_trajectories()
        self._resident: Tensor | None = None
        self.classes = _classes(self.population, target)
        self.augment = augment

    @property
    def augment(self) -> Augmentation | None:
        """Applied to each batch that is read.

        Raises:
            ConfigError: when it is set, and does not suit the weight space or the targets.
        """
        return self._augment

    @augment.setter
    def augment(self, value: Augmentation | None) -> None:
        if value is not None:
            value.check(self._batch(np.arange(min(2, len(self)))))
        self._augment = value

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def populations(self) -> tuple[Population, ...]:
        """From which the networks are read: one, unlike those of :class:`PopulationsDataset`."""
        return (self.population,)

    def __getitem__(self, index: int) -> tuple[Weights, Tensor]:
        batch = self.read([index])
        return {name: tensor[0] for name, tensor in batch[0].items()}, batch[1][0]

    def __getitems__(self, indices: Sequence[int]) -> list[_Whole]:
        """What a ``DataLoader`` calls: the whole batch at once."""
        return [_Whole(*self.read(indices))]

    def read(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Weights, Tensor]:
        """The batch of the given members, augmented."""
        positions = np.asarray(indices, dtype=np.int64)
        if positions.size and not -len(self) <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"dataset of {len(self)}: expected indices below it, found {positions.max()}")
        positions = positions % len(self)
        batch = self._batch(positions)
        if self.copies > 1:
            return _joined([_pair(self._augmented(batch, positions, copy)) for copy in range(self.copies)])
        return _pair(self._augmented(batch, positions))

    def batches(
        self, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, seed: int = 0
    ) -> Iterator[tuple[Weights, Tensor]]:
        """Iterate over batches without a ``DataLoader``, which costs more than the reading."""
        order = self.order(seed) if shuffle else torch.arange(len(self))
        for chunk in order.split(batch_size):
            if not (drop_last and len(chunk) < batch_size):
                yield self.read(chunk.numpy())

    def order(self, seed: int = 0) -> Tensor:
        """A random order of all members, keyed by ``seed`` and ``epoch``."""
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(key(seed, self.epoch)))

    def to(self, device: torch.device | str) -> ZooDataset:
        """Keep all weights and targets in the memory of ``device``, and draw augmentations there."""
        self._resident = self.population.read(self.rows).to(device)
        self.targets = self.targets.to(device)
        return self

    def _gather_trajectories(self) -> None:
        """Rows become (networks, checkpoints), short trajectories repeating their last row; targets likewise."""
        network = self.population.network[self.rows]
        order = np.lexsort((self.population.step[self.rows], network))
        _, starts, lengths = np.unique(network[order], return_index=True, return_counts=True)
        place = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        members = order[starts[:, None] + place]
        of_rows = self.target is None or self.target in _of_rows(self.population)
        self.targets = self.targets[torch.from_numpy(members if of_rows else members[:, 0])]
        self.rows, self.lengths = self.rows[members], torch.from_numpy(lengths)

    def _good(self, skip_bad: bool) -> np.ndarray:
        """Which rows are finite, and so is what is to be predicted of them.

        Raises:
            TaskError: some are not, and they are not to be skipped.
        """
        weights, targets = _finite(self.population, self.rows), self.targets.isfinite().numpy()
        good: np.ndarray = weights & targets
        if not skip_bad and not good.all():
            what = f"target {self.target!r}" if weights.all() else "weights"
            bad = self.rows[~(targets if weights.all() else weights)]
            named = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise TaskError(
                f"zoo {self.zoo.path or ''}: NaN or infinite {what} in {_counted(len(bad), 'row')} of split "
                f"{self.split or 'all'}: {named}; --skip-bad leaves such rows out"
            )
        return good

    def _flat(self, positions: np.ndarray) -> Tensor:
        if self._resident is not None:
            return self._resident[torch.as_tensor(positions, device=self._resident.device)]
        return self.population.read(self.rows[positions])

    def _batch(self, positions: np.ndarray) -> Batch:
        """Members as they are stored."""
        return Batch(
            self.spec,
            self.spec.unflatten(self._flat(positions)),
            self.targets[torch.as_tensor(positions, device=self.targets.device)],
            self.classes,
            self._signal,
            self._siblings.of(self._flat, self.spec, positions) if self._siblings is not None else None,
        )

    def _augmented(self, batch: Batch, positions: np.ndarray, copy: int = 0) -> Batch:
        """Random numbers are keyed by what is read, so that the number of workers decides nothing."""
        if self._augment is None:
            return batch
        rows = torch.as_tensor(self.rows[positions].reshape(len(positions), -1)[:, 0], device=batch.device)
        seed = key(self.seed, copy) if copy else self.seed
        return self._augment.apply(batch, Draws.for_items(rows, seed=seed, epoch=self.epoch))

    @cached_property
    def _signal(self) -> Signal:
        return signal_of(self.zoo, self.population)

    @cached_property
    def _siblings(self) -> Siblings | None:
        """Who is another view of whom; None where nobody is, or where targets differ between views."""
        first = self.rows.reshape(len(self), -1)[:, 0]
        items = self.population.source[self.population.network[first]]
        if self.target is not None:
            values = target_values(self.population, self.target, first)
            if self.target in _of_rows(self.population) or values is None or _differ(values.numpy(), items):
                return None
        return Siblings.among(items, self.population.network[first])


def key(seed: int, epoch: int, positions: np.ndarray | None = None) -> int:
    """63 bits that differ when any of the arguments does."""
    content = b"" if positions is None else positions.tobytes()
    digest = hashlib.blake2b(content, digest_size=8, salt=struct.pack("<qq", seed, epoch)).digest()
    return int.from_bytes(digest, "little") >> 1


def _finite(population: Population, rows: np.ndarray, block: int = 4096) -> np.ndarray:
    """Which rows have only finite weights."""
    blocks = (rows[start : start + block] for start in range(0, len(rows), block))
    found = [population.read(part).isfinite().all(dim=-1).numpy() for part in blocks]
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)


def _differ(values: np.ndarray, items: np.ndarray) -> bool:
    """Whether members of one item have different values."""
    _, first, number = np.unique(items, return_index=True, return_inverse=True)
    return bool((values != values[first][number]).any())


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _pair(batch: Batch) -> tuple[Weights, Tensor]:
    assert isinstance(batch.targets, Tensor)
    return batch.weights, batch.targets


def _joined(copies: Sequence[tuple[Weights, Tensor]]) -> tuple[Weights, Tensor]:
    """Several batches as one."""
    weights = {name: torch.cat([copy[0][name] for copy in copies]) for name in copies[0][0]}
    return weights, torch.cat([copy[1] for copy in copies])


def _classes(population: Population, target: str | None) -> int | None:
    """How many classes the whole population has, by its largest label; None for other targets."""
    labels = population.labels.get(target) if target is not None else None
    if labels is None or labels.dtype.kind != "i" or not len(labels) or labels.min() < 0:
        return None
    return int(labels.max()) + 1


def population_names(zoo: Zoo, chosen: str | None) -> tuple[str, ...]:
    """The populations that a text names: one, several between commas, or ``"all"``; None for the only one.

    Raises:
        ConfigError: none is named, and there are several.
        ZooError: there is none of that name.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> population_names(tiny_zoo(), "all")
        ('inr',)
    """
    if chosen is None and len(zoo.populations) > 1:
        raise ConfigError(f"population: the zoo has several, name one of {', '.join(zoo)}")
    if chosen is None or (chosen == ALL and ALL not in zoo.populations):
        return tuple(zoo)
    if chosen in zoo.populations:
        return (chosen,)
    names = tuple(dict.fromkeys(name.strip() for name in chosen.split(",")))
    for name in names:
        zoo[name]  # refuses one that is not there
    return names


def choose_population(zoo: Zoo, population: str | None) -> Population:
    """The named population, or the only one.

    Raises:
        ConfigError: none is named, and there are several, or several are.
        ZooError: there is none of that name.
    """
    names = population_names(zoo, population)
    if len(names) > 1:
        raise ConfigError(f"population: expected one of {', '.join(zoo)}, found {population!r}")
    return zoo[names[0]]


def _rows(
    population: Population,
    split: str | None,
    fractions: tuple[float, float, float] | None,
    split_seed: int,
    where: str | None,
) -> np.ndarray:
    rows = rows_of_split(population, split, fractions, split_seed)
    if not where:
        return rows
    found = rows_where(population, where)
    kept = np.intersect1d(rows, found, assume_unique=True)
    if len(kept) == 0 < len(rows):
        raise ConfigError(
            f"where: {where!r} holds for {_counted(len(found), 'row')} of {population.rows:,}, but for none of "
            f"{_counted(len(rows), 'row')} of split {split or 'all'}"
        )
    return kept


def rows_of_split(
    population: Population,
    split: str | None,
    fractions: tuple[float, float, float] | None,
    split_seed: int,
) -> np.ndarray:
    if fractions is None or split is None:
        return population.rows_of(split)
    if split not in SPLITS:
        raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    assigned = split_items(population.source, fractions, split_seed)
    return np.flatnonzero(assigned[population.network] == SPLITS.index(split))


def _targets(population: Population, name: str | None, rows: np.ndarray) -> Tensor:
    if name is None:
        return torch.from_numpy(np.array(rows, dtype=np.int64))
    values = target_values(population, name, rows)
    if values is None:
        more = f", and hyperparameters {', '.join(names)}" if (names := population.hyperparameters) else ""
        raise TaskError(
            f"target: the zoo has no label or metric {name!r}; it has labels {', '.join(population.labels) or 'none'} "
            f"and metrics {', '.join(population.metrics) or 'none'}{more}"
        )
    return values


def _of_rows(population: Population) -> set[str]:
    """Names of targets that differ between the checkpoints of a network."""
    return set(population.metrics) - set(population.labels) - set(population.hyperparameters)


def target_values(population: Population, name: str, rows: np.ndarray) -> Tensor | None:
    """The label, hyperparameter or metric of that name of some rows, (rows,); None if there is none."""
    for table in (population.labels, population.hyperparameters):
        if name in table:
            return torch.from_numpy(np.ascontiguousarray(table[name][population.network[rows]]))
    if name in population.metrics:
        return torch.from_numpy(np.ascontiguousarray(population.metrics[name][rows]))
    return None
