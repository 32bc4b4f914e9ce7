"""A run directory: what training leaves behind, and what evaluation reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightspace.datasets import Normalisation, ZooDataset
from weightspace.errors import RunError, WeightspaceError
from weightspace.models import StatisticsTrees
from weightspace.spec import Weights, WeightSpec
from weightspace.tasks._config import TrainConfig, load_config, write_text
from weightspace.tasks._registry import TASKS, Task
from weightspace.zoo import Zoo

PARAMETERS = "model.safetensors"
TREES = "trees.skops"
DESCRIPTION = "model.json"
ZOO = "zoo.json"


class Metanetwork(nn.Module):
    """Normalisation and model: raw weights in, outputs out."""

    def __init__(self, model: nn.Module, normalisation: Normalisation | None) -> None:
        super().__init__()
        self.model, self.normalisation = model, normalisation

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        out: Tensor = self.model(weights if self.normalisation is None else self.normalisation(weights))
        return out


@dataclass(frozen=True)
class TrainedRun:
    """A run as read from disk."""

    path: Path
    config: TrainConfig
    spec: WeightSpec
    network: Metanetwork
    task: Task
    architecture: Mapping[str, Any] | None


def build_network(
    config: TrainConfig, spec: WeightSpec, architecture: Mapping[str, Any] | None, task: Task
) -> Metanetwork:
    """The metanetwork of a configuration, with fresh parameters and a normalisation that does nothing yet."""
    options = config.model_options()
    model = options.build(spec, architecture, task.out_features)
    plain = config.normalisation == "none" or options.reads == "raw"
    return Metanetwork(model, None if plain else Normalisation(spec, config.normalisation))


def save_network(run: Path, network: Metanetwork, dataset: ZooDataset, task: Task) -> None:
    """Write the parameters, and what is needed to rebuild the metanetwork around them."""
    description = {
        "spec": json.loads(dataset.spec.to_json(provenance=False)),
        "architecture": dataset.population.architecture,
        "task": task.state(),
    }
    if isinstance(network.model, StatisticsTrees):
        network.model.save(run / TREES)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, run / PARAMETERS)
    # written last: a run with this file is complete
    write_text(run / DESCRIPTION, json.dumps(description))


def save_digest(run: Path, zoo: Zoo) -> None:
    """Remember which content a run is trained on."""
    write_text(run / ZOO, json.dumps({"digest": zoo.digest}))


def check_zoo(run: Path, zoo: Zoo) -> None:
    """Raise RunError when the zoo's content is not that on which the run was begun.

    Its splits may be others, so that what was trained on would count as unseen.
    """
    try:
        begun_with = json.loads((run / ZOO).read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"run {run}: {ZOO} is missing or damaged; train again with --overwrite") from None
    if begun_with != zoo.digest:
        raise RunError(
            f"run {run}: zoo {zoo.path} has changed since training began (digest {begun_with} then, "
            f"{zoo.digest} now); train again with --overwrite, or into another directory"
        )


def load_run(path: str | Path) -> TrainedRun:
    """Read a trained metanetwork.

    Raises:
        RunError: not a run, training has not finished, or its files are damaged.
    """
    run = Path(path)
    config = load_config(run)
    if not (run / DESCRIPTION).is_file() or not (run / PARAMETERS).is_file():
        raise RunError(
            f"run {run}: no trained model: {DESCRIPTION} is missing; finish `weightspace train` first"
        )
    try:
        description = json.loads((run / DESCRIPTION).read_text())
        spec = WeightSpec.from_json(json.dumps(description["spec"]))
        task = TASKS[config.task].from_state(description["task"])
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


def outputs_of(
    network: nn.Module, dataset: ZooDataset, device: str, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Outputs and targets of a whole split, in its order."""
    network = network.to(device).eval()
    outputs, targets = [], []
    with torch.no_grad():
        for weights, target in dataset.batches(batch_size):
            outputs.append(network({name: w.to(device) for name, w in weights.items()}).cpu())
            targets.append(target.cpu())
    return torch.cat(outputs), torch.cat(targets)
