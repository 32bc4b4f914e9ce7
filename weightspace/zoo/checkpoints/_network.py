"""Single networks: a row of a zoo, or a checkpoint file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.errors import CheckpointError, SpecError, ZooError
from weightspace.nets import build
from weightspace.spec import WeightSpec
from weightspace.zoo._architectures import spec_of
from weightspace.zoo._files import stored_digest
from weightspace.zoo._zoo import Zoo
from weightspace.zoo.checkpoints._safetensors import INDEX, SafetensorsWeights, ShardedWeights, find_index
from weightspace.zoo.checkpoints._state_dicts import read_state_dict
from weightspace.zoo.checkpoints._stored import HeldWeights

_ROW = re.compile(r"^(?P<path>.+?)(?:::(?P<population>[^\[\]]+)?)?\[(?P<row>-?\d+)\]$")
_EXPECTED = "expected a .safetensors or .pt file, a folder or index of shards, or ZOO.h5::POPULATION[ROW]"


@dataclass(frozen=True)
class Network:
    """One network: its weights and, when known, how to rebuild it.

    Args:
        weights: tensors under their ``state_dict`` names, no batch axes.
        architecture: JSON for ``nets.build``; None when the checkpoint does not say.
        name: where it was read.
        files: that hold it.
        recipe: from which the zoo was made whose row it is.
    """

    weights: Mapping[str, Tensor]
    architecture: Mapping[str, Any] | None
    name: str
    files: tuple[Path, ...] = ()
    recipe: Mapping[str, Any] | None = field(default=None, repr=False)

    def spec(self) -> WeightSpec:
        """The spec of a built-in architecture.

        Raises:
            CheckpointError: the architecture is unknown, or the weights do not fit it.
        """
        if self.architecture is None:
            raise CheckpointError(
                f"{self.name}: no architecture is stored beside the weights; pass --architecture, for instance "
                '\'{"kind": "mlp", "arguments": {"widths": [2, 32, 32, 1]}}\''
            )
        spec = spec_of(build(self.architecture))
        try:
            batch = spec.batch_shape(self.weights)
            spec.flatten(self.weights)
        except SpecError as error:
            raise CheckpointError(f"{self.name}: does not fit its architecture: {error}") from None
        if batch:
            raise CheckpointError(f"{self.name}: expected one network, found a batch of shape {list(batch)}")
        return spec

    @property
    def short_name(self) -> str:
        """For the name of a file: that of its own file, or population and row.

        Example:
            >>> Network({}, None, "zoos/digits.h5::inr[3]").short_name
            'inr-3'
        """
        row = _ROW.match(self.name)
        if row:
            return f"{row['population'] or Path(row['path']).stem}-{row['row']}"
        return Path(self.name.rstrip("/")).name.removesuffix(INDEX).removesuffix(Path(self.name).suffix)

    def is_same(self, other: Network) -> bool:
        """Whether both are read from the same place, through links too."""
        shared = any(os.path.samefile(a, b) for a in self.files for b in other.files)
        return shared and self._place == other._place

    @property
    def _place(self) -> tuple[str, int] | None:
        """Population and row, if it is of a zoo."""
        row = _ROW.match(self.name)
        if row is None or Path(self.name).exists():
            return None
        zoo = Zoo.open(row["path"])
        population = row["population"] or next(iter(zoo))
        return population, int(row["row"]) % zoo[population].rows

    def digests(self) -> dict[str, str]:
        """SHA-256 of its files by name, which reads all of them; of a zoo, the digest that it states."""
        if _ROW.match(self.name):
            return {path.name: stored_digest(path) for path in self.files}
        return {path.name: f"sha256:{_sha256(path)}" for path in self.files}


def open_network(reference: str | Path, architecture: Mapping[str, Any] | None = None) -> Network:
    """Open a checkpoint; each of its tensors is read when it is asked for.

    Args:
        reference: ``file.safetensors``; ``model.safetensors.index.json`` or its folder, for shards; ``file.pt``, a
            state dict, or a dict with one under ``state_dict``, ``model_state_dict`` or ``model``; or
            ``ZOO.h5::POPULATION[ROW]``, where the population may be left out when the zoo has one.
        architecture: for files that do not store one.

    Raises:
        CheckpointError: missing, truncated, damaged, not a state dict, or a row that the zoo does not have; nothing
            is unpickled but tensors.
        ZooError: the zoo cannot be opened.
    """
    text = str(reference)
    row = _ROW.match(text)
    if row and not Path(text).exists():
        return _zoo_row(row["path"], row["population"], int(row["row"]), text)
    path = Path(text)
    if path.is_dir():
        path = find_index(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise CheckpointError(f"{text}: file not found; {_EXPECTED}")
    if path.suffix in (".h5", ".hdf5"):
        raise CheckpointError(f"{text}: name one network of the zoo, as in {text}::POPULATION[ROW]")
    found = _opened(path, text, architecture)
    if not found.weights:
        raise CheckpointError(f"{text}: expected the tensors of a network, found none")
    return found


def load_network(reference: str | Path, architecture: Mapping[str, Any] | None = None) -> Network:
    """What :func:`open_network` opens, with all tensors in memory.

    Raises:
        CheckpointError, ZooError: see there.
    """
    found = open_network(reference, architecture)
    return replace(found, weights={name: found.weights[name].clone() for name in found.weights})


def _opened(path: Path, text: str, architecture: Mapping[str, Any] | None) -> Network:
    if path.name.endswith(INDEX):
        shards = ShardedWeights(path)
        return Network(shards, architecture or _architecture(path, shards.metadata), text, shards.files)
    if path.suffix == ".safetensors":
        single = SafetensorsWeights(path)
        return Network(single, architecture or _architecture(path, single.metadata), text, (path,))
    return Network(read_state_dict(path), architecture, text, (path,))


def _zoo_row(path: str, population: str | None, row: int, text: str) -> Network:
    zoo = Zoo.open(path)
    if population is None and len(zoo.populations) > 1:
        raise ZooError(f"{text}: the zoo has several populations, name one of {', '.join(zoo)}")
    chosen = zoo[population or next(iter(zoo))]
    if not -chosen.rows <= row < chosen.rows:
        raise CheckpointError(f"{text}: expected a row in 0 .. {chosen.rows - 1}, found {row}")
    weights = HeldWeights(chosen.weights_of(row))
    return Network(weights, chosen.architecture, text, (Path(path),), zoo.recipe)


def _architecture(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
    if "architecture" not in metadata:
        return None
    try:
        stored = json.loads(metadata["architecture"])
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: not a readable safetensors file (its architecture is no JSON object)")
    return stored


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
