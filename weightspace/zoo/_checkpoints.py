"""Single networks in and out: a row of a zoo, or a checkpoint file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightspace.errors import CheckpointError, SpecError, ZooError
from weightspace.nets import build
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo._architectures import spec_of
from weightspace.zoo._files import atomic_path, canonical_json, check_output
from weightspace.zoo._zoo import Zoo

_ROW = re.compile(r"^(?P<path>.+?)(?:::(?P<population>[^\[\]]+)?)?\[(?P<row>-?\d+)\]$")


@dataclass(frozen=True)
class Network:
    """One network: its weights and, when known, how to rebuild it.

    Args:
        weights: tensors under their ``state_dict`` names, no batch axes.
        architecture: JSON for ``nets.build``; None when the checkpoint does not say.
        name: where it was read.
    """

    weights: Weights
    architecture: Mapping[str, Any] | None
    name: str

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


def load_network(reference: str | Path, architecture: Mapping[str, Any] | None = None) -> Network:
    """Read ``ZOO.h5::POPULATION[ROW]``, ``file.safetensors`` or ``file.pt``; nothing is unpickled blindly.

    Args:
        reference: what to read; the population may be left out when the zoo has one.
        architecture: for files that do not store one.

    Raises:
        CheckpointError: missing, unreadable, not a state dict, or a row that the zoo does not have.
        ZooError: the zoo cannot be opened.
    """
    text = str(reference)
    row = _ROW.match(text)
    if row:
        return _zoo_row(row["path"], row["population"], int(row["row"]), text)
    path = Path(text)
    if not path.is_file():
        raise CheckpointError(
            f"{text}: file not found; expected a .safetensors or .pt file, or ZOO.h5::POPULATION[ROW]"
        )
    if path.suffix in (".h5", ".hdf5"):
        raise CheckpointError(f"{text}: name one network of the zoo, as in {text}::POPULATION[ROW]")
    weights, stored = _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), None)
    return Network(weights, architecture or stored, text)


def load_networks(
    references: Sequence[str | Path], architecture: Mapping[str, Any] | None = None
) -> tuple[WeightSpec, list[Network]]:
    """Networks of one weight space, to be aligned or merged; those that store no architecture take the others'.

    Raises:
        CheckpointError: a file cannot be read, no architecture is known, the networks differ in it, or one
            has NaN or infinite weights.
        ZooError: a zoo cannot be opened.
    """
    found = [load_network(reference, architecture) for reference in references]
    known = next((network.architecture for network in found if network.architecture is not None), None)
    networks = [Network(n.weights, n.architecture or known, n.name) for n in found]
    specs = [network.spec() for network in networks]
    for network, spec in zip(networks, specs, strict=True):
        if spec != specs[0] or network.architecture != networks[0].architecture:
            raise CheckpointError(
                f"{network.name}: its architecture differs from that of {networks[0].name}: "
                f"{canonical_json(network.architecture)} and {canonical_json(networks[0].architecture)}"
            )
        spoilt = [name for name, tensor in network.weights.items() if not tensor.isfinite().all()]
        if spoilt:
            raise CheckpointError(f"{network.name}: tensor {spoilt[0]!r} has values that are NaN or infinite")
    return specs[0], networks


def check_checkpoint_output(path: Path, *, overwrite: bool) -> None:
    """Raise now what :func:`save_network` would raise after the work."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"output: expected a name that ends in .safetensors, found {path}")
    check_output(path, overwrite=overwrite)


def save_network(
    path: str | Path,
    weights: Mapping[str, Tensor],
    architecture: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write one network as safetensors, with its architecture in the metadata.

    Raises:
        OutputError: ``path`` exists and ``overwrite`` is False, or it cannot be written.
        CheckpointError: ``path`` does not end in .safetensors.
    """
    path = Path(path)
    check_checkpoint_output(path, overwrite=overwrite)
    with atomic_path(path, overwrite=overwrite) as temporary:
        metadata = {"architecture": canonical_json(architecture)} if architecture else None
        save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, temporary, metadata)
    return path


def _zoo_row(path: str, population: str | None, row: int, text: str) -> Network:
    zoo = Zoo.open(path)
    if population is None and len(zoo.populations) > 1:
        raise ZooError(f"{text}: the zoo has several populations, name one of {', '.join(zoo)}")
    chosen = zoo[population or next(iter(zoo))]
    if not -chosen.rows <= row < chosen.rows:
        raise CheckpointError(f"{text}: expected a row in 0 .. {chosen.rows - 1}, found {row}")
    return Network(chosen.weights_of(row), chosen.architecture, text)


def _read_safetensors(path: Path) -> tuple[Weights, Mapping[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        stored = json.loads(metadata["architecture"]) if "architecture" in metadata else None
        if not isinstance(stored, dict | None):
            raise ValueError("its architecture is no JSON object")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    return weights, stored


def _read_pickle(path: Path) -> Weights:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for what is not a plain state dict
        raise CheckpointError(
            f"{path}: not a plain state dict that is safe to load ({type(error).__name__})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    return state
