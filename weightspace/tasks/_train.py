"""Train a metanetwork on a zoo, into a run directory."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from weightspace.datasets import Normalisation, ZooDataset, parse_augmentations
from weightspace.devices import choose_device, keep_freed_memory
from weightspace.errors import DeviceError, OutputError, RunError, TaskError
from weightspace.models import FittedOnce
from weightspace.tasks._compile import compile_or_fall_back
from weightspace.tasks._config import TrainConfig, load_config, save_config, write_text
from weightspace.tasks._figures import draw_learning_curve
from weightspace.tasks._memory import step_memory, total_memory
from weightspace.tasks._metanetwork import Metanetwork
from weightspace.tasks._registry import TASKS, Task
from weightspace.tasks._run import (
    DESCRIPTION,
    build_network,
    check_zoo,
    outputs_of,
    save_digest,
    save_network,
)
from weightspace.zoo import Zoo


@dataclass(frozen=True)
class TrainReport:
    """What training found.

    ``metrics`` are those of the validation split at the best epoch; ``skipped`` counts networks of the training
    and validation splits that were left out because their weights are not finite.
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


@dataclass(frozen=True)
class _Job:
    """Everything that one training is about."""

    network: Metanetwork
    task: Task
    config: TrainConfig
    training: ZooDataset
    validation: ZooDataset
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
        overwrite: delete a run of another configuration that is in the way.
        progress: show a progress bar.

    Raises:
        OutputError: ``output`` exists and is not a run of this configuration.
        TaskError: the zoo lacks the target or does not suit the task, or holds networks with weights that are
            not finite.
        ZooError: the zoo cannot be opened.
        DeviceError: the machine lacks what the configuration asks for, memory included.
    """
    start = time.perf_counter()
    run = Path(output)
    device = choose_device(device)
    keep_freed_memory()
    _check_hardware(config, device)
    training, validation = (
        ZooDataset(
            config.zoo,
            split,
            target=config.target,
            population=config.population,
            seed=config.seed,
            skip_bad=config.skip_bad,
        )
        for split in ("train", "val")
    )
    training.augment = parse_augmentations(config.augment)
    task = TASKS[config.task].from_data(training, config.settings())
    for dataset in (training, validation):
        dataset.targets = task.targets(dataset)
    if len(training) < 2:
        raise TaskError(
            f"zoo {config.zoo}: expected at least two networks to train on, found {len(training)}"
        )
    torch.manual_seed(config.seed)
    network = build_network(config, training.spec, training.population.architecture, task)
    memory = _checked_memory(config, network, task, training, device)
    if _open_run(run, config, training.zoo, overwrite):
        return _stored_report(run)
    if device == "cuda" and config.devices == 1:
        training.to(device)
        validation.to(device)
    if network.normalisation is not None:
        network.normalisation = Normalisation.fit(training, config.normalisation)
    job = _Job(network, task, config, training, validation, run, device, progress, memory)
    history = _fit_once(job) if isinstance(network.model, FittedOnce) else _fit_by_gradient(job)
    report = _report(job, history, time.perf_counter() - start)
    save_network(run, network, training, task)
    return report


def _check_hardware(config: TrainConfig, device: str) -> None:
    """Raise DeviceError when the configuration asks for more than there is."""
    if config.precision == "16-mixed" and device == "cpu":
        raise DeviceError("precision: 16-mixed needs CUDA; take bf16-mixed on a CPU")
    if device == "cuda" and config.devices > torch.cuda.device_count():
        raise DeviceError(
            f"devices: {config.devices} were asked for, but PyTorch finds {torch.cuda.device_count()}"
        )


def _checked_memory(
    config: TrainConfig, network: Metanetwork, task: Task, training: ZooDataset, device: str
) -> int:
    """Bytes that a step takes at least; raises DeviceError when the device is too small for it."""
    if isinstance(network.model, FittedOnce):
        return 0
    needed = step_memory(network, task, training, config.batch_size, mixed=config.precision != "32")
    there = total_memory(device)
    if needed > there:
        raise DeviceError(
            f"batch_size: a step of {config.batch_size} networks needs at least {needed / 1e9:,.1f} GB, but "
            f"{device} has {there / 1e9:,.1f} GB; lower it, and raise accumulate for steps of the same size"
        )
    return needed


def _open_run(run: Path, config: TrainConfig, zoo: Zoo, overwrite: bool) -> bool:
    """Make the directory or continue in it; returns whether the run is complete already."""
    found = _found_config(run)
    if found is not None and (overwrite or found != config):
        if not overwrite:
            raise OutputError(
                f"output: {run} holds a run of another configuration ({_difference(found, config)}); "
                "choose another name or pass --overwrite"
            )
        shutil.rmtree(run)
    elif found is not None:
        check_zoo(run, zoo)
    complete = (run / DESCRIPTION).is_file() and (run / "report.json").is_file()
    if not complete:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output: {run} cannot be written ({error.strerror})") from None
        save_config(config, run / "config.yaml")
        save_digest(run, zoo)
    return complete


def _found_config(run: Path) -> TrainConfig | None:
    """The configuration of a run that is there; None for a directory that is empty or missing.

    Raises:
        OutputError: anything else, which is never deleted, whatever the flags.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return None
    try:
        return load_config(run)
    except RunError:
        raise OutputError(
            f"output: {run} exists already and is not a run directory; choose another name"
        ) from None


