"""The directory that training writes: begun, continued, or replaced; what others put there is never deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weightspace.errors import OutputError, RunError
from weightspace.tasks._config import TrainConfig, is_run, load_config, save_config
from weightspace.tasks._run import DESCRIPTION, PARAMETERS, TREES, ZOO, check_version, check_zoo, save_digest
from weightspace.zoo import SPLITS, Zoo

REPORT, HISTORY, CHECKPOINTS, EVENTS = "report.json", "metrics.csv", "checkpoints", "tensorboard"
WRITTEN = (
    *(DESCRIPTION, PARAMETERS, TREES, REPORT, HISTORY, "learning_curve.png", ZOO),
    *(f"{split}.png" for split in SPLITS),
)
WRITTEN_INSIDE = {CHECKPOINTS: ("*.ckpt", "*.part"), EVENTS: ("events.out.tfevents.*", "hparams.yaml")}


def open_run(run: Path, config: TrainConfig, zoo: Zoo, overwrite: bool) -> bool:
    """Make the directory or continue in it; returns whether the run is complete already.

    Raises:
        OutputError: the directory holds something else, or the zoo and a run that would be replaced.
        RunError: a run of another version, or of a zoo that has changed.
    """
    found = _found(run, overwrite)
    if found and overwrite:
        _remove(run, zoo)
    elif isinstance(found, TrainConfig):
        if difference := _difference(found, config):
            raise OutputError(
                f"output: {run} holds a run of another configuration ({difference}); choose another name or pass "
                "--overwrite"
            )
        check_version(run)
        check_zoo(run, zoo)
    complete = (run / DESCRIPTION).is_file() and (run / REPORT).is_file()
    if not complete:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"output: {run} cannot be written ({error.strerror})") from None
        save_config(config, run / "config.yaml")
        save_digest(run, zoo)
    return complete


def _found(run: Path, overwrite: bool) -> TrainConfig | bool:
    """The configuration of a run that is there; True for one that cannot be read and is replaced, False for nothing.

    Raises:
        OutputError: something that is no run, which is never deleted, whatever the flags.
        RunError: a run that cannot be read and is not to be replaced.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return False
    try:
        return load_config(run)
    except RunError:
        if not is_run(run):
            raise OutputError(
                f"output: {run} exists already and is not a run directory; choose another name"
            ) from None
        if not overwrite:
            raise
        return True


def _remove(run: Path, zoo: Zoo) -> None:
    """Delete the files that a run writes, those by which it is recognised last.

    Raises:
        OutputError: the zoo lies among them, or something cannot be deleted.
    """
    if zoo.path is not None and zoo.path.resolve().is_relative_to(run.resolve()):
        raise OutputError(f"output: {run} holds the zoo {zoo.path} itself; choose another name")
    try:
        for path in [*_written(run), run / "config.yaml"]:
            path.unlink(missing_ok=True)
        for name in WRITTEN_INSIDE:
            folder = run / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise OutputError(f"output: {run} cannot be replaced ({error.strerror})") from None


def _written(run: Path) -> Iterator[Path]:
    """The files of a run, and those of its evaluations."""
    for path in list(run.glob("evaluation-*.json")):
        yield run / f"{path.stem.removeprefix('evaluation-')}.png"
        yield path
    yield from (run / name for name in WRITTEN)
    for folder, patterns in WRITTEN_INSIDE.items():
        for pattern in patterns:
            yield from list((run / folder).glob(pattern))


def _difference(found: TrainConfig, config: TrainConfig) -> str:
    """The first field that differs; empty for equal ones. One zoo may be named by several paths."""
    for name in TrainConfig.model_fields:
        before, after = getattr(found, name), getattr(config, name)
        if before != after and not (name == "zoo" and Path(before).resolve() == Path(after).resolve()):
            return f"{name}: {before!r} there, {after!r} now"
    return ""
