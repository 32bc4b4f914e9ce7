"""Score a trained metanetwork, on the test split unless told otherwise.

Example: weightspace evaluate runs/dws --json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, PopulationNames, Quiet, SkipBad
from weightspace.cli._output import counted, show


def command(
    run: Annotated[Path, typer.Argument(help="A run directory that `weightspace train` wrote.")],
    zoo: Annotated[Path | None, typer.Argument(help="Another zoo that the metanetwork can read.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    target: Annotated[
        str | None,
        typer.Option(
            help="Of a contrastive run: the label or metric that a linear probe reads from embeddings."
        ),
    ] = None,
    population: PopulationNames = None,
    where: Annotated[
        str | None,
        typer.Option(help='Only rows for which this holds; those of the run by default, and "" for all.'),
    ] = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import evaluate

    report = evaluate(
        run,
        zoo,
        split=split,
        target=target,
        population=population,
        where=where,
        device=device,
        skip_bad=skip_bad,
    )
    which = counted(report.networks, report.skipped, split)
    text = f"{report.model} on {which} of {report.zoo}: {_scores(report.metrics, report.intervals)}\n{report.figure}"
    for name, found in report.populations.items():
        text += f"\n{name}: {counted(found['networks'], 0, split)}, {_scores(found['metrics'])}"
    if report.reference:
        text += f"\nwithout the metanetwork: {_scores(report.reference)}"
    show(text, asdict(report), as_json=as_json, quiet=quiet)


def _scores(metrics: dict[str, float], intervals: Mapping[str, tuple[float, float]] | None = None) -> str:
    """``"r2 0.81 (0.77 to 0.85)"``: scores, and in brackets between what they are with 95 % confidence."""
    between = {name: f" ({low:.4g} to {high:.4g})" for name, (low, high) in (intervals or {}).items()}
    return ", ".join(f"{name} {value:.4g}{between.get(name, '')}" for name, value in metrics.items())
