"""Score a trained metanetwork on a split, usually the test split, which training never reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from weightspace.datasets import ZooDataset
from weightspace.devices import choose_device
from weightspace.errors import RunError
from weightspace.tasks._config import write_text
from weightspace.tasks._run import TrainedRun, check_zoo, load_run, outputs_of


@dataclass(frozen=True)
class EvaluateReport:
    """Scores of a run on one split."""

    run: Path
    zoo: str
    task: str
    model: str
    split: str
    networks: int
    metrics: dict[str, float]
    figure: Path
    skipped: int = 0


def evaluate(
    run: str | Path, zoo: str | Path | None = None, *, split: str = "test", device: str = "auto"
) -> EvaluateReport:
    """Score a run; writes ``evaluation-<split>.json`` and a figure into it.

    Args:
        run: a finished run directory.
        zoo: another zoo of the same weight space; the one that it was trained on by default.
        split: ``"train"``, ``"val"`` or ``"test"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Raises:
        RunError: not a finished run, or the zoo holds networks of another weight space.
        ZooError: the zoo cannot be opened.
        TaskError: the zoo lacks the target.
    """
    device = choose_device(device)
    trained = load_run(run)
    config = trained.config
    dataset = ZooDataset(
        zoo if zoo is not None else config.zoo, split, target=config.target, population=config.population
    )
    _check_fit(trained, dataset, zoo is not None)
    trained.task.check(dataset)
    outputs, targets = outputs_of(trained.network, dataset, device)
    report = EvaluateReport(
        run=trained.path,
        zoo=str(dataset.zoo.path),
        task=config.task,
        model=config.model,
        split=split,
        networks=len(dataset),
        metrics=trained.task.scores(outputs, targets),
        figure=trained.path / f"{split}.png",
        skipped=dataset.skipped,
    )
    monitor = trained.task.monitor
    trained.task.figure(
        outputs,
        targets,
        report.figure,
        f"{config.model}, {split}, {monitor} {report.metrics[monitor]:.3f}",
    )
    summary = {**report.__dict__, "run": str(report.run), "figure": report.figure.name}
    write_text(trained.path / f"evaluation-{split}.json", json.dumps(summary))
    return report


def _check_fit(trained: TrainedRun, dataset: ZooDataset, other: bool) -> None:
    """Raise RunError when the metanetwork cannot read these networks, or its own zoo has changed."""
    if not other:
        check_zoo(trained.path, dataset.zoo)
    if dataset.spec != trained.spec:
        raise RunError(
            f"run {trained.path}: trained on networks with other activations or symmetries than those of "
            f"{dataset.zoo.path}"
            if trained.spec.num_parameters == dataset.spec.num_parameters
            else f"run {trained.path}: trained on networks of {trained.spec.num_parameters} parameters, but those "
            f"of {dataset.zoo.path} have {dataset.spec.num_parameters}"
        )
    runs_them = trained.config.model_options().reads == "raw"
    if runs_them and dataset.population.architecture != trained.architecture:
        raise RunError(
            f"run {trained.path}: runs networks of architecture {trained.architecture}, but those of "
            f"{dataset.zoo.path} are {dataset.population.architecture}"
        )
