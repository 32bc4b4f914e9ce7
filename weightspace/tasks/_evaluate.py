"""Score a trained metanetwork on a split, usually the test split, which training never reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightspace.datasets import population_names
from weightspace.devices import choose_device
from weightspace.errors import WeightspaceError
from weightspace.tasks._config import write_json
from weightspace.tasks._registry import Task
from weightspace.tasks._run import (
    OpenedPopulation,
    TrainedRun,
    digest_of,
    guard,
    load_run,
    open_splits,
    outputs_of,
)
from weightspace.zoo import Zoo


@dataclass(frozen=True)
class EvaluateReport:
    """Scores of a run on one split.

    ``reference`` are the scores of a trivial answer, such as leaving networks unedited; empty if the task knows of
    none. ``skipped`` counts networks that were left out because something of them is not finite. ``intervals`` are
    95 % confidence intervals of some of the scores, ``where`` the rows that were scored, and ``populations`` the
    number of networks and the scores of each, where there are several.
    """

    run: Path
    zoo: str
    task: str
    model: str
    split: str
    networks: int
    metrics: dict[str, float]
    figure: Path
    skipped: int = 0
    reference: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    where: str | None = None
    populations: dict[str, dict[str, Any]] = field(default_factory=dict)


def evaluate(
    run: str | Path,
    zoo: str | Path | None = None,
    *,
    split: str = "test",
    population: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    where: str | None = None,
) -> EvaluateReport:
    """Score a run; writes ``evaluation-<split>.json`` and a figure, ``<split>.png``, into it.

    For another zoo or population than the run's own the names say which: ``evaluation-test-mine-1f0c9a3e.json`` holds
    the scores on the zoo ``mine.h5`` whose digest begins so, and ``evaluation-test-where-0b7cc1f3.json`` those of other
    rows than the run's own.

    Args:
        run: a finished run directory.
        zoo: another one, whose networks the metanetwork can read; the one that it was trained on by default.
        split: ``"train"``, ``"val"`` or ``"test"``.
        population: which one, for zoos with several; ``"all"``, or several between commas, for metanetworks that read
            networks of several weight spaces. That of the run by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights or targets that are not finite; they are refused otherwise.
        where: which rows are scored, see :func:`weightspace.zoo.rows_where`; those of the run by default, and all of
            the split for an empty text.

    Raises:
        RunError: not a finished run, or the zoo holds networks that the metanetwork cannot read.
        ZooError: the zoo cannot be opened.
        TaskError: the zoo lacks the target, or holds networks with weights that are not finite.
        ConfigError: an unknown split or population, or a ``where`` that does not suit the zoo or leaves nothing.
    """
    device = choose_device(device)
    trained = load_run(run)
    config, task = trained.config, trained.task
    chosen = config.where if where is None else where or None
    opened = open_splits(
        trained, zoo, split, target=config.target, population=population, skip_bad=skip_bad, where=chosen
    )
    name = f"{split}{_suffix(trained, opened[0].dataset.zoo, population, chosen)}"
    with guard(trained, device):
        parts = [_answered(trained, part, device) for part in opened]
    whole = _joined(parts)
    report = EvaluateReport(
        run=trained.path,
        zoo=str(opened[0].dataset.zoo.path),
        task=config.task,
        model=config.model,
        split=split,
        networks=len(whole.readout),
        metrics=task.scores(whole.readout, whole.targets),
        figure=trained.path / f"{name}.png",
        skipped=sum(part.dataset.skipped for part in opened),
        reference={} if whole.reference is None else task.scores(whole.reference, whole.targets),
        intervals=task.intervals(whole.readout, whole.targets, whole.unit),
        where=chosen,
        populations=_by_population(task, opened, parts) if len(opened) > 1 else {},
    )
    title = f"{config.model}, {split}, {task.monitor} {report.metrics[task.monitor]:.3f}"
    task.figure(whole.readout, whole.targets, report.figure, title, reference=whole.reference)
    summary = {**report.__dict__, "run": str(report.run), "figure": report.figure.name}
    write_json(trained.path / f"evaluation-{name}.json", summary)
    return report


@dataclass(frozen=True)
class _Answers:
    """What a metanetwork says of some networks, what is true, and which of them belong together."""

    readout: Tensor
    targets: Tensor
    reference: Tensor | None
    unit: np.ndarray


def _answered(trained: TrainedRun, part: OpenedPopulation, device: str) -> _Answers:
    dataset, task = part.dataset, trained.task
    dataset.targets = task.targets(dataset)
    reference = task.reference(dataset)
    readout, targets = outputs_of(part.network, task, dataset, device, trained.config.batch_size)
    # networks of one item, such as a network and its pruned copies, are no more independent than checkpoints
    unit = dataset.population.source[dataset.population.network[dataset.rows]]
    return _Answers(readout, targets, reference, unit)


def _joined(parts: Sequence[_Answers]) -> _Answers:
    if len(parts) == 1:
        return parts[0]
    references = [part.reference for part in parts if part.reference is not None]
    numbered = [np.stack([np.full_like(part.unit, at), part.unit]) for at, part in enumerate(parts)]
    return _Answers(
        torch.cat([part.readout for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat(references) if references else None,
        np.unique(np.concatenate(numbered, axis=1), axis=1, return_inverse=True)[1].reshape(-1),
    )


def _by_population(
    task: Task, opened: Sequence[OpenedPopulation], parts: Sequence[_Answers]
) -> dict[str, dict[str, Any]]:
    """How many networks each population has, and its scores."""
    return {
        part.name: {
            "networks": len(answers.readout),
            "metrics": task.scores(answers.readout, answers.targets),
        }
        for part, answers in zip(opened, parts, strict=True)
    }


def _suffix(trained: TrainedRun, zoo: Zoo, population: str | None, where: str | None) -> str:
    """What tells results on another zoo, other populations or other rows from those on the run's own."""
    parts: list[str] = []
    assert zoo.path is not None
    if zoo.digest != digest_of(trained.path):
        parts += [zoo.path.stem, zoo.digest.partition(":")[2][:8]]
    names = [] if population is None else sorted(population_names(zoo, population))
    if len(zoo.populations) > 1 and names and names != _own(zoo, trained.config.population):
        parts.append(names[0] if len(names) == 1 else f"{len(names)}-populations-{_hashed(','.join(names))}")
    if where != trained.config.where:
        parts.append(f"where-{_hashed(where or '')}" if where else "where-all")
    return "".join(f"-{part}" for part in parts)


def _own(zoo: Zoo, chosen: str | None) -> list[str]:
    """The populations of the run, if the zoo has them."""
    try:
        return sorted(population_names(zoo, chosen))
    except WeightspaceError:
        return []


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
