"""Several populations of one zoo as one data set, in batches that are each of one population."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from weightspace.datasets._dataset import ZooDataset, key, population_names, rows_of_split
from weightspace.datasets.augment import Augmentation
from weightspace.errors import ConfigError, TaskError
from weightspace.spec import Weights
from weightspace.zoo import Population, Zoo, rows_where


def open_populations(
    zoo: str | Path | Zoo,
    chosen: str | None,
    split: str | None,
    *,
    where: str | None = None,
    **options: Any,
) -> dict[str, ZooDataset]:
    """The data sets of the populations that a text names; of several, those that have networks in the split.

    Args:
        zoo: the path of a zoo file, or an open zoo.
        chosen: see :func:`population_names`.
        split: ``"train"``, ``"val"``, ``"test"``, or None for all networks.
        where: which rows are used.
        options: further ones of :class:`ZooDataset`.

    Raises:
        ConfigError: an unknown split, no population or several where one has to be named, or nothing left by ``where``.
        TaskError: as for :class:`ZooDataset`, or none of several populations has networks in the split.
        ZooError: the zoo cannot be opened, or has no population of that name.
    """
    opened = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    names = population_names(opened, chosen)
    splitting = [options.get("fractions"), options.get("split_seed", 0)]
    used = [name for name in names if len(names) == 1 or _has_rows(opened[name], where, split, *splitting)]
    if not used:
        which = f"where: {where!r} holds for" if where else f"zoo {opened.path or ''}: there are"
        raise (ConfigError if where else TaskError)(
            f"{which} no networks of split {split or 'all'} in any of {len(names)} populations"
        )
    return {name: ZooDataset(opened, split, population=name, where=where, **options) for name in used}


def _has_rows(population: Population, where: str | None, *splitting: Any) -> bool:
    rows = rows_of_split(population, *splitting)
    if where:
        rows = np.intersect1d(rows, rows_where(population, where, required=False))
    return len(rows) > 0


class PopulationsDataset(Dataset[tuple[Weights, Tensor, str]]):
    """Networks of several populations, in batches that are each of one.

    ``dataset[[3, 1, 4]]`` is ``(Weights, targets, name of the population)``; members are numbered one population after
    the other. :class:`PopulationBatches` draws such batches for a ``DataLoader``.

    Args:
        parts: data sets by name of their population.

    Attributes:
        parts: the same.
        starts: number of the first member of each part.

    Raises:
        ConfigError: no parts.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> from weightspace.zoo import Zoo
        >>> zoo = Zoo({"a": tiny_zoo()["inr"], "b": tiny_zoo(hidden=(5, 4))["inr"]})
        >>> dataset = PopulationsDataset(open_populations(zoo, "all", "train"))
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=PopulationBatches(dataset, 8))
        >>> [(name, len(targets)) for weights, targets, name in loader][:2]
        [('b', 8), ('a', 8)]
    """

    def __init__(self, parts: dict[str, ZooDataset]) -> None:
        if not parts:
            raise ConfigError("populations: expected at least one data set, found none")
        self.parts = dict(parts)
        self.starts = np.cumsum([0, *(len(part) for part in parts.values())])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, indices: int | Sequence[int]) -> tuple[Weights, Tensor, str]:
        """The batch of members of one population; of a single number, that member without a batch axis."""
        if isinstance(indices, int):
            weights, targets, name = self.read([indices])
            return {of: tensor[0] for of, tensor in weights.items()}, targets[0], name
        return self.read(indices)

    def read(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Weights, Tensor, str]:
        """The batch of the given members of one population, augmented.

        Raises:
            IndexError: no members, members that there are not, or of several populations.
        """
        members = np.asarray(indices, dtype=np.int64)
        numbers = np.unique(np.searchsorted(self.starts, members, side="right") - 1)
        if len(numbers) != 1 or not 0 <= numbers[0] < len(self.parts):
            raise IndexError(
                f"dataset of {len(self)}: expected members of one population, found those of {len(numbers)}"
            )
        name = list(self.parts)[numbers[0]]
        weights, targets = self.parts[name].read(members - self.starts[numbers[0]])
        return weights, targets, name

    def to(self, device: torch.device | str) -> PopulationsDataset:
        """Keep all weights and targets in the memory of ``device``."""
        for part in self.parts.values():
            part.to(device)
        return self

    @property
    def first(self) -> ZooDataset:
        """The first part."""
        return next(iter(self.parts.values()))

    @property
    def populations(self) -> tuple[Population, ...]:
        """From which the networks are read."""
        return tuple(part.population for part in self.parts.values())

    @property
    def zoo(self) -> Zoo:
        """The zoo of all parts."""
        return self.first.zoo

    @property
    def split(self) -> str | None:
        """The split of all parts."""
        return self.first.split

    @property
    def target(self) -> str | None:
        """The name of what is to be predicted."""
        return self.first.target

    @property
    def targets(self) -> Tensor:
        """What is to be predicted of all members, in their order."""
        return torch.cat([part.targets for part in self.parts.values()])

    @property
    def skipped(self) -> int:
        """Rows that were left out because they are bad."""
        return sum(part.skipped for part in self.parts.values())

    @property
    def epoch(self) -> int:
        """Set it before each pass, as that of :class:`ZooDataset`."""
        return self.first.epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        for part in self.parts.values():
            part.epoch = value

    @property
    def augment(self) -> Augmentation | None:
        """Applied to each batch that is read."""
        return self.first.augment

    @augment.setter
    def augment(self, value: Augmentation | None) -> None:
        for part in self.parts.values():
            part.augment = value


class PopulationBatches(Sampler[list[int]]):
    """Members of batches that are each of one population, for a ``DataLoader`` with ``batch_size=None``.

    Batches of a population are of nearly equal size, and spread evenly over an epoch: with populations of one size they
    take turns, in an order that is drawn anew in each epoch. A population of one network, on which BatchNorm cannot be
    trained, is left out when shuffled.

    Args:
        dataset: of several populations.
        batch_size: networks per batch at most, or one more where a network would be left alone.
        shuffle: in an order keyed by seed and epoch; otherwise one population after the other.
        seed: of the order.
    """

    def __init__(
        self, dataset: PopulationsDataset, batch_size: int, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed

    def set_epoch(self, epoch: int) -> None:
        """Another order, and other augmentations."""
        self.dataset.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng(key(self.seed, self.dataset.epoch))
        turns = []
        for number, (part, count) in enumerate(zip(self.dataset.parts.values(), self._counts(), strict=True)):
            order = generator.permutation(len(part)) if self.shuffle else np.arange(len(part))
            place = (
                (np.arange(count) + generator.random()) / max(count, 1)
                if self.shuffle
                else np.full(count, number)
            )
            members = np.array_split(order + self.dataset.starts[number], count) if count else []
            turns += list(zip(place.tolist(), members, strict=True))
        for _, batch in sorted(turns, key=lambda turn: turn[0]):
            yield batch.tolist()

    def __len__(self) -> int:
        return sum(self._counts())

    def _counts(self) -> list[int]:
        """Batches of each population."""
        sizes = [len(part) for part in self.dataset.parts.values()]
        counts = [-(-size // self.batch_size) for size in sizes]
        # for BatchNorm no batch of one network: rather one more in another
        return (
            [min(count, size // 2) for count, size in zip(counts, sizes, strict=True)]
            if self.shuffle
            else counts
        )
