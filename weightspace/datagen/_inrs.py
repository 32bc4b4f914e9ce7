"""Populations of INRs: one network fitted to each signal, or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator

from weightspace.datagen._fit import fit_networks
from weightspace.datagen._protocol import Protocol
from weightspace.datagen._recipe import RECIPES, STRICT, Recipe
from weightspace.datagen._shards import ShardState
from weightspace.datagen._work import Outline, Progress, Shard, Work, cut, divide, same_labels
from weightspace.datagen.sources import Signals
from weightspace.errors import RecipeError
from weightspace.nets import MLP, architecture_of, coordinate_grid
from weightspace.zoo import Population, Source, Zoo, spec_of, stored_weights

POPULATION = "inr"


class NetworkConfig(BaseModel):
    """Hidden layers of the networks; input and output sizes follow from the source."""

    model_config = STRICT

    hidden: tuple[int, ...] = Field((32, 32), min_length=1, description="units per hidden layer")
    activation: Literal["sine", "relu", "tanh", "gaussian"] = Field("sine", description="of hidden layers")
    w0: float = Field(30.0, gt=0, description="frequency factor of sine and Gaussian layers")

    @field_validator("hidden")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError(f"layer sizes must be at least 1, found {min(value)}")
        return value


@RECIPES.register("inr")
class INRRecipe(Recipe):
    """A population of INRs: which signals, which networks, which protocol, how many."""

    network: NetworkConfig = Field(default_factory=NetworkConfig, description="the networks")
    protocol: Protocol = Field(..., description="a preset's name, or {preset: ..., field: ...}")
    initialisation: Literal["independent", "shared"] = Field(
        "independent", description="shared: all networks of one view start from the same parameters"
    )
    count: int | None = Field(None, ge=1, description="items to fit; null for the whole data set")
    views: int = Field(1, ge=1, description="networks fitted to each item")

    def work(self, signals: Signals, device: str) -> INRWork:
        """What this recipe makes from its data."""
        return INRWork(self, signals, device)


class INRWork(Work):
    """Which item each network is fitted to, and how."""

    recipe: INRRecipe

    def __init__(self, recipe: INRRecipe, signals: Signals, device: str) -> None:
        super().__init__(recipe, signals, device)
        _check_signals(recipe, signals)
        self.items = _selected_items(recipe, signals)
        self.split = divide(recipe, signals, self.items)
        grid, self.channels = signals.grid, signals.channels or 1
        self.net = MLP(
            (len(grid), *recipe.network.hidden, self.channels),
            activation=recipe.network.activation,
            w0=recipe.network.w0,
            output_offset=recipe.protocol.output_offset,
        )
        self.spec = spec_of(self.net)
        self.coordinates = coordinate_grid(grid).numpy()
        self.bounds = recipe.protocol.initial_bounds(self.net)

    @property
    def shards(self) -> Sequence[Shard]:
        """All shards."""
        return cut(len(self.items) * self.recipe.views, self.recipe.shard)

    def make(self, shard: Shard, state: ShardState, progress: Progress) -> Zoo:
        """Fit the networks of one shard, which takes too short to keep a state."""
        index = np.arange(shard.first, shard.stop)
        position, view = index // self.recipe.views, index % self.recipe.views
        targets = self.signals.values(self.items[position]).reshape(len(index), -1, self.channels)
        protocol = self.recipe.protocol
        result = fit_networks(
            self.net,
            self._initial(index, view),
            self.coordinates,
            targets,
            learning_rate=protocol.learning_rate,
            steps=protocol.steps,
            target_psnr=protocol.target_psnr,
            device=self.device,
            slots=None if self.device == "cpu" else min(1024, self.recipe.shard),
            progress=progress,
        )
        source = self.items[position]
        population = Population(
            spec=self.spec,
            weights=stored_weights(result.parameters, self.recipe.dtype),
            network=np.arange(len(index), dtype=np.int64),
            step=result.steps.astype(np.int64),
            source=source.astype(np.int64),
            view=view.astype(np.int64),
            split=self.split[position],
            metrics={"psnr": result.psnr.astype(np.float32)},
            labels={name: values[source] for name, values in self.signals.named_labels.items()},
            architecture=architecture_of(self.net),
            protocol=self._protocol(),
            dtype=self.recipe.dtype,
        )
        return Zoo({POPULATION: population})

    def outline(self) -> Sequence[Outline]:
        """One row per network."""
        return [Outline(POPULATION, self.networks, self.networks, self.spec.num_parameters)]

    def probe(self, seconds: float) -> float:
        """Networks per second: of whole fits where they take less than the time, else from a few steps of them."""
        shard, steps = self.shards[0], self.recipe.protocol.steps
        together = torch.get_num_threads() if self.device == "cpu" else 1024
        self._shortened(1).trial(shard, 1)  # compiles
        few = min(20, steps)
        networks, _, taken = self._shortened(few).trial(shard, together)
        longest = taken * steps / few
        while longest < seconds:
            networks = max(networks, min(shard.networks, int(networks * seconds / longest)))
            networks, _, taken = self.trial(shard, networks)
            # networks that reach the target early leave time for more
            if taken > seconds / 2 or networks == shard.networks:
                return networks / taken
            longest = taken
        return networks / longest

    def _shortened(self, steps: int) -> INRWork:
        protocol = self.recipe.protocol.model_copy(update={"steps": steps})
        return INRWork(self.recipe.model_copy(update={"protocol": protocol}), self.signals, self.device)

    def memory(self, shard: Shard) -> int:
        """Targets and five copies of the parameters."""
        values = len(self.coordinates) * self.channels + 5 * self.spec.num_parameters
        return 4 * shard.networks * values

    def sources(self) -> dict[str, Source]:
        """The items that networks are fitted to."""
        index = np.sort(self.items)
        return {self.recipe.source.kind: Source(self.signals.items[index], index)}

    def made(self, zoo: Zoo) -> bool:
        """Whether the zoo's networks were fitted to the items that the source has now."""
        ((kind, now),) = self.sources().items()
        stored, population = zoo.sources.get(kind), zoo.populations.get(POPULATION)
        return (
            stored is not None
            and population is not None
            and np.array_equal(stored.index, now.index)
            and np.array_equal(stored.items, now.items)
            and same_labels(population.labels, self.signals, population.source)
        )

    def headline(self, zoo: Zoo) -> tuple[str, float]:
        """The median PSNR in dB."""
        psnr = zoo[POPULATION].metrics["psnr"]
        return "psnr", float(np.nanmedian(psnr)) if not np.isnan(psnr).all() else float("nan")

    def _initial(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Initial parameters, keyed by seed and network (independent) or seed and view (shared)."""
        keys = index if self.recipe.initialisation == "independent" else view
        uniform = np.empty((len(index), len(self.bounds)), dtype=np.float32)
        for row, key in enumerate(keys):
            generator = np.random.Generator(np.random.Philox(key=[self.recipe.seed, int(key)]))
            generator.random(out=uniform[row], dtype=np.float32)
        return (2.0 * uniform - 1.0) * self.bounds

    def _protocol(self) -> dict[str, Any]:
        return {
            **self.recipe.protocol.model_dump(mode="json"),
            "initialisation": self.recipe.initialisation,
            "activation": self.net.activation,
            "w0": self.net.w0,
            "w0_absorbed": False,
            "optimizer": "adam",
            "loss": "mean squared error on all samples",
            "coordinates": "row, column in [-1, 1], ends included, row-major",
        }


def _check_signals(recipe: Recipe, signals: Signals) -> None:
    """An INR needs coordinates: no tokens, no rows of a table."""
    if signals.vocabulary is not None or not signals.grid:
        what = "rows of a table" if signals.vocabulary is None else "tokens"
        raise RecipeError(
            f"recipe {recipe.name}: source: expected signals on a grid, to which INRs are fitted; {recipe.source.kind!r} "
            f"has {what}"
        )


def _selected_items(recipe: INRRecipe, signals: Signals) -> np.ndarray:
    available = len(signals.items)
    count = available if recipe.count is None else recipe.count
    if count > available:
        raise RecipeError(
            f"recipe {recipe.name}: count: the data set has {available} items, found {count}; "
            "raise views for more networks"
        )
    return np.random.default_rng([recipe.seed, available]).permutation(available)[:count]
