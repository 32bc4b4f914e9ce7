"""Train a metanetwork on a zoo, into a run directory."""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader

from weightspace.datasets import (
    AUGMENTATIONS,
    Augmentation,
    Compose,
    MixUp,
    Normalisation,
    PopulationBatches,
    PopulationsDataset,
    ZooDataset,
    open_populations,
    parse_augmentations,
    population_names,
)
from weightspace.devices import choose_device, keep_freed_memory, memory_guard
from weightspace.errors import ConfigError, DeviceError, RunError, TaskError, WeightspaceError
from weightspace.models import FittedOnce
from weightspace.tasks._config import TrainConfig, write_json
from weightspace.tasks._directory import CHECKPOINTS, EVENTS, REPORT, open_run
from weightspace.tasks._figures import draw_learning_curve
from weightspace.tasks._memory import held_memory, limited_parameters, step_memory, total_memory
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import TASKS, Split, Task
from weightspace.tasks._run import build_network, outputs_of, save_network
from weightspace.tasks._several import SharedMetanetwork, build_shared, widened
from weightspace.zoo import Population, Zoo


@dataclass(frozen=True)
class TrainReport:
    """What training found.

    ``metrics`` are those of the validation split at the best epoch; ``skipped`` counts networks of the training
    and validation splits that were left out because their weights are not finite; ``populations`` has the metrics of
    each population, where there are several.
    """

    run: Path
    model: str
    task: str
    parameters: int
    epochs: int
    best_epoch: int
    metrics: dict[str, float]
    seconds: float
    skipped: int = 0
    populations: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """Everything that one training is about."""

    network: Metanetwork
    task: Task
    config: TrainConfig
    training: Split
    validation: Split
    run: Path
    device: str
    progress: bool
    memory: int


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> TrainReport:
    """Train a metanetwork; the same call resumes what was interrupted, and does nothing when it is done.

    The run directory then holds config.yaml, model.safetensors (the best epoch by validation score),
    metrics.csv, TensorBoard events, learning_curve.png, val.png, checkpoints/ and report.json. Of the test
    split nothing is read but the range of its labels. The process keeps freed memory from then on
    (``weightspace.devices.keep_freed_memory``).

    Args:
        config: of the run.
        output: the run directory.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overwrite: replace the run that is there, whatever its configuration and version; files that training and
            evaluation did not write stay.
        progress: show a progress bar.

    Raises:
        OutputError: ``output`` exists and is not a run of this configuration, or is to be replaced and holds the zoo.
        RunError: the run that is there is damaged or of another version, or its zoo has changed.
        TaskError: the zoo lacks the target or does not suit the task, or holds networks with weights that are
            not finite; or training diverged.
        ZooError: the zoo cannot be opened.
        DeviceError: the machine lacks what the configuration asks for, memory included.
        ConfigError: a ``where`` that does not suit the zoo or leaves nothing, or several populations for a metanetwork
            that reads networks of one weight space alone.
    """
    start = time.perf_counter()
    run = Path(output)
    device = choose_device(device)
    keep_freed_memory()
    _check_hardware(config, device)
    config, names, zoo = _resolved(config)
    training, validation, task = _splits(config, zoo)
    torch.manual_seed(config.seed)
    there = total_memory(device)
    with (
        limited_parameters(there),
        memory_guard(f"model: its parameters do not fit into {there / 1e9:,.1f} GB"),
    ):
        network = _built(config, {name: zoo[name] for name in names}, task)
    memory = _checked_memory(config, network, task, (training, validation), device)
    if open_run(run, config, zoo, overwrite):
        return _stored_report(run)
    if device == "cuda" and config.devices == 1:
        training.to(device)
        validation.to(device)
    if network.normalisation is not None and isinstance(training, ZooDataset):
        network.normalisation = Normalisation.fit(training, config.normalisation)
    job = _Job(network, task, config, training, validation, run, device, progress, memory)
    history = _fit_once(job) if isinstance(network.model, FittedOnce) else _fit_by_gradient(job)
    with _guard(job):
        report = _report(job, history, time.perf_counter() - start)
    save_network(run, network, zoo[names[0]], task)
    return report


def _resolved(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...], Zoo]:
    """The configuration with what several populations need, their names, and the zoo."""
    zoo = Zoo.open(config.zoo)
    names = population_names(zoo, config.population)
    return config if len(names) == 1 else widened(config, zoo, names), names, zoo