def _difference(found: TrainConfig, config: TrainConfig) -> str:
    for name in TrainConfig.model_fields:
        before, after = getattr(found, name), getattr(config, name)
        if before != after:
            return f"{name}: {before!r} there, {after!r} now"
    raise AssertionError("equal configurations have no difference")


# -- two ways to fit ---------------------------------------------------------------------------------------


def _fit_once(job: _Job) -> list[dict[str, float]]:
    """Models without gradients see the whole training split once, without augmentation."""
    job.training.augment = None
    weights, targets = job.training.read(range(len(job.training)))
    network = job.network
    if network.normalisation is not None:
        weights = network.normalisation(weights)
    assert isinstance(network.model, FittedOnce)
    network.model.fit_once(weights, job.task.outputs_for(targets))
    return []


def _fit_by_gradient(job: _Job) -> list[dict[str, float]]:
    from weightspace.tasks._module import EpochOrder, MetanetworkModule

    module = MetanetworkModule(job.network, job.task, job.config, job.training, job.run)
    batch = job.config.batch_size
    order = EpochOrder(job.training, job.config.seed)
    each = -(-len(job.training) // job.config.devices)
    # a last batch of one network would break BatchNorm
    drop_last = each > 1 and each % batch == 1
    if job.progress:
        sys.stderr.write(
            f"{job.config.model}: at least {job.memory / 1e6:,.0f} MB for a step of {batch} networks\n"
        )
    if job.config.compile:
        compile_or_fall_back(job.network)
    loaders = (
        DataLoader(job.training, batch, sampler=order, drop_last=drop_last),
        DataLoader(job.validation, 256),
    )
    with _quiet_lightning():
        trainer, best = _trainer(job)
        try:
            trainer.fit(module, *loaders, ckpt_path=_checkpoint(job.run), weights_only=True)
        except SystemExit:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from None
        except torch.OutOfMemoryError:
            raise DeviceError(
                f"run {job.run}: {job.device} has too little memory for batches of {batch} networks; lower "
                "--batch-size, and raise --set accumulate for steps of the same size"
            ) from None
    state = torch.load(best.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    job.network.load_state_dict({name.removeprefix("network."): tensor for name, tensor in state.items()})
    return _history(job.run) if job.config.devices > 1 else module.history


def _history(run: Path) -> list[dict[str, float]]:
    """The scores of all epochs, from the last checkpoint: other processes did the training."""
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    return list(last["history"])


def _checkpoint(run: Path) -> Path | None:
    """What an interrupted run left; None when there is nothing."""
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        return None
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged archive fails in many ways
        raise RunError(f"run {run}: {path} is damaged ({type(error).__name__}); pass --overwrite") from None
    return path


def _trainer(job: _Job) -> tuple[Any, Any]:
    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from weightspace.tasks._module import Progress

    config, monitor = job.config, f"val_{job.task.monitor}"
    best = ModelCheckpoint(
        job.run / "checkpoints",
        "best",
        monitor=monitor,
        mode="max",
        save_last=True,
        enable_version_counter=False,
    )
    callbacks: list[Any] = [best]
    if job.progress:
        callbacks.append(Progress(config.model, monitor))
    if config.patience is not None:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=config.patience))
    trainer = L.Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=config.devices,
        strategy="ddp_spawn" if config.devices > 1 else "auto",
        precision=config.precision,
        accumulate_grad_batches=config.accumulate,
        max_epochs=config.epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger(job.run, name="", version="tensorboard"),
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
    readout, targets = outputs_of(network, task, job.validation, job.device)
    scores = task.scores(readout, targets)
    monitor = f"val_{task.monitor}"
    best = max(range(len(history)), key=lambda at: history[at][monitor]) if history else 0
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
    )
    subject = f"{config.model}, {config.task}" + ("" if config.target is None else f" of {config.target}")
    if history:
        draw_learning_curve(history, task.monitor, run / "learning_curve.png", subject)
    title = f"{subject}, val {task.monitor} {scores[task.monitor]:.3f}"
    task.figure(readout, targets, run / "val.png", title, reference=task.reference(job.validation))
    write_text(run / "report.json", json.dumps({**report.__dict__, "run": str(run)}))
    return report


def _stored_report(run: Path) -> TrainReport:
    try:
        return TrainReport(**{**json.loads((run / "report.json").read_text()), "run": run})
    except (TypeError, ValueError) as error:
        raise RunError(
            f"run {run}: report.json is damaged ({type(error).__name__}); pass --overwrite"
        ) from None
