"""One metanetwork for networks of several populations: one reader for each, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from weightspace.errors import ConfigError, WeightspaceError
from weightspace.spec import Weights
from weightspace.tasks._config import TrainConfig
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import Task
from weightspace.tasks._run import build_network
from weightspace.zoo import Population, Zoo


class SharedMetanetwork(Metanetwork):
    """Reads networks of several weight spaces; to its owner it is the metanetwork of the first of them.

    The readers are built for one spec each, and then given the parameters and running statistics of the first. Only
    these are trained, saved and loaded.

    Args:
        readers: by name of the population.

    Raises:
        ConfigError: the parameters of two readers differ in shape; the populations are named.
    """

    def __init__(self, readers: Mapping[str, Metanetwork]) -> None:
        first = next(iter(readers.values()))
        super().__init__(first.model, first.normalisation)
        # held in a tuple: what the others have of their own follows from their specs, and is not saved
        self._readers = (dict(readers),)
        self._share()

    def forward(self, weights: Weights, population: str | None = None) -> Tensor | Weights:
        """Read a batch of networks of a population, by default the first."""
        reader = self.of(population) if population is not None else None
        out: Tensor | Weights = super().forward(weights) if reader is None else reader(weights)
        return out

    def of(self, population: str) -> Metanetwork:
        """The reader of a population."""
        return self._readers[0][population]

    def train(self, mode: bool = True) -> SharedMetanetwork:
        """Dropout and BatchNorm of all readers."""
        for reader in self._readers[0].values():
            reader.train(mode)
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # on another device buffers are new tensors, which have to be shared again
        for reader in self._readers[0].values():
            reader._apply(fn)
        super()._apply(fn, recurse)
        self._share()
        return self

    def _share(self) -> None:
        first = dict(self.model.named_modules())
        for population, reader in self._readers[0].items():
            for name, module in reader.model.named_modules():
                _check_alike(population, name, module, first.get(name))
                _give(first[name], module)


def _give(source: nn.Module, to: nn.Module) -> None:
    """Parameters and saved buffers of one module to another, as the same tensors."""
    to._parameters.update(source._parameters)
    to._buffers.update({name: source._buffers[name] for name in _saved(source)})


def _saved(module: nn.Module) -> list[str]:
    return [name for name in module._buffers if name not in module._non_persistent_buffers_set]


def _check_alike(population: str, name: str, module: nn.Module, source: nn.Module | None) -> None:
    """Raise ConfigError when a module has not the tensors of the one whose it is to get."""
    shapes, expected = ({} if part is None else _shapes(part) for part in (module, source))
    if source is None or shapes != expected:
        different = next((key for key in {**shapes, **expected} if shapes.get(key) != expected.get(key)), "")
        raise ConfigError(
            f"population: {population} needs a metanetwork of other sizes than the first one ({name}.{different}: "
            f"{shapes.get(different)} and not {expected.get(different)}); train on populations with equal inputs and outputs"
        )


def _shapes(module: nn.Module) -> dict[str, Any]:
    tensors = {**module._parameters, **{name: module._buffers[name] for name in _saved(module)}}
    return {name: None if tensor is None else list(tensor.shape) for name, tensor in tensors.items()}


def widened(config: TrainConfig, zoo: Zoo, names: tuple[str, ...]) -> TrainConfig:
    """The configuration with options of the metanetwork that suffice for all of the populations.

    Raises:
        ConfigError: a metanetwork or a normalisation for networks of one weight space only, or several devices.
    """
    options = config.model_options()
    try:
        settled = options.settled(*(zoo[name].spec for name in names))
    except WeightspaceError as error:
        raise ConfigError(
            f"model {config.model}: cannot read all of {len(names)} populations: {error}"
        ) from None
    if settled is None:
        raise ConfigError(
            f"model {config.model}: reads networks of one weight space, found {len(names)} populations; for several take "
            "probe, or graph with --set model.types=role"
        )
    if options.reads == "normalised" and config.normalisation in ("tensor", "entry"):
        raise ConfigError(
            f"normalisation: expected fan_in or none for several populations, found {config.normalisation}, which has "
            "numbers for each tensor of one weight space"
        )
    if config.devices > 1:
        raise ConfigError(f"devices: expected 1 with several populations, found {config.devices}")
    return config.model_copy(update={"options": settled.model_dump(mode="json")})


def build_shared(config: TrainConfig, populations: Mapping[str, Population], task: Task) -> SharedMetanetwork:
    """The metanetwork of a configuration for several populations, with fresh parameters.

    Raises:
        ConfigError: one that cannot read all of them, or gives weights.
    """
    if task.out_features is None:
        raise ConfigError(f"task {task.name}: is for networks of one population, found {len(populations)}")
    return SharedMetanetwork(
        {
            name: build_network(config, population.spec, population.architecture, task)
            for name, population in populations.items()
        }
    )
