"""Score a trained metanetwork on a split, usually the test split, which training never reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightspace.datasets import ZooDataset, parse_augmentations, population_names
from weightspace.devices import choose_device
from weightspace.errors import ConfigError, WeightspaceError
from weightspace.tasks._config import write_json
from weightspace.tasks._linear_probe import LinearProbe
from weightspace.tasks._registry import TASKS, Task, task_options
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
    number of networks and the scores of each, where there are several. With a ``target`` the scores are those of a
    linear probe of it.
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
    target: str | None = None


def evaluate(
    run: str | Path,
    zoo: str | Path | None = None,
    *,
    split: str = "test",
    target: str | None = None,
    population: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
    where: str | None = None,
) -> EvaluateReport:
    """Score a run; writes ``evaluation-<split>.json`` and a figure, ``<split>.png``, into it.

    For another zoo or population than the run's own the names say which: ``evaluation-test-mine-1f0c9a3e.json`` holds
    the scores on the zoo ``mine.h5`` whose digest begins so, and ``evaluation-test-where-0b7cc1f3.json`` those of other
    rows than the run's own, ``evaluation-test-target-label.json`` those of a linear probe.

    Args:
        run: a finished run directory.
        zoo: another one, whose networks the metanetwork can read; the one that it was trained on by default.
        split: ``"train"``, ``"val"`` or ``"test"``.
        target: of a run that gives embeddings, the label, hyperparameter or metric that a linear probe is to read from
            them. It is fitted to the training split of the zoo that is scored (:class:`LinearProbe`), and has the scores
            of classification for integers and of regression for other numbers. Without one the run's own task is scored.
        population: which one, for zoos with several; ``"all"``, or several between commas, for metanetworks that read
            networks of several weight spaces. That of the run by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights or targets that are not finite; they are refused otherwise.
        where: which rows are scored, and of the other splits a linear probe is fitted to, see
            :func:`weightspace.zoo.rows_where`; those of the run by default, and all of the split for an empty text.

    Raises:
        RunError: not a finished run, or the zoo holds networks that the metanetwork cannot read.
        ZooError: the zoo cannot be opened.
        TaskError: the zoo lacks the target, or holds networks with weights that are not finite.
        ConfigError: an unknown split or population, a ``where`` that does not suit the zoo or leaves nothing, or a
            ``target`` for a run that gives no embeddings, or for several populations.
    """
    device = choose_device(device)
    trained = load_run(run)
    config = trained.config
    chosen = config.where if where is None else where or None
    opening = partial(
        open_splits,
        trained,
        zoo,
        population=population,
        skip_bad=skip_bad,
        where=chosen,
        target=target or config.target,
    )
    if target is not None:
        _check_probed(trained, target)
    opened = opening(split)
    name = f"{split}{_suffix(trained, opened[0].dataset.zoo, population, chosen, target)}"
    with guard(trained, device):
        if target is None:
            task, parts = trained.task, [_answered(trained, part, device) for part in opened]
        else:
            task, answers = _probed(trained, opening("train"), opening("val"), opened, device)
            parts = [answers]
    whole = _joined(parts)
    report = EvaluateReport(
        run=trained.path,
        zoo=str(opened[0].dataset.zoo.path),
        task=config.task,
        model=config.model,
        split=split,
        networks=len(whole.unit),
        metrics=task.scores(whole.readout, whole.targets),
        figure=trained.path / f"{name}.png",
        skipped=sum(part.dataset.skipped for part in opened),
        reference={} if whole.reference is None else task.scores(whole.reference, whole.targets),
        intervals=task.intervals(whole.readout, whole.targets, whole.unit),
        where=chosen,
        populations=_by_population(task, opened, parts) if len(opened) > 1 else {},
        target=target,
    )
    probed = "" if target is None else f"{target} from a linear probe, "
    title = f"{config.model}, {split}, {probed}{task.monitor} {report.metrics[task.monitor]:.3f}"
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
    if task.copies > 1:
        dataset.copies, dataset.seed = task.copies, trained.config.seed
        dataset.augment = parse_augmentations(trained.config.augment)
    reference = task.reference(dataset)
    readout, targets = outputs_of(part.network, task, dataset, device, trained.config.batch_size)
    return _Answers(readout, targets, reference, _unit(dataset))


def _unit(dataset: ZooDataset) -> np.ndarray:
    """Networks of one item, such as a network and its pruned copies, are no more independent than checkpoints."""
    unit: np.ndarray = dataset.population.source[dataset.population.network[dataset.rows]]
    return unit


def _check_probed(trained: TrainedRun, target: str) -> None:
    """Raise ConfigError for a run of which there is no linear probe, or a target without a name."""
    if not trained.task.embeds:
        raise ConfigError(
            f"target: expected none for task {trained.task.name}, which is scored on what it was trained for, found "
            f"{target!r}; linear probes are for tasks that give embeddings"
        )
    if not target:
        raise ConfigError(f"target: expected a label, hyperparameter or metric, found {target!r}")


def _probed(
    trained: TrainedRun,
    train: Sequence[OpenedPopulation],
    val: Sequence[OpenedPopulation],
    scored: Sequence[OpenedPopulation],
    device: str,
) -> tuple[Task, _Answers]:
    """What a linear probe of the embeddings says, and the task whose scores it gets.

    Raises:
        ConfigError: networks of several populations.
    """
    if len(scored) > 1:
        raise ConfigError(f"population: expected one for a linear probe, found {len(scored)}")
    parts = [opened[0] for opened in (train, val, scored)]
    fitted_to, dataset = parts[0].dataset, parts[2].dataset
    name = "regression" if fitted_to.targets.is_floating_point() else "classification"
    task = TASKS[name].from_data(fitted_to, task_options(name))
    targets = [task.targets(part.dataset) for part in parts]
    features = [_embedding(trained, part, device) for part in parts]
    train_pair, val_pair = zip(features[:2], targets[:2], strict=True)
    probe = LinearProbe.fit(train_pair, val_pair, classes=task.classes)
    return task, _Answers(probe(features[2]), targets[2], None, _unit(dataset))


def _embedding(trained: TrainedRun, part: OpenedPopulation, device: str) -> Tensor:
    """Embeddings of networks as they are, (networks, features)."""
    readout, _ = outputs_of(part.network, trained.task, part.dataset, device, trained.config.batch_size)
    return torch.stack(list(trained.task.predictions(readout).values()), dim=1)


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
            "networks": len(answers.unit),
            "metrics": task.scores(answers.readout, answers.targets),
        }
        for part, answers in zip(opened, parts, strict=True)
    }


def _suffix(
    trained: TrainedRun, zoo: Zoo, population: str | None, where: str | None, target: str | None
) -> str:
    """What tells results on another zoo, other populations, other rows or a probe from those on the run's own."""
    parts: list[str] = []
    assert zoo.path is not None
    if zoo.digest != digest_of(trained.path):
        parts += [zoo.path.stem, zoo.digest.partition(":")[2][:8]]
    names = [] if population is None else sorted(population_names(zoo, population))
    if len(zoo.populations) > 1 and names and names != _own(zoo, trained.config.population):
        parts.append(names[0] if len(names) == 1 else f"{len(names)}-populations-{_hashed(','.join(names))}")
    if where != trained.config.where:
        parts.append(f"where-{_hashed(where or '')}" if where else "where-all")
    if target is not None:
        parts.append(f"target-{re.sub(r'[^A-Za-z0-9_.]+', '-', target)}")
    return "".join(f"-{part}" for part in parts)


def _own(zoo: Zoo, chosen: str | None) -> list[str]:
    """The populations of the run, if the zoo has them."""
    try:
        return sorted(population_names(zoo, chosen))
    except WeightspaceError:
        return []


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
