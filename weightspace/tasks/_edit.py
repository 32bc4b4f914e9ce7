"""Write a zoo whose networks were edited by a trained metanetwork."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import mse_loss

from weightspace.datasets import ZooDataset
from weightspace.devices import choose_device
from weightspace.errors import TaskError
from weightspace.tasks._run import PARAMETERS, TrainedRun, batches_of, guard, load_run, open_split
from weightspace.zoo import Population, Zoo, check_output


@dataclass(frozen=True)
class EditReport:
    """What was written; ``mse_before`` and ``mse_after`` compare what networks render with the edited images."""

    run: Path
    zoo: str
    task: str
    model: str
    split: str
    networks: int
    skipped: int
    mse_before: float
    mse_after: float
    output: Path
    digest: str


def edit(
    run: str | Path,
    zoo: str | Path,
    output: str | Path,
    *,
    split: str = "all",
    population: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    where: str | None = None,
    overwrite: bool = False,
) -> EditReport:
    """Write the networks of a zoo with edited weights, as a zoo.

    Networks, labels, hyperparameters, splits and stored signals stay; weights are float32. The metrics of training no
    longer hold and give way to ``edit_mse``, the mean squared error between what a network renders now and the
    edited image. What was done stands in the protocol of the population, under ``edited``, and in the recipe.

    Args:
        run: a finished run directory of a task that gives weights.
        zoo: with networks of the same weight space.
        output: the zoo to write.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``; only these networks are written.
        population: which one, for zoos with several; that of the run by default. Only this one is written.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights that are not finite; they are refused otherwise.
        where: which rows are edited and written, see :func:`weightspace.zoo.rows_where`; all of the split without
            one.
        overwrite: replace an existing file.

    Raises:
        RunError: not a finished run, or the zoo holds networks of another weight space.
        OutputError: ``output`` exists, or cannot be written.
        TaskError: the run edits nothing, or the zoo holds networks with weights that are not finite.
        ZooError: the zoo cannot be opened.
        ConfigError: an unknown split or population, or a ``where`` that does not suit the zoo or leaves nothing.
    """
    check_output(Path(output), overwrite=overwrite)
    device = choose_device(device)
    trained = load_run(run)
    if trained.task.out_features is not None:
        raise TaskError(
            f"run {trained.path}: task {trained.task.name} gives no weights; use `weightspace predict`"
        )
    dataset = open_split(
        trained, zoo, None if split == "all" else split, population=population, skip_bad=skip_bad, where=where
    ).dataset
    with guard(trained, device):
        dataset.targets = trained.task.targets(dataset)
        before = _error(trained, dataset)
        weights, errors = _edited(trained, dataset, device)
    provenance = _provenance(trained, dataset, split)
    edited = _population(dataset, weights, errors, provenance)
    name = next(name for name in dataset.zoo if dataset.zoo[name] is dataset.population)
    recipe = {"name": f"edited by {trained.path.name}", "edited": provenance, "original": dataset.zoo.recipe}
    written = Zoo({name: edited}, dataset.zoo.sources, recipe).save(output, overwrite=overwrite)
    return EditReport(
        run=trained.path,
        zoo=str(dataset.zoo.path),
        task=trained.config.task,
        model=trained.config.model,
        split=split,
        networks=edited.networks,
        skipped=dataset.skipped,
        mse_before=before,
        mse_after=float(errors.mean()),
        output=written,
        digest=Zoo.open(written).digest,
    )


def _error(trained: TrainedRun, dataset: ZooDataset) -> float:
    """Mean squared error of networks that are left as they are."""
    reference = trained.task.reference(dataset)
    return float("nan") if reference is None else float(mse_loss(reference, dataset.targets))


def _edited(trained: TrainedRun, dataset: ZooDataset, device: str) -> tuple[np.ndarray, np.ndarray]:
    """Flat weights (rows, parameters) and the error of each network (rows,), float32."""
    weights, errors = [], []
    for outputs, targets in batches_of(trained.network, dataset, device, trained.config.batch_size):
        assert not isinstance(outputs, torch.Tensor)
        with torch.no_grad():
            difference = trained.task.readout(outputs).cpu() - targets.cpu()
        weights.append(dataset.spec.flatten(outputs).cpu())
        errors.append(difference.square().flatten(1).mean(1))
    return torch.cat(weights).numpy(), torch.cat(errors).numpy()


def _provenance(trained: TrainedRun, dataset: ZooDataset, split: str) -> dict[str, Any]:
    """Which run edited which zoo, and how."""
    return {
        "run": trained.path.name,
        "parameters": f"sha256:{hashlib.sha256((trained.path / PARAMETERS).read_bytes()).hexdigest()}",
        "task": trained.config.task,
        "settings": dict(trained.config.task_options),
        "model": trained.config.model,
        "options": dict(trained.config.options),
        "zoo": dataset.zoo.digest,
        "split": split,
        "where": dataset.where or None,
        "skipped": dataset.skipped,
    }


def _population(
    dataset: ZooDataset, weights: np.ndarray, errors: np.ndarray, provenance: dict[str, Any]
) -> Population:
    """The population of a data set with other weights: its rows, and the networks that these belong to."""
    old = dataset.population
    kept, network = np.unique(old.network[dataset.rows], return_inverse=True)
    return replace(
        old,
        weights=weights,
        network=network.astype(np.int64),
        step=old.step[dataset.rows],
        source=old.source[kept],
        view=old.view[kept],
        split=old.split[kept],
        metrics={"edit_mse": errors},
        labels={name: values[kept] for name, values in old.labels.items()},
        hyperparameters={name: values[kept] for name, values in old.hyperparameters.items()},
        protocol={**old.protocol, "edited": provenance},
        dtype="float32",
    )
