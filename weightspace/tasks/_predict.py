"""Write what a trained metanetwork says of the networks of a zoo."""

from __future__ import annotations

import csv
from collections.abc import Mapping
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
from weightspace.tasks._run import OpenedPopulation, TrainedRun, guard, load_run, open_splits, outputs_of
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
    where: str | None = None,
    overwrite: bool = False,
) -> PredictReport:
    """Write predictions as CSV: one line per row of the zoo, whether or not it has the target.

    The columns are ``row`` (of the population), ``network``, ``split``, ``prediction``, for classification
    ``probability_0``, ``probability_1``, ..., and ``target`` when the zoo has it; of several populations, their names
    come first, in a column ``population``. Numbers have nine digits, from which a float32 is read back exactly.

    Args:
        run: a finished run directory.
        zoo: with networks of the same weight space, or others that the metanetwork reads.
        output: the CSV file to write.
        split: ``"train"``, ``"val"``, ``"test"`` or ``"all"``.
        population: which one, for zoos with several; ``"all"``, or several between commas, for metanetworks that read
            networks of several weight spaces. That of the run by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights that are not finite; they are refused otherwise.
        where: which rows are predicted, see :func:`weightspace.zoo.rows_where`; all of the split without one.
        overwrite: replace an existing file.

    Raises:
        RunError: not a finished run, or the zoo holds networks that the metanetwork cannot read.
        OutputError: ``output`` exists, or cannot be written.
        TaskError: the run edits networks, or the zoo holds some with weights that are not finite.
        ZooError: the zoo cannot be opened.
        ConfigError: an unknown split or population, or a ``where`` that does not suit the zoo or leaves nothing.
    """
    check_output(Path(output), overwrite=overwrite)
    device = choose_device(device)
    trained = load_run(run)
    if trained.task.out_features is None:
        raise TaskError(
            f"run {trained.path}: task {trained.task.name} gives weights and no table; use `weightspace edit`"
        )
    opened = open_splits(
        trained, zoo, None if split == "all" else split, population=population, skip_bad=skip_bad, where=where
    )
    with guard(trained, device):
        table = _joined({part.name: _answers(trained, part, device) for part in opened})
    with atomic_path(Path(output), overwrite=overwrite) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))
    return PredictReport(
        run=trained.path,
        zoo=str(opened[0].dataset.zoo.path),
        task=trained.config.task,
        model=trained.config.model,
        split=split,
        networks=sum(len(part.dataset) for part in opened),
        skipped=sum(part.dataset.skipped for part in opened),
        columns=tuple(table),
        output=Path(output),
    )


def _answers(trained: TrainedRun, part: OpenedPopulation, device: str) -> dict[str, list[Any]]:
    readout, _ = outputs_of(part.network, trained.task, part.dataset, device, trained.config.batch_size)
    return _table(trained.task, readout, part.dataset, trained.config.target)


def _joined(tables: Mapping[str, dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Tables by population as one, with the columns that all have; of one population, its table."""
    first, *others = tables.values()
    if not others:
        return first
    shared = [column for column in first if all(column in other for other in others)]
    names = [name for name, table in tables.items() for _ in table["row"]]
    return {
        "population": names,
        **{column: [cell for table in tables.values() for cell in table[column]] for column in shared},
    }


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
