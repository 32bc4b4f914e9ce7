"""A run directory: what training leaves behind, and what evaluation reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightspace.datasets import Normalisation, ZooDataset, open_populations, population_names
from weightspace.devices import memory_guard
from weightspace.errors import ConfigError, RunError, TaskError, WeightspaceError
from weightspace.models import ModelConfig, StatisticsTrees
from weightspace.spec import WeightSpec
from weightspace.tasks._config import TrainConfig, load_config, write_text
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import TASKS, Outputs, Task
from weightspace.zoo import Population, Zoo

PARAMETERS = "model.safetensors"
TREES = "trees.skops"
DESCRIPTION = "model.json"
ZOO = "zoo.json"
RUN_VERSION = 2
"""Counted up when a run's files change; others are refused."""


@dataclass(frozen=True)
class TrainedRun:
    """A run as read from disk.

    Attributes:
        path: the run directory.
        config: with which it was trained.
        spec: the weight space that it reads.
        network: raw weights in; class scores, numbers or weights out. Normalises by itself; in eval mode.
        task: what it was trained for.
        architecture: of the networks that it was trained on; None for those of a foreign module.
    """

    path: Path
    config: TrainConfig
    spec: WeightSpec
    network: Metanetwork
    task: Task
    architecture: Mapping[str, Any] | None

    def reader_of(self, population: Population, where: str) -> Metanetwork:
        """The metanetwork for a population: ``network`` itself, or one with its parameters for other networks.

        Graph networks with types by role read networks of any weight space, if the normalisation depends on shapes
        alone; models that only run the networks read those of any architecture.

        Args:
            population: with networks like those trained on, or others.
            where: what a message calls them.

        Raises:
            RunError: other networks than those trained on, which the metanetwork cannot read.
        """
        options = self.config.model_options()
        same_spec = population.spec == self.spec
        edits = self.task.out_features is None
        runs_them = options.runs_networks or edits
        if same_spec and (not runs_them or population.architecture == self.architecture):
            return self.network
        settled = None if edits else options.settled(self.spec)
        fitted = options.reads == "normalised" and self.config.normalisation in ("tensor", "entry")
        if settled is None or (fitted and not same_spec):
            raise RunError(f"run {self.path}: {self._refusal(population, where)}")
        try:
            network = build_network(
                self.config, population.spec, population.architecture, self.task, options=settled
            )
            if same_spec:
                network.load_state_dict(self.network.state_dict())
            else:
                for name, part in network.named_children():
                    if name != "normalisation":  # which follows from the spec here
                        part.load_state_dict(self.network.get_submodule(name).state_dict())
        except (WeightspaceError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RunError(f"run {self.path}: cannot read the networks of {where}: {reason}") from None
        return network.eval()

    def _refusal(self, population: Population, where: str) -> str:
        """Why networks are refused, and which metanetworks would read them."""
        if population.spec == self.spec:
            return (
                f"runs networks of architecture {self.architecture}, but those of {where} are "
                f"{population.architecture}"
            )
        if self.task.out_features is None:
            hint = f"task {self.task.name} is for networks like those of training alone, whatever the metanetwork"
        else:
            hint = (
                "probes read networks of any weight space, and so do graph networks trained with model.types=role and "
                "normalisation=fan_in"
            )
        return (
            f"trained on networks of {self.spec.num_parameters} parameters, but those of {where} have "
            f"{population.spec.num_parameters}{_difference(self.spec, population.spec)}; {hint}"
        )


def _difference(expected: WeightSpec, found: WeightSpec) -> str:
    """Where two specs differ, in brackets."""
    for name, tensor in expected.tensors.items():
        other = found.tensors.get(name)
        if other is None:
            return f" (tensor {name!r} is missing)"
        if other.shape != tensor.shape:
            return f" (tensor {name!r} should have shape {list(tensor.shape)}, found {list(other.shape)})"
    if extra := [name for name in found.tensors if name not in expected.tensors]:
        return f" (tensor {extra[0]!r} is not known)"
    for name, group in expected.groups.items():
        if name in found.groups and found.groups[name] != group:
            return f" (group {name!r} should be {group}, found {found.groups[name]})"
    return ", with other symmetries"


def build_network(
    config: TrainConfig,
    spec: WeightSpec,
    architecture: Mapping[str, Any] | None,
    task: Task,
    *,
    options: ModelConfig | None = None,
) -> Metanetwork:
    """The metanetwork of a configuration, with fresh parameters and a normalisation that was not fitted yet.

    ``options`` of the model are those of the configuration, unless others are given.
    """
    options = options or config.model_options()
    model = options.build(spec, architecture, task.out_features)
    plain = config.normalisation == "none" or options.reads == "raw"
    return task.assemble(model, None if plain else Normalisation(spec, config.normalisation), spec)


def save_network(run: Path, network: Metanetwork, population: Population, task: Task) -> None:
    """Write the parameters, and what is needed to rebuild the metanetwork around them, for a population."""
    description = {
        "run_version": RUN_VERSION,
        "spec": json.loads(population.spec.to_json(provenance=False)),
        "architecture": population.architecture,
        "task": task.state(),
    }
    if isinstance(network.model, StatisticsTrees):
        network.model.save(run / TREES)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, run / PARAMETERS)
    # written last: a run with this file is complete
    write_text(run / DESCRIPTION, json.dumps(description))


