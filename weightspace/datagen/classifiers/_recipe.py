"""The recipe of a population of classifiers, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    field_serializer,
    field_validator,
)

from weightspace.configuration import Registry
from weightspace.datagen._recipe import RECIPES, Recipe, of_kind
from weightspace.datagen._shards import ShardState
from weightspace.datagen._work import Outline, Progress, Shard, Work, cut, data_digest, divide
from weightspace.datagen.classifiers._copies import COPIES, Copy
from weightspace.datagen.classifiers._data import DataConfig, classifier_data
from weightspace.datagen.classifiers._engines import Engine, choose_engine
from weightspace.datagen.classifiers._families import FAMILIES, Draw, Family
from weightspace.datagen.classifiers._hyperparameters import (
    CODED,
    Hyperparameters,
    TrainingConfig,
    draw_hyperparameters,
)
from weightspace.datagen.classifiers._initialisers import initial_weights
from weightspace.datagen.classifiers._training import PopulationTraining, Schedule, Trajectories
from weightspace.datagen.sources import SOURCES, Signals
from weightspace.errors import ConfigError, RecipeError
from weightspace.nets import Network, build
from weightspace.spec import WeightSpec
from weightspace.zoo import Population, Source, Zoo, canonical_json, spec_of, stored_weights

BASE = "base"
_PROBED = 16  # networks that are trained to estimate time

_AnyCopy = Annotated[SerializeAsAny[Copy], BeforeValidator(lambda value: of_kind(COPIES, value))]


@RECIPES.register("classifier")
class ClassifierRecipe(Recipe):
    """A population of classifiers: which data, which networks, how they are trained, how many, what is recorded."""

    kinds: ClassVar[dict[str, Registry[Any]]] = {"source": SOURCES, "network": FAMILIES}
    lists: ClassVar[dict[str, Registry[Any]]] = {"copies": COPIES}

    data: DataConfig = Field(default_factory=DataConfig, description="what networks learn from")
    network: SerializeAsAny[Family] = Field(..., description="the networks: {kind: mlp | cnn | ..., ...}")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="how they are trained")
    base: TrainingConfig | None = Field(
        None, description="train one network so, and let all others start from it (fine-tuning)"
    )
    initialisation: Literal["independent", "shared"] = Field(
        "independent", description="shared: all networks start from the same random numbers"
    )
    order: Literal["independent", "shared"] = Field(
        "independent", description="shared: all networks see their items in one order"
    )
    count: PositiveInt = Field(..., description="networks")
    architectures: PositiveInt | None = Field(
        None, description="architectures to draw, with equally many networks each; null: one draw per network"
    )
    checkpoints: tuple[NonNegativeInt, ...] = Field(
        (), description="epochs after which networks are recorded (0: untrained), beside their last"
    )
    evaluation: PositiveInt = Field(10_000, description="items of each split, at most, to measure metrics on")
    copies: tuple[_AnyCopy, ...] = Field(
        (), description="of every network as it ended: {kind: pruned | quantised | noised, ...}"
    )
    shard: int = Field(64, ge=1, description="networks per shard, the unit of resuming")

    @field_validator("network", mode="before")
    @classmethod
    def _network(cls, value: Any) -> Any:
        return of_kind(FAMILIES, value)

    @field_validator("copies")
    @classmethod
    def _once(cls, value: tuple[Copy, ...]) -> tuple[Copy, ...]:
        kinds = [entry.kind for entry in value]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice:
            raise ValueError(f"expected each kind once, found {twice!r} twice")
        return value

    @field_serializer("copies")
    def _written(self, value: tuple[Copy, ...]) -> list[dict[str, Any]]:
        return [{"kind": entry.kind, **entry.model_dump(mode="json")} for entry in value]

    @field_validator("base")
    @classmethod
    def _one_base(cls, value: TrainingConfig | None) -> TrainingConfig | None:
        varied = [name for name, field in value or () if not field.is_constant]
        if varied:
            raise ValueError(f"{varied[0]}: expected one value, as there is one base, found a distribution")
        return value

    def work(self, signals: Signals, device: str) -> ClassifierWork:
        """What this recipe makes from its data."""
        return ClassifierWork(self, signals, device)


class ClassifierWork(Work):
    """Which networks there are, of which architectures, and how each is trained."""

    recipe: ClassifierRecipe

    def __init__(self, recipe: ClassifierRecipe, signals: Signals, device: str) -> None:
        super().__init__(recipe, signals, device)
        _check(recipe)
        self.data = classifier_data(recipe, recipe.data, signals)
        self.architectures, self.of_network = self._drawn()
        # networks of one architecture stand together, in the order of their numbers
        self.numbers = np.argsort(self.of_network, kind="stable")
        self._split = (
            divide(recipe, signals, np.arange(recipe.count)) if recipe.split.method == "random" else None
        )
        if self._split is None:
            raise RecipeError(
                f"recipe {recipe.name}: split.method: networks have no official split, expected random"
            )
        self._current: tuple[int, Network, WeightSpec, Engine] | None = None

    # -- the plan --------------------------------------------------------------------------------------------

    def _drawn(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The distinct architectures, and which of them each network has."""
        recipe, drawn = self.recipe, dict[str, np.ndarray]()
        total = recipe.architectures or (1 if _is_constant(recipe.network) else recipe.count)
        known: dict[str, int] = {}
        place = np.empty(total, dtype=np.int64)
        for number in range(total):
            draw = Draw(recipe.seed, number, drawn, total)
            try:
                arguments = recipe.network.architecture(draw, self.data.task)
            except RecipeError as error:
                raise RecipeError(f"recipe {recipe.name}: {error}") from None
            text = canonical_json({"kind": recipe.network.kind, "arguments": arguments})
            if text not in known:
                net = _built(recipe, number, json.loads(text))
                _check_smallest_batch(recipe, net, len(self.data.train))
            place[number] = known.setdefault(text, len(known))
        of_network = place[np.arange(recipe.count) * total // recipe.count]
        return [json.loads(text) for text in known], of_network

    @cached_property
    def shards(self) -> Sequence[Shard]:
        """All shards; the base, where there is one, is the first."""
        found: list[Shard] = []
        if self.recipe.base is not None:
            found.append(Shard(0, self.recipe.count, self.recipe.count + 1))
        sizes = np.bincount(self.of_network, minlength=len(self.architectures))
        for architecture, (first, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
            found += cut(
                int(size), self.recipe.shard, first=int(first), number=len(found), architecture=architecture
            )
        return found

    def name_of(self, architecture: int) -> str:
        """Of the population of an architecture."""
        kind = self.recipe.network.kind
        return kind if len(self.architectures) == 1 else f"{kind}-{architecture:03d}"

    def sources(self) -> dict[str, Source]:
        """Classifiers represent no signals."""
        return {}

    def made(self, zoo: Zoo) -> bool:
        """Whether the zoo's networks learnt from the items that the source has now."""
        digest = data_digest(self.signals)
        return all(
            population.protocol.get("data_digest") == digest for population in zoo.populations.values()
        )

    def headline(self, zoo: Zoo) -> tuple[str, float]:
        """The median of the networks' last test accuracies."""
        trained = {self.name_of(number) for number in range(len(self.architectures))}
        last = [
            population.metrics["test_accuracy"][
                np.r_[population.network[1:] != population.network[:-1], True]
            ]
            for name, population in zoo.populations.items()
            if name in trained  # neither copies nor the base
        ]
        return "test_accuracy", float(np.median(np.concatenate(last)))

    def outline(self) -> Sequence[Outline]:
        """The base, and for each architecture its networks and their copies."""
        rows, found = len({*self.recipe.checkpoints} - {self.recipe.training.epochs.low}) + 1, []
        sizes = np.bincount(self.of_network, minlength=len(self.architectures))
        for number, (architecture, networks) in enumerate(
            zip(self.architectures, sizes.tolist(), strict=True)
        ):
            parameters = sum(tensor.numel() for tensor in build(architecture).state_dict().values())
            if number == 0 and self.recipe.base is not None:
                found.append(Outline(BASE, 1, 1, parameters))
            name = self.name_of(number)
            found.append(Outline(name, networks, networks * rows, parameters))
            for copy in self.recipe.copies:
                found.append(Outline(f"{name}-{copy.kind}", networks, networks, parameters))
        return found

    def probe(self, seconds: float) -> float:
        """Networks per second, from the time of some steps and of a checkpoint of one shard's networks."""
        shard = max(self.shards, key=lambda shard: shard.networks)
        numbers = self.numbers[shard.first : shard.stop][:_PROBED]
        net, _, engine = self._engine(shard.architecture)
        hyperparameters = draw_hyperparameters(self.recipe.training, self.recipe.seed, numbers)
        initial = _fresh(net, self.recipe, hyperparameters)
        step, checkpoint = self._training(engine, hyperparameters, initial, ()).timed(seconds)
        everyone = draw_hyperparameters(self.recipe.training, self.recipe.seed, np.arange(self.recipe.count))
        schedule = Schedule.of(everyone, len(self.data.train))
        rows = len(self.recipe.checkpoints) + 1 + len(self.recipe.copies)
        return 1.0 / (step * float(schedule.steps.mean()) + checkpoint * rows)

    # -- making ----------------------------------------------------------------------------------------------

    def make(self, shard: Shard, state: ShardState, progress: Progress) -> Zoo:
        """Train the networks of one shard, and copy them."""
        net, spec, engine = self._engine(shard.architecture)
        if shard.first >= self.recipe.count:
            numbers, hyperparameters, training = self._base_training(net, engine)
            name = BASE
        else:
            numbers = self.numbers[shard.first : shard.stop]
            hyperparameters = draw_hyperparameters(self.recipe.training, self.recipe.seed, numbers)
            initial = self._initial(net, hyperparameters)
            training = self._training(engine, hyperparameters, initial, self.recipe.checkpoints)
            name = self.name_of(shard.architecture)
        found = training.run(state, progress)
        populations = {name: self._population(net, spec, numbers, hyperparameters, found)}
        if name != BASE:
            for copy in self.recipe.copies:
                populations[f"{name}-{copy.kind}"] = self._copied(
                    copy, net, spec, engine, numbers, hyperparameters, found
                )
        return Zoo(populations)

    def _engine(self, architecture: int) -> tuple[Network, WeightSpec, Engine]:
        if self._current is None or self._current[0] != architecture:
            net = build(self.architectures[architecture])
            spec = spec_of(net)
            engine = choose_engine(net, spec, self.data.inputs, self.device)
            self._current = (architecture, net, spec, engine)
        return self._current[1:]

    def _training(
        self,
        engine: Engine,
        hyperparameters: Hyperparameters,
        initial: np.ndarray,
        checkpoints: Sequence[int],
    ) -> PopulationTraining:
        return PopulationTraining(
            engine,
            self.data,
            hyperparameters,
            initial,
            checkpoints,
            seed=self.recipe.seed,
            shared_order=self.recipe.order == "shared",
            evaluation=self.recipe.evaluation,
        )

    def _initial(self, net: Network, hyperparameters: Hyperparameters) -> np.ndarray:
        if self.recipe.base is not None:
            return np.repeat(self._base_weights, len(hyperparameters["seed"]), axis=0)
        return _fresh(net, self.recipe, hyperparameters)

    def _base_training(
        self, net: Network, engine: Engine
    ) -> tuple[np.ndarray, Hyperparameters, PopulationTraining]:
        assert self.recipe.base is not None
        numbers = np.array([self.recipe.count])
        hyperparameters = draw_hyperparameters(self.recipe.base, self.recipe.seed, numbers)
        initial = _fresh(net, self.recipe, hyperparameters)
        return numbers, hyperparameters, self._training(engine, hyperparameters, initial, ())

    @cached_property
    def _base_weights(self) -> np.ndarray:
        """(1, parameters); trained once in each process that makes shards, which all find the same."""
        net, _, engine = self._engine(0)
        _, _, training = self._base_training(net, engine)
        return training.run(ShardState(), lambda _: None).weights[-1:]

    def _copied(
        self,
        copy: Copy,
        net: Network,
        spec: WeightSpec,
        engine: Engine,
        numbers: np.ndarray,
        hyperparameters: Hyperparameters,
        found: Trajectories,
    ) -> Population:
        """Copies of the networks as they ended, measured like them."""
        last = np.flatnonzero(np.r_[found.network[1:] != found.network[:-1], True])
        labels = copy.labels(self.recipe.seed, numbers)
        weights = spec.unflatten(torch.from_numpy(found.weights[last]))
        copied = copy.apply(spec, weights, labels, self.recipe.seed, numbers)
        training = self._training(engine, hyperparameters, spec.flatten(copied).numpy(), ())
        measured = training.measured(found.metrics["epoch"][last].astype(np.int64))
        measured.metrics["diverged"][:] = found.metrics["diverged"][last]
        return self._population(net, spec, numbers, hyperparameters, measured, labels, copy)

    def _population(
        self,
        net: Network,
        spec: WeightSpec,
        numbers: np.ndarray,
        hyperparameters: Hyperparameters,
        found: Trajectories,
        labels: dict[str, np.ndarray] | None = None,
        copy: Copy | None = None,
    ) -> Population:
        assert self._split is not None
        inside = numbers < self.recipe.count  # the base is nobody's test
        split = np.where(inside, self._split[np.minimum(numbers, self.recipe.count - 1)], 0)
        return Population(
            spec=spec,
            weights=stored_weights(found.weights, self.recipe.dtype),
            network=found.network,
            step=found.step,
            source=numbers.astype(np.int64),
            view=np.zeros(len(numbers), dtype=np.int64),
            split=split.astype(np.uint8),
            metrics=found.metrics,
            labels={
                name: values.astype(np.int64 if values.dtype.kind == "i" else np.float32)
                for name, values in (labels or {}).items()
            },
            hyperparameters=hyperparameters.stored(),
            architecture={"kind": net.kind, "arguments": net.arguments()},
            protocol=self._protocol(copy),
            dtype=self.recipe.dtype,
        )

    def _protocol(self, copy: Copy | None) -> dict[str, Any]:
        done = None if copy is None else {"kind": copy.kind, **copy.model_dump(mode="json")}
        return {
            "task": "classification",
            "classes": self.data.task.classes,
            "class_names": list(self.signals.class_names),
            "loss": "cross entropy",
            "choices": {name: list(values) for name, values in CODED.items()},
            "inputs": self.data.preparation,
            "items": {name: len(getattr(self.data, name)) for name in ("train", "val", "test")},
            "initialisation": "base" if self.recipe.base is not None else self.recipe.initialisation,
            "order": self.recipe.order,
            "gradient_norm": "on a network's first batch of training items, without dropout",
            "copies": done,
            "data_digest": data_digest(self.signals),
        }


def _fresh(net: Network, recipe: ClassifierRecipe, hyperparameters: Hyperparameters) -> np.ndarray:
    """(networks, parameters) drawn for each network, or from one stream for all."""
    seeds = hyperparameters["seed"]
    keys = np.zeros_like(seeds) if recipe.initialisation == "shared" else 1 + seeds
    return initial_weights(
        net, recipe.seed, keys, hyperparameters["initialiser"], hyperparameters["initial_scale"]
    )


def _is_constant(family: Family) -> bool:
    """Whether all networks of a family are alike."""
    constant = all(not hasattr(value, "is_constant") or value.is_constant for _, value in family)
    residual = getattr(family, "residual", None)
    return constant and (residual is None or residual.values != ("random",))


def _check(recipe: ClassifierRecipe) -> None:
    """What spans several fields.

    Raises:
        RecipeError: fields that contradict each other.
    """
    place = f"recipe {recipe.name}"
    longest = recipe.training.epochs.high
    late = [epoch for epoch in recipe.checkpoints if epoch > longest]
    if late:
        raise RecipeError(
            f"{place}: checkpoints: expected at most {longest}, the most epochs of training.epochs, found {late[0]}"
        )
    if len(set(recipe.checkpoints)) < len(recipe.checkpoints):
        raise RecipeError(f"{place}: checkpoints: expected each epoch once, found {list(recipe.checkpoints)}")
    if recipe.architectures is not None and recipe.architectures > recipe.count:
        raise RecipeError(
            f"{place}: architectures: expected at most {recipe.count}, the number of networks (count), found "
            f"{recipe.architectures}"
        )
    default = TrainingConfig()
    for name in ("initialiser", "initial_scale"):
        if recipe.base is not None and getattr(recipe.training, name) != getattr(default, name):
            raise RecipeError(
                f"{place}: training.{name}: networks start from the base; set it under base instead"
            )
    if recipe.base is not None and not _is_constant(recipe.network):
        raise RecipeError(
            f"{place}: base: expected networks of one architecture, found distributions in network"
        )


def _built(recipe: ClassifierRecipe, number: int, architecture: dict[str, Any]) -> Network:
    try:
        return build(architecture)
    except ConfigError as error:
        drawn = ", ".join(f"{name}={value}" for name, value in architecture["arguments"].items())
        raise RecipeError(
            f"recipe {recipe.name}: network: architecture {number} cannot be built: {error} ({drawn})"
        ) from None


def _check_smallest_batch(recipe: ClassifierRecipe, net: Network, items: int) -> None:
    """A norm cannot be trained on a single number per channel: one item, of which one pixel is left."""
    for place, training in {"training": recipe.training, "base": recipe.base}.items():
        if training is None or min(training.batch_size.low, round(training.fraction.low * items)) > 1:
            continue
        try:
            with torch.no_grad():
                net.train()(net.example_inputs(1))
        except ValueError:
            raise RecipeError(
                f"recipe {recipe.name}: {place}.batch_size: expected at least 2 items, as these networks' norms need, "
                "found a batch of 1"
            ) from None
