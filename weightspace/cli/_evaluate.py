"""Score a trained metanetwork, on the test split unless told otherwise.

Example: weightspace evaluate runs/dws --json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, Quiet
from weightspace.cli._output import show


def command(
    run: Annotated[Path, typer.Argument(help="A run directory that `weightspace train` wrote.")],
    zoo: Annotated[Path | None, typer.Argument(help="Another zoo of the same weight space.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import evaluate

    report = evaluate(run, zoo, split=split, device=device)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in report.metrics.items())
    text = (
        f"{report.model} on {report.networks:,} {split} networks of {report.zoo}: {scores}\n{report.figure}"
    )
    show(text, asdict(report), as_json=as_json, quiet=quiet)