def _splits(config: TrainConfig, zoo: Zoo) -> tuple[Split, Split, Task]:
    """The training and the validation split, and the task that reads its targets from the first."""
    training, validation = (
        _joined(
            open_populations(
                zoo,
                config.population,
                split,
                target=config.target,
                seed=config.seed,
                skip_bad=config.skip_bad,
                where=config.where,
            ),
            several=len(population_names(zoo, config.population)) > 1,
        )
        for split in ("train", "val")
    )
    task = TASKS[config.task].from_data(training, config.settings())
    for dataset in (*_parts(training).values(), *_parts(validation).values()):
        dataset.targets, dataset.classes = task.targets(dataset), task.classes
        dataset.copies = task.copies
    training.augment = _augmentation(config, task)
    if task.copies > 1:
        validation.augment = training.augment  # its epoch stays, and with it what is drawn
    most = max(len(part) for part in _parts(training).values())
    if most < 2:
        of = " of one population" if isinstance(training, PopulationsDataset) else ""
        raise TaskError(f"zoo {config.zoo}: expected at least two networks{of} to train on, found {most}")
    return training, validation, task


def _augmentation(config: TrainConfig, task: Task) -> Augmentation | None:
    """Of the training split.

    Raises:
        ConfigError: one that changes the signal, for a task whose targets are signals; for a task that compares copies
            of a network none at all, or one that mixes networks.
    """
    augment = parse_augmentations(config.augment)
    if task.copies > 1:
        _check_copies_differ(config, augment)
    if augment is not None and task.reads_signals:
        changing = [part.name for part in augment.parts if part.changes_signal]
        if changing:
            raise ConfigError(
                f"augment: task {config.task} compares signals with targets that stay as they are; expected augmentations "
                f"that keep the signal, found {changing[0]}"
            )
    return augment


def _check_copies_differ(config: TrainConfig, augment: Compose | None) -> None:
    if augment is None:
        raise ConfigError(
            f"augment: task {config.task} compares augmented copies of every network; expected some of "
            f"{', '.join(AUGMENTATIONS)}, found none"
        )
    if any(isinstance(part, MixUp) and part.kind != "self" for part in augment.parts):
        raise ConfigError(
            f"augment: task {config.task} compares copies of one network; expected augmentations that do not mix it with "
            "others, found mixup; mixup(self) would do"
        )


def _joined(parts: dict[str, ZooDataset], *, several: bool) -> Split:
    return PopulationsDataset(parts) if several else next(iter(parts.values()))


def _parts(split: Split) -> dict[str, ZooDataset]:
    return split.parts if isinstance(split, PopulationsDataset) else {"": split}


def _built(config: TrainConfig, populations: dict[str, Population], task: Task) -> Metanetwork:
    """The metanetwork with fresh parameters."""
    if len(populations) > 1:
        return build_shared(config, populations, task)
    (population,) = populations.values()
    return build_network(config, population.spec, population.architecture, task)


def _check_hardware(config: TrainConfig, device: str) -> None:
    """Raise DeviceError when the configuration asks for more than there is."""
    if config.precision == "16-mixed" and device == "cpu":
        raise DeviceError("precision: 16-mixed needs CUDA; take bf16-mixed on a CPU")
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise DeviceError(
            f"devices: {config.devices} were asked for, but PyTorch finds {torch.cuda.device_count()}"
        )


def _checked_memory(
    config: TrainConfig,
    network: Metanetwork,
    task: Task,
    splits: tuple[Split, Split],
    device: str,
) -> int:
    """Bytes that a step takes at least; raises DeviceError when the device is too small for it.

    Processes on a CPU share its memory; each holds the targets of both splits.
    """
    if isinstance(network.model, FittedOnce):
        return 0
    few = f"batch_size: a step of {config.batch_size} networks"
    advice = "lower it, and raise accumulate for steps of the same size"
    reader, largest = _largest(network, splits[0])
    with memory_guard(f"{few} does not fit into memory; {advice}"):
        step = step_memory(reader, task, largest, config.batch_size, mixed=config.precision != "32")
    processes = config.devices if device == "cpu" else 1
    parts = [part for split in splits for part in _parts(split).values()]
    needed, there = processes * (step + held_memory(*parts, device=device)), total_memory(device)
    if needed > there:
        among = f" in {processes} processes" if processes > 1 else ""
        raise DeviceError(
            f"{few}{among} needs at least {needed / 1e9:,.1f} GB, but {device} has {there / 1e9:,.1f} GB; {advice}"
        )
    return step


