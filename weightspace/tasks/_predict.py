"""Write what a trained metanetwork says of the networks of a zoo."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightspace.datasets import ZooDataset, target_values
from weightspace.devices import choose_device
from weightspace.errors import TaskError
from weightspace.tasks._registry import Task
from weightspace.tasks._run import guard, load_run, open_split, outputs_of
from weightspace.zoo import SPLITS, atomic_path, check_output


@dataclass(frozen=True)
class PredictReport:
    """What was written; ``skipped`` counts networks that were left out."""

    run: Path
    zoo: str
    task: str
    model: str
    split: str
    networks: int
    skipped: int
    columns: tuple[str, ...]
    output: Path


def predict(
    run: str | Path,
    zoo: str | Path,
    output: str | Path,
    *,
    split: str = "all",
    population: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    overwrite: bool = False,
) -> PredictReport:
    """Write predictions as CSV: one line per row of the zoo, whether or not it has the target.

    The columns are ``row`` (of the population), ``network``, ``split``, ``prediction``, for classification
    ``probability_0``, ``probability_1``, ..., and ``target`` when the zoo has it. Numbers have nine digits, from
    which a float32 is read back exactly.

    Args:
        run: a finished run directory.
        zoo: with networks of the same weight space, or others that the metanetwork reads.
        output: the CSV file to write.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``.
        population: which one, for zoos with several; that of the run by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights that are not finite; they are refused otherwise.
        overwrite: replace an existing file.

    Raises:
        RunError: not a finished run, or the zoo holds networks that the metanetwork cannot read.
        OutputError: ``output`` exists, or cannot be written.
        TaskError: the run edits networks, or the zoo holds some with weights that are not finite.
        ZooError: the zoo cannot be opened.
    """
    check_output(Path(output), overwrite=overwrite)
    device = choose_device(device)
    trained = load_run(run)
    if trained.task.out_features is None:
        raise TaskError(
            f"run {trained.path}: task {trained.task.name} gives weights and no table; use `weightspace edit`"
        )
    dataset, network = open_split(
        trained, zoo, None if split == "all" else split, population=population, skip_bad=skip_bad
    )
    with guard(trained, device):
        readout, _ = outputs_of(network, trained.task, dataset, device, trained.config.batch_size)
        table = _table(trained.task, readout, dataset, trained.config.target)
    with atomic_path(Path(output), overwrite=overwrite) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return PredictReport(
        run=trained.path,
        zoo=str(dataset.zoo.path),
        task=trained.config.task,
        model=trained.config.model,
        split=split,
        networks=len(dataset),
        skipped=dataset.skipped,
        columns=tuple(table),
        output=Path(output),
    )


def _table(task: Task, readout: Tensor, dataset: ZooDataset, target: str | None) -> dict[str, list[Any]]:
    """Columns by name, in their order."""
    population, rows = dataset.population, dataset.rows
    network = population.network[rows]
    table: dict[str, list[Any]] = {
        "row": rows.tolist(),
        "network": network.tolist(),
        "split": np.asarray(SPLITS)[population.split[network]].tolist(),
    }
    table.update({name: _cells(values) for name, values in task.predictions(readout).items()})
    known = None if target is None else target_values(population, target, rows)
    return table if known is None else {**table, "target": _cells(known)}


def _cells(values: Tensor) -> list[Any]:
    return (
        [f"{value:.9g}" for value in values.tolist()] if torch.is_floating_point(values) else values.tolist()
    )
