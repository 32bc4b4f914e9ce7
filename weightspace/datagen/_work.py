"""What a recipe has to be able to do: be cut into shards, and make each of them."""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weightspace.datagen._recipe import Recipe
from weightspace.datagen._shards import ShardState
from weightspace.datagen.sources import Signals
from weightspace.errors import RecipeError
from weightspace.zoo import Source, Zoo, split_items

_ROW_BYTES, _NETWORK_BYTES, _POPULATION_BYTES = 60, 120, 30_000  # of a zoo file, beside the weights
Progress = Callable[[int | float], None]
"""Called with the number of networks finished so far, in fractions where a network takes long."""


@dataclass(frozen=True)
class Shard:
    """Some networks of one architecture that are made together: the unit of resuming and of distribution.

    Args:
        number: of the shard.
        first: number of its first network.
        stop: the number after that of its last network.
        architecture: number of the architecture that its networks share.
    """

    number: int
    first: int
    stop: int
    architecture: int = 0

    @property
    def networks(self) -> int:
        """How many networks it makes."""
        return self.stop - self.first


@dataclass(frozen=True)
class Outline:
    """A population before it is made.

    Args:
        name: of the population.
        networks: how many.
        rows: checkpoints of all of them, at most.
        parameters: of each.
    """

    name: str
    networks: int
    rows: int
    parameters: int


class Work(ABC):
    """What a recipe makes from its data; everything that can be wrong with it is found when it is built.

    Args:
        recipe: the recipe.
        signals: the data.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        RecipeError: the data do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, signals: Signals, device: str) -> None:
        self.recipe, self.signals, self.device = recipe, signals, device

    @property
    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All shards, in the order in which they are joined."""

    @abstractmethod
    def make(self, shard: Shard, state: ShardState, progress: Progress) -> Zoo:
        """Train the networks of one shard; the result depends on the recipe, the shard and the kind of device alone.

        Args:
            shard: which one.
            state: where a shard that takes long keeps what it has.
            progress: told of finished networks.
        """

    @abstractmethod
    def sources(self) -> dict[str, Source]:
        """The signals that the zoo stores."""

    @abstractmethod
    def made(self, zoo: Zoo) -> bool:
        """Whether a zoo of the same recipe was made from the same data."""

    @abstractmethod
    def headline(self, zoo: Zoo) -> tuple[str, float]:
        """The metric by which a population is judged at a glance, and its median over the networks."""

    def outline(self) -> Sequence[Outline]:
        """The populations that are made; empty where that is not known before they are.

        From it follow the room that ``generate`` asks for before it starts, and what ``plan`` says. Without one the
        plan is scaled from a probe, and no room is asked for.
        """
        return []

    def probe(self, seconds: float) -> float:
        """Networks per second that this machine trains, found by training some for about so long.

        Args:
            seconds: to spend, beside what compilation takes.
        """
        shard = self.shards[len(self.shards) // 2]
        self.trial(shard, 1)  # compiles, and fills caches
        networks, _, taken = self.trial(shard, min(shard.networks, os.cpu_count() or 1))
        more = min(shard.networks, int(networks * seconds / max(taken, 1e-9)))
        if more > 2 * networks:
            networks, _, taken = self.trial(shard, more)
        return networks / taken

    def trial(self, shard: Shard, networks: int) -> tuple[int, Zoo, float]:
        """Make the first networks of a shard and keep nothing: how many, what came out, and the seconds it took."""
        small = replace(shard, stop=min(shard.stop, shard.first + networks))
        start = time.perf_counter()
        zoo = self.make(small, ShardState(), lambda _: None)
        return small.networks, zoo, time.perf_counter() - start

    def memory(self, shard: Shard) -> int:
        """Bytes that making a shard takes beside the libraries and the data, roughly."""
        rows = sum(part.rows * part.parameters for part in self.outline())
        return 4 * 4 * rows * shard.networks // max(self.networks, 1)

    @property
    def networks(self) -> int:
        """How many networks are trained."""
        return sum(shard.networks for shard in self.shards)

    @property
    def plan(self) -> dict[str, Any]:
        """What shards in a folder must agree on, as JSON."""
        return {
            "recipe": self.recipe.resolved(),
            "shard": self.recipe.shard,
            "device": self.device,
            "data": data_digest(self.signals),
        }


def data_digest(signals: Signals) -> str:
    """SHA-256 of a source's items, labels and official split."""
    digest = hashlib.sha256()
    for array in (signals.items, signals.labels, signals.official, *signals.attributes.values()):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def zoo_bytes(outline: Sequence[Outline], dtype: str, sources: Mapping[str, Source]) -> int:
    """Size of a zoo file, at most.

    Args:
        outline: its populations.
        dtype: of stored weights.
        sources: the signals that it stores.
    """
    weights = sum(part.rows * part.parameters for part in outline) * (4 if dtype == "float32" else 2)
    columns = sum(part.rows * _ROW_BYTES + part.networks * _NETWORK_BYTES for part in outline)
    signals = sum(source.items.nbytes + source.index.nbytes for source in sources.values())
    return weights + columns + signals + len(outline) * _POPULATION_BYTES


def divide(recipe: Recipe, signals: Signals, items: np.ndarray, field: str = "split") -> np.ndarray:
    """The split of each item under ``split``, or another field of the same form: (items,) uint8.

    Args:
        recipe: with the configuration of the split, and the seed.
        signals: with the official split of its items, for the method ``official``.
        items: numbers of items; equal numbers are in the same split.
        field: of the recipe.

    Raises:
        RecipeError: shares that leave nothing, or no official split.
    """
    config = getattr(recipe, field)
    if config.method == "random":
        if config.val + config.test >= 1:
            raise RecipeError(f"recipe {recipe.name}: {field}: val and test leave nothing to train on")
        # another stream than the selection's, or the order of the items would be that of the splits
        stream = int(np.random.SeedSequence([recipe.seed, 1]).generate_state(1)[0])
        return split_items(items, (1 - config.val - config.test, config.val, config.test), stream)
    if signals.official is None:
        raise RecipeError(
            f"recipe {recipe.name}: {field}.method: the source {recipe.source.kind!r} has no official split"
        )
    split = signals.official[items].copy()
    training = split == 0
    if training.any():
        split[training] = split_items(items[training], (1 - config.val, config.val, 0.0), recipe.seed)
    return split


def cut(networks: int, size: int, *, first: int = 0, number: int = 0, architecture: int = 0) -> list[Shard]:
    """Shards of at most ``size`` networks.

    Args:
        networks: to cut into shards.
        size: of a shard.
        first: number of the first network.
        number: of the first shard.
        architecture: of all of them.
    """
    starts = range(first, first + networks, size)
    return [
        Shard(number + at, start, min(start + size, first + networks), architecture)
        for at, start in enumerate(starts)
    ]


def same_labels(labels: Mapping[str, np.ndarray], signals: Signals, items: np.ndarray) -> bool:
    """Whether a population's labels are those that the data have now."""
    return set(labels) == set(signals.named_labels) and all(
        np.array_equal(labels[name], values[items]) for name, values in signals.named_labels.items()
    )