def _largest(network: Metanetwork, training: Split) -> tuple[Metanetwork, ZooDataset]:
    """The networks with the most parameters, and what reads them."""
    parts = _parts(training)
    name = max(parts, key=lambda name: parts[name].spec.num_parameters)
    return network.of(name) if isinstance(network, SharedMetanetwork) else network, parts[name]


# -- two ways to fit ---------------------------------------------------------------------------------------


def _fit_once(job: _Job) -> list[dict[str, float]]:
    """Models without gradients see the whole training split once, without augmentation."""
    assert isinstance(job.training, ZooDataset)
    job.training.augment = None
    weights, targets = job.training.read(range(len(job.training)))
    network = job.network
    if network.normalisation is not None:
        weights = network.normalisation(weights)
    assert isinstance(network.model, FittedOnce)
    network.model.fit_once(weights, job.task.outputs_for(targets))
    return []


def _fit_by_gradient(job: _Job) -> list[dict[str, float]]:
    from weightspace.tasks._module import MetanetworkModule

    module = MetanetworkModule(job.network, job.task, job.config, job.training, job.run)
    batch = job.config.batch_size
    if job.progress:
        sys.stderr.write(_left_out(job.training))
        sys.stderr.write(
            f"{job.config.model}: at least {job.memory / 1e6:,.0f} MB for a step of {batch} networks\n"
        )
    loaders = _loaders(job)
    with _quiet_lightning(), _guard(job):
        trainer, best = _trainer(job)
        try:
            trainer.fit(module, *loaders, ckpt_path=_checkpoint(job.run), weights_only=True)
        except SystemExit:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from None
        except ProcessRaisedException as error:
            raise _of_a_process(error) or error from None
    try:
        state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    except Exception as error:  # a damaged archive fails in many ways
        raise RunError(
            f"run {job.run}: the checkpoint of its best epoch is missing or damaged ({type(error).__name__}); pass "
            "--overwrite"
        ) from None
    job.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in state.items()})
    return _history(job.run) if job.config.devices > 1 else module.history


def _left_out(training: Split) -> str:
    """A line on populations that training cannot use."""
    alone = [name for name, part in _parts(training).items() if len(part) == 1]
    named = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
    return f"populations with one network to train on, which is left out: {named}\n" if alone else ""


