"""Score a trained metanetwork, on the test split unless told otherwise.

Example: weightspace evaluate runs/dws --json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, PopulationName, Quiet, SkipBad
from weightspace.cli._output import counted, show


def command(
    run: Annotated[Path, typer.Argument(help="A run directory that `weightspace train` wrote.")],
    zoo: Annotated[Path | None, typer.Argument(help="Another zoo that the metanetwork can read.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    population: PopulationName = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import evaluate

    report = evaluate(run, zoo, split=split, population=population, device=device, skip_bad=skip_bad)
    which = counted(report.networks, report.skipped, split)
    text = f"{report.model} on {which} of {report.zoo}: {_scores(report.metrics)}\n{report.figure}"
    if report.reference:
        text += f"\nwithout the metanetwork: {_scores(report.reference)}"
    show(text, asdict(report), as_json=as_json, quiet=quiet)


def _scores(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
