"""The zoo in memory: populations as arrays, however they were read or made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError, ZooError
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo._architectures import spec_of

SPLITS: tuple[str, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Population:
    """Networks of one architecture, in arrays; the fields are those of FORMAT.md.

    Args:
        spec: the weight space; P below is its number of parameters.
        weights: (rows, P) float32, float16, or uint16 for bfloat16; may be mapped from disk.
        network: (rows,) int64, the network of which the row is a checkpoint.
        step: (rows,) int64, optimiser updates.
        source: (networks,) int64, item of the source data set.
        view: (networks,) int64, which of several networks fitted to the same item.
        split: (networks,) uint8, index into ``SPLITS``.
        metrics: per row, float32.
        labels: per network, int64 or float32.
        hyperparameters: per network, int64 or float32.
        architecture: JSON from which ``nets.build`` makes the module; None for a foreign one.
        protocol: how the networks were trained, for those who read the weights.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    """

    spec: WeightSpec
    weights: np.ndarray
    network: np.ndarray
    step: np.ndarray
    source: np.ndarray
    view: np.ndarray
    split: np.ndarray
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    hyperparameters: Mapping[str, np.ndarray] = field(default_factory=dict)
    architecture: Mapping[str, Any] | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        """Number of saved checkpoints."""
        return len(self.weights)

    @property
    def networks(self) -> int:
        """Number of networks."""
        return len(self.source)

    def read(self, rows: int | slice | Sequence[int] | np.ndarray) -> Float[Tensor, "*rows parameters"]:
        """The flattened weights of some rows, copied to float32."""
        block = np.asarray(self.weights[rows])
        if self.dtype == "bfloat16":
            return torch.from_numpy(block.astype(np.int16)).view(torch.bfloat16).float()
        return torch.from_numpy(block.astype(np.float32, copy=block.base is not None))

    def weights_of(self, rows: int | slice | Sequence[int] | np.ndarray) -> Weights:
        """The weights of some rows under their ``state_dict`` names."""
        return self.spec.unflatten(self.read(rows))

    def rows_of(self, split: str | None) -> np.ndarray:
        """The rows whose network is in ``split``; all for None.

        Raises:
            ConfigError: an unknown split.
        """
        if split is None:
            return np.arange(self.rows)
        if split not in SPLITS:
            raise ConfigError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
        return np.flatnonzero(self.split[self.network] == SPLITS.index(split))


@dataclass(frozen=True)
class Source:
    """Items of a source data set that the networks represent.

    Args:
        items: (items, ...) uint8 (value / 255) or float32.
        index: (items,) int64, their numbers in the data set, sorted.
    """

    items: np.ndarray
    index: np.ndarray

    def get(self, numbers: np.ndarray) -> np.ndarray:
        """The signals of the given item numbers, float32, values in [0, 1] where stored as bytes.

        Raises:
            ZooError: a number that is not among the items.
        """
        at = np.searchsorted(self.index, numbers)
        at = np.minimum(at, len(self.index) - 1)
        if not np.array_equal(self.index[at], numbers):
            raise ZooError(f"sources: item {np.asarray(numbers)[self.index[at] != numbers][0]} is not stored")
        block = self.items[at]
        return block.astype(np.float32) / 255.0 if block.dtype == np.uint8 else block.astype(np.float32)


@dataclass(frozen=True)
class Zoo:
    """Populations of networks, the signals they represent, and the recipe that made them.

    Example:
        >>> from weightspace.nets import MLP
        >>> nets = [MLP((2, 8, 1), activation="tanh") for _ in range(3)]
        >>> zoo = Zoo.from_state_dicts([n.state_dict() for n in nets], module=nets[0], labels={"y": [0, 1, 0]})
        >>> zoo["mlp"].rows, zoo["mlp"].spec.num_parameters
        (3, 33)
    """

    populations: Mapping[str, Population]
    sources: Mapping[str, Source] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    path: Path | None = None

    def __getitem__(self, name: str) -> Population:
        if name not in self.populations:
            raise ZooError(f"population: expected one of {', '.join(self.populations)}, found {name!r}")
        return self.populations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.populations)

    @property
    def digest(self) -> str:
        """SHA-256 of the content (FORMAT.md says of what); the stored one for a zoo that was opened."""
        from weightspace.zoo._files import content_digest, stored_digest

        return content_digest(self) if self.path is None else stored_digest(self.path)

    @property
    def format_version(self) -> int:
        """The version of the file that was opened; of a zoo in memory, the one that would be written."""
        from weightspace.zoo._files import FORMAT_VERSION, stored_version

        return FORMAT_VERSION if self.path is None else stored_version(self.path)

    @classmethod
    def open(cls, path: str | Path) -> Zoo:
        """Open a zoo file; weights are mapped from disk, not read.

        Raises:
            ZooError: the file is missing, damaged, newer than this version, or not a zoo.
        """
        from weightspace.zoo._files import open_zoo

        return open_zoo(Path(path))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the zoo atomically.

        Raises:
            OutputError: ``path`` exists and ``overwrite`` is False, or it cannot be written.
            ZooError: the arrays contradict each other.
        """
        from weightspace.zoo._files import write_zoo

        return write_zoo(self, Path(path), overwrite=overwrite)

    @classmethod
    def from_state_dicts(
        cls,
        state_dicts: Sequence[Mapping[str, Tensor]],
        *,
        module: nn.Module | None = None,
        example_inputs: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
        spec: WeightSpec | None = None,
        labels: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        source: Sequence[int] | np.ndarray | None = None,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        name: str | None = None,
    ) -> Zoo:
        """A zoo of a user's own networks, one checkpoint each.

        Args:
            state_dicts: one per network, all of one architecture.
            module: a network of that architecture, from which the spec is traced.
            example_inputs: what to trace it with; see :func:`weightspace.zoo.spec_of` for when it is needed.
            spec: the weight space, instead of ``module``.
            labels: one value per network under each name (integers or floats).
            metrics: one float per network under each name.
            source: the item that each network was trained on; networks of one item share a split. By default
                every network is its own item.
            fractions: share of the items in train, val and test.
            seed: of the split.
            name: of the population; the kind of the module by default.

        Raises:
            SpecError: the module cannot be traced, or a state dict does not fit its spec.
            ConfigError: labels or metrics of the wrong length.
        """
        from weightspace.zoo._state_dicts import population_from_state_dicts

        if spec is None:
            if module is None:
                raise ConfigError("from_state_dicts: expected module= or spec=, found neither")
            spec = spec_of(module, example_inputs)
        population = population_from_state_dicts(
            state_dicts, module, spec, labels or {}, metrics or {}, source, fractions, seed
        )
        return cls({name or ("mlp" if population.architecture else "networks"): population})


