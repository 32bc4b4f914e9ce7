"""Score a trained metanetwork on a split, usually the test split, which training never reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weightspace.datasets import ZooDataset
from weightspace.devices import choose_device
from weightspace.tasks._config import write_json
from weightspace.tasks._run import TrainedRun, digest_of, guard, load_run, open_split, outputs_of


@dataclass(frozen=True)
class EvaluateReport:
    """Scores of a run on one split.

    ``reference`` are the scores of a trivial answer, such as leaving networks unedited; empty if the task knows of
    none. ``skipped`` counts networks that were left out because something of them is not finite.
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


def evaluate(
    run: str | Path,
    zoo: str | Path | None = None,
    *,
    split: str = "test",
    population: str | None = None,
    device: str = "auto",
    skip_bad: bool = False,
) -> EvaluateReport:
    """Score a run; writes ``evaluation-<split>.json`` and a figure, ``<split>.png``, into it.

    For another zoo or population than the run's own the names say which: ``evaluation-test-mine-1f0c9a3e.json`` holds
    the scores on the zoo ``mine.h5`` whose digest begins so.

    Args:
        run: a finished run directory.
        zoo: another one, whose networks the metanetwork can read; the one that it was trained on by default.
        split: ``"train"``, ``"val"`` or ``"test"``.
        population: which one, for zoos with several; that of the run by default.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        skip_bad: leave out networks with weights or targets that are not finite; they are refused otherwise.

    Raises:
        RunError: not a finished run, or the zoo holds networks that the metanetwork cannot read.
        ZooError: the zoo cannot be opened.
        TaskError: the zoo lacks the target, or holds networks with weights that are not finite.
    """
    device = choose_device(device)
    trained = load_run(run)
    config, task = trained.config, trained.task
    dataset, network = open_split(
        trained, zoo, split, target=config.target, population=population, skip_bad=skip_bad
    )
    name = f"{split}{_suffix(trained, dataset)}"
    with guard(trained, device):
        dataset.targets = task.targets(dataset)
        reference = task.reference(dataset)
        readout, targets = outputs_of(network, task, dataset, device, config.batch_size)
    report = EvaluateReport(
        run=trained.path,
        zoo=str(dataset.zoo.path),
        task=config.task,
        model=config.model,
        split=split,
        networks=len(dataset),
        metrics=task.scores(readout, targets),
        figure=trained.path / f"{name}.png",
        skipped=dataset.skipped,
        reference={} if reference is None else task.scores(reference, targets),
    )
    title = f"{config.model}, {split}, {task.monitor} {report.metrics[task.monitor]:.3f}"
    task.figure(readout, targets, report.figure, title, reference=reference)
    summary = {**report.__dict__, "run": str(report.run), "figure": report.figure.name}
    write_json(trained.path / f"evaluation-{name}.json", summary)
    return report


def _suffix(trained: TrainedRun, dataset: ZooDataset) -> str:
    """What tells results on another zoo or population from those on the run's own."""
    zoo, parts = dataset.zoo, []
    assert zoo.path is not None
    if zoo.digest != digest_of(trained.path):
        parts += [zoo.path.stem, zoo.digest.partition(":")[2][:8]]
    name = next(name for name in zoo if zoo[name] is dataset.population)
    if len(zoo.populations) > 1 and name != trained.config.population:
        parts.append(name)
    return "".join(f"-{part}" for part in parts)