def _loaders(job: _Job) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches of the training split, in an order of their own in each epoch, and of the validation split."""
    from weightspace.tasks._module import EpochOrder

    batch, seed, training, validation = job.config.batch_size, job.config.seed, job.training, job.validation
    if isinstance(training, PopulationsDataset):
        assert isinstance(validation, PopulationsDataset)
        orders = (
            PopulationBatches(training, batch, seed=seed),
            PopulationBatches(validation, batch, shuffle=False),
        )
        return (
            DataLoader(training, batch_size=None, sampler=orders[0]),
            DataLoader(validation, batch_size=None, sampler=orders[1]),
        )
    each = -(-len(training) // job.config.devices)
    # a last batch of one network would break BatchNorm
    drop_last = each > 1 and each % batch == 1
    order = EpochOrder(training, seed)
    return DataLoader(training, batch, sampler=order, drop_last=drop_last), DataLoader(validation, batch)


def _guard(job: _Job) -> AbstractContextManager[None]:
    return memory_guard(
        f"run {job.run}: {job.device} has too little memory for batches of {job.config.batch_size} networks; lower "
        "--batch-size, and raise --set accumulate for steps of the same size"
    )


def _of_a_process(error: ProcessRaisedException) -> WeightspaceError | None:
    """What the user can mend of a failure in one of several processes; None for anything else."""
    last = str(error).rstrip().rpartition("\n")[2]
    name, _, message = last.partition(": ")
    for kind in WeightspaceError.__subclasses__():
        if name == f"{kind.__module__}.{kind.__name__}":
            return kind(message)
    return DeviceError(f"memory: a process ran out of it ({last})") if "OutOfMemoryError" in name else None


def _history(run: Path) -> list[dict[str, float]]:
    """The scores of all epochs, from the last checkpoint: other processes did the training."""
    last = torch.load(run / CHECKPOINTS / "last.ckpt", weights_only=True, map_location="cpu")
    return list(last["history"])


def _checkpoint(run: Path) -> Path | None:
    """What an interrupted run left; None when there is nothing."""
    path = run / CHECKPOINTS / "last.ckpt"
    if not path.is_file():
        return None
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged archive fails in many ways
        raise RunError(f"run {run}: {path} is damaged ({type(error).__name__}); pass --overwrite") from None
    return path


def _trainer(job: _Job) -> tuple[Any, Any]:
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger

    from weightspace.tasks._callbacks import KeepEpochs, Patience
    from weightspace.tasks._module import Progress

    config, monitor = job.config, f"val_{job.task.monitor}"
    best = KeepEpochs(job.run / CHECKPOINTS, monitor)
    callbacks: list[Any] = [best]
    if job.progress:
        callbacks.append(Progress(config.model, monitor))
    if config.patience is not None:
        callbacks.append(Patience(monitor, config.patience))
    trainer = L.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=config.devices,
        strategy="ddp_spawn" if config.devices > 1 else "auto",
        precision=config.precision,
        accumulate_grad_batches=config.accumulate,
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(job.run, name="", version=EVENTS),
        use_distributed_sampler=False,
        log_every_n_steps=10**9,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    return trainer, best


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's hints (worker counts, devices found, old checkpoints) say nothing to our users.

    Its handling of Ctrl-C is undone, too.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C for good after the first one
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# -- reports -----------------------------------------------------------------------------------------------


def _report(job: _Job, history: list[dict[str, float]], seconds: float) -> TrainReport:
    run, network, task, config = job.run, job.network, job.task, job.config
    answers = _answers(job)
    readout, targets = (torch.cat(parts) for parts in zip(*answers.values(), strict=True))
    scores = task.scores(readout, targets)
    scored = [row[f"val_{task.monitor}"] for row in history]
    # NaN is the worst, as it is for the checkpoints
    best = max(
        range(len(scored)), key=lambda at: -math.inf if math.isnan(scored[at]) else scored[at], default=0
    )
    report = TrainReport(
        run=run,
        model=config.model,
        task=config.task,
        parameters=sum(p.numel() for p in network.parameters()),
        epochs=len(history),
        best_epoch=best + 1 if history else 0,
        metrics=scores,
        seconds=seconds,
        skipped=job.training.skipped + job.validation.skipped,
        populations={name: task.scores(*found) for name, found in answers.items()}
        if len(answers) > 1
        else {},
    )
    subject = f"{config.model}, {config.task}" + ("" if config.target is None else f" of {config.target}")
    if history:
        draw_learning_curve(history, task.monitor, run / "learning_curve.png", subject)
    title = f"{subject}, val {task.monitor} {scores[task.monitor]:.3f}"
    alone = job.validation if isinstance(job.validation, ZooDataset) else None
    reference = None if alone is None else task.reference(alone)
    task.figure(readout, targets, run / "val.png", title, reference=reference)
    write_json(run / REPORT, {**report.__dict__, "run": str(run)})
    return report


def _answers(job: _Job) -> dict[str, tuple[Tensor, Tensor]]:
    """Readouts and targets of the validation split, by population."""
    found = {}
    for name, part in _parts(job.validation).items():
        reader = job.network.of(name) if isinstance(job.network, SharedMetanetwork) else job.network
        found[name] = outputs_of(reader, job.task, part, job.device, job.config.batch_size)
    return found


def _stored_report(run: Path) -> TrainReport:
    try:
        stored = json.loads((run / REPORT).read_text())
        populations = {name: _numbers(scores) for name, scores in stored.get("populations", {}).items()}
        found = {"run": run, "metrics": _numbers(stored["metrics"]), "populations": populations}
        return TrainReport(**{**stored, **found})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"run {run}: {REPORT} is damaged ({type(error).__name__}); pass --overwrite") from None


def _numbers(scores: dict[str, float | None]) -> dict[str, float]:
    """Scores as they were: NaN is null in JSON."""
    return {name: math.nan if value is None else value for name, value in scores.items()}