def save_digest(run: Path, zoo: Zoo) -> None:
    """Remember which content a run is trained on, and the version of the files."""
    write_text(run / ZOO, json.dumps({"digest": zoo.digest, "run_version": RUN_VERSION}))


def digest_of(run: Path) -> str:
    """The digest of the zoo that a run was begun with.

    Raises:
        RunError: it is not known.
    """
    try:
        return str(json.loads((run / ZOO).read_text())["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"run {run}: {ZOO} is missing or damaged; train again with --overwrite") from None


def check_version(run: Path) -> None:
    """Raise RunError when a run, finished or not, is of another version."""
    told = []
    for name in (
        DESCRIPTION,
        ZOO,
    ):  # some finished runs say it in the first alone, unfinished ones in the second
        try:
            told.append(json.loads((run / name).read_text())["run_version"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    found = next((version for version in told if version != RUN_VERSION), RUN_VERSION if told else None)
    if found != RUN_VERSION:
        raise RunError(
            f"run {run}: version should be {RUN_VERSION}, found {found}; train again with --overwrite, or into another "
            "directory"
        )


def check_zoo(run: Path, zoo: Zoo) -> None:
    """Raise RunError when the zoo's content is not that on which the run was begun.

    Its splits may be others, so that what was trained on would count as unseen.
    """
    begun_with = digest_of(run)
    if begun_with != zoo.digest:
        raise RunError(
            f"run {run}: zoo {zoo.path} has changed since training began (digest {begun_with} then, "
            f"{zoo.digest} now); train again with --overwrite, or into another directory"
        )


def load_run(path: str | Path) -> TrainedRun:
    """Read a trained metanetwork: its parameters, normalisation, spec, task and configuration.

    Raises:
        RunError: not a run, training has not finished, its files are damaged or of another version.
    """
    run = Path(path)
    config = load_config(run)
    if not (run / DESCRIPTION).is_file() or not (run / PARAMETERS).is_file():
        raise RunError(
            f"run {run}: no trained model: {DESCRIPTION} is missing; finish `weightspace train` first"
        )
    try:
        description = json.loads((run / DESCRIPTION).read_text())
        if isinstance(description, dict) and description and description.get("run_version") != RUN_VERSION:
            raise RunError(
                f"version should be {RUN_VERSION}, found {description.get('run_version')}; train again"
            )
        spec = WeightSpec.from_json(json.dumps(description["spec"]))
        task = TASKS[config.task].from_state(description["task"], config.settings())
        network = build_network(config, spec, description["architecture"], task)
        network.load_state_dict(load_file(run / PARAMETERS))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, WeightspaceError):
            raise RunError(f"run {run}: {error}") from None
        reason = " ".join(str(error).split())  # PyTorch lists one parameter per line
        raise RunError(f"run {run}: its files are damaged ({type(error).__name__}: {reason})") from None
    if isinstance(network.model, StatisticsTrees):
        network.model.load(run / TREES)
    return TrainedRun(run, config, spec, network.eval(), task, description["architecture"])


@dataclass(frozen=True)
class OpenedPopulation:
    """Networks of one population, and the trained metanetwork such that it reads them."""

    name: str
    dataset: ZooDataset
    network: Metanetwork


def open_splits(
    trained: TrainedRun,
    zoo: str | Path | None,
    split: str | None,
    *,
    target: str | None = None,
    population: str | None = None,
    skip_bad: bool = False,
    where: str | None = None,
) -> list[OpenedPopulation]:
    """The networks of a split, by population.

    Args:
        trained: the run.
        zoo: None for the zoo that it was trained on, which must not have changed.
        split: None for all networks.
        target: by name; None for the numbers of the rows.
        population: one, several between commas, or ``"all"``; those of the run by default.
        skip_bad: leave out what is not finite; so does a run that was trained so.
        where: which rows are read; all without one.

    Raises:
        RunError: networks that the metanetwork cannot read, or a zoo that changed.
        ConfigError: a ``where`` that does not suit the zoo, or leaves nothing.
        ZooError: the zoo cannot be opened.
        TaskError: the zoo lacks the target, or has networks with weights that are not finite.
    """
    config = trained.config
    opened = Zoo.open(config.zoo if zoo is None else zoo)
    if zoo is None:
        check_zoo(trained.path, opened)
    chosen = population if population is not None else _population_of(opened, config)
    names = population_names(opened, chosen)
    place = f"population {{}} of {opened.path}" if len(names) > 1 else str(opened.path)
    readers = {name: trained.reader_of(opened[name], place.format(name)) for name in names}
    skip = skip_bad or config.skip_bad
    parts = open_populations(opened, chosen, split, target=target, skip_bad=skip, where=where)
    return [OpenedPopulation(name, part, readers[name]) for name, part in parts.items()]


def open_split(
    trained: TrainedRun,
    zoo: str | Path | None,
    split: str | None,
    *,
    population: str | None = None,
    skip_bad: bool = False,
    where: str | None = None,
) -> OpenedPopulation:
    """As :func:`open_splits`, of one population.

    Raises:
        ConfigError: several are named.
    """
    opened = open_splits(trained, zoo, split, population=population, skip_bad=skip_bad, where=where)
    if len(opened) > 1:
        names = ", ".join(part.name for part in opened)
        raise ConfigError(f"population: expected one, found several; name one of {names}")
    return opened[0]


def _population_of(zoo: Zoo, config: TrainConfig) -> str | None:
    """The population of the run; in another zoo that has only one, that one, whatever its name."""
    return (
        None if len(zoo.populations) == 1 and config.population not in zoo.populations else config.population
    )


def guard(trained: TrainedRun, device: str) -> AbstractContextManager[None]:
    """Around what reads networks: one sentence when the device is too small for it."""
    elsewhere = "; --device cpu may have more" if device == "cuda" else ""
    return memory_guard(
        f"run {trained.path}: {device} has too little memory for batches of {trained.config.batch_size} networks, the "
        f"batch_size of training{elsewhere}"
    )


def batches_of(
    network: Metanetwork, dataset: ZooDataset, device: str, batch_size: int
) -> Iterator[tuple[Outputs, Tensor]]:
    """Outputs and targets of a whole split, batch by batch, in its order; without gradients.

    ``batch_size`` is that of training, which is known to fit.

    Raises:
        TaskError: an output is NaN or infinite; the row is named.
    """
    network = network.to(device).eval()
    at = 0
    for weights, targets in dataset.batches(batch_size):
        with torch.no_grad():
            outputs = network({name: w.to(device) for name, w in weights.items()})
        count = len(targets) // dataset.copies
        _check_finite(outputs, dataset, at, count)
        at += count
        yield outputs, targets


def _check_finite(outputs: Outputs, dataset: ZooDataset, at: int, count: int) -> None:
    """Of ``count`` members of a data set from ``at`` on, or of several copies of them."""
    tensors: Mapping[str, Tensor] = {"": outputs} if isinstance(outputs, Tensor) else outputs
    for tensor in tensors.values():
        bad = ~tensor.flatten(1).isfinite().all(-1)
        if bad.any():
            row = int(dataset.rows[at + int(bad.nonzero()[0]) % count])
            raise TaskError(
                f"zoo {dataset.zoo.path}: the metanetwork's output for row {row} is NaN or infinite; its weights "
                "are far from those of the training split"
            )


def outputs_of(
    network: Metanetwork, task: Task, dataset: ZooDataset, device: str, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Readouts and targets of a whole split, in its order, on the CPU."""
    readouts, targets = [], []
    for outputs, target in batches_of(network, dataset, device, batch_size):
        with torch.no_grad():
            readouts.append(task.readout(outputs).cpu())
        targets.append(target.cpu())
    return torch.cat(readouts), torch.cat(targets)