def stored_weights(parameters: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 weights as a population keeps them: of ``dtype``, bfloat16 as its bits in uint16.

    What is finite stays finite: float16 ends at 65,504, where larger weights are cut.
    """
    if dtype == "bfloat16":
        return torch.from_numpy(parameters).bfloat16().view(torch.int16).numpy().view(np.uint16)
    if dtype == "float16":
        largest = np.finfo(np.float16).max
        parameters = np.where(np.isfinite(parameters), np.clip(parameters, -largest, largest), parameters)
    return parameters.astype(dtype, copy=False)


def split_items(items: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Assign items to train, val and test: equal item numbers get equal splits.

    Args:
        items: (networks,) int64 item numbers.
        fractions: share of the distinct items per split; they sum to 1.
        seed: of the assignment.

    Returns:
        (networks,) uint8 indices into ``SPLITS``.

    Raises:
        ConfigError: fractions that are negative or do not sum to 1.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not abs(sum(fractions) - 1) <= 1e-6:
        raise ConfigError(f"fractions: expected three shares that sum to 1, found {list(fractions)}")
    distinct, position = np.unique(items, return_inverse=True)
    order = np.random.default_rng([seed, len(distinct)]).permutation(len(distinct))
    bounds = np.round(np.cumsum(fractions)[:-1] * len(distinct)).astype(int)
    split = np.empty(len(distinct), dtype=np.uint8)
    split[order] = np.searchsorted(bounds, np.arange(len(distinct)), side="right").astype(np.uint8)
    return split[position]
