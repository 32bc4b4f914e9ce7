"""Train a metanetwork on a zoo, into a run directory.

The test split is not read. Run the same command again after an interruption and it goes on where it stopped.

Example: weightspace train digits.h5 --model dws -o runs/dws
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, Overwrite, Quiet, Settings, SkipBad, Where, parse_settings
from weightspace.cli._output import show
from weightspace.models import MODELS
from weightspace.tasks import TASKS


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The run directory to write.")],
    task: Annotated[str, typer.Option(help=f"What to learn: {', '.join(TASKS)}.")] = "classification",
    target: Annotated[
        str | None,
        typer.Option(help="The label, hyperparameter or metric to predict; for classification label."),
    ] = None,
    model: Annotated[str, typer.Option(help=f"The metanetwork: {', '.join(MODELS)}.")] = "dws",
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Networks per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    augment: Annotated[
        str | None, typer.Option(help='For instance "permutation, sign, noise(0.1)"; "" for none.')
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs without improvement.")
    ] = None,
    population: Annotated[
        str | None,
        typer.Option(help="Which one, for zoos with several: a name, several between commas, or all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of parameters, order and augmentations.")] = 0,
    where: Where = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    settings: Settings = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import train, train_config

    flags = {
        "zoo": str(zoo),
        "population": population,
        "where": where,
        "task": task,
        "target": target,
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "augment": augment,
        "patience": patience,
        "skip_bad": skip_bad,
        "seed": seed,
    }
    config = train_config(flags, parse_settings(settings))
    report = train(config, output, device=device, overwrite=overwrite, progress=not quiet)
    scores = ", ".join(f"val {name} {value:.4g}" for name, value in report.metrics.items())
    when = f"best epoch {report.best_epoch} of {report.epochs}, " if report.epochs else ""
    skipped = f", {report.skipped} skipped" if report.skipped else ""
    text = f"{report.run}: {report.model}, {report.parameters:,} parameters, {when}{scores}, {report.seconds:.0f} s{skipped}"
    show(text, asdict(report), as_json=as_json, quiet=quiet)
