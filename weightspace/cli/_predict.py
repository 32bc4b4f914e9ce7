"""Write what a trained metanetwork says of the networks of a zoo, as CSV.

One line per row of the zoo: its number, network and split, the prediction, probabilities for classification, and
the target when the zoo has it.

Example: weightspace predict runs/dws digits.h5 -o predictions.csv --split test
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import AnySplit, Device, Json, Overwrite, PopulationNames, Quiet, SkipBad, Where
from weightspace.cli._output import counted, show


def command(
    run: Annotated[Path, typer.Argument(help="A run directory that `weightspace train` wrote.")],
    zoo: Annotated[Path, typer.Argument(help="A zoo that the metanetwork can read.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The CSV file to write.")],
    split: AnySplit = "all",
    population: PopulationNames = None,
    where: Where = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import predict

    report = predict(
        run,
        zoo,
        output,
        split=split,
        population=population,
        device=device,
        skip_bad=skip_bad,
        where=where,
        overwrite=overwrite,
    )
    text = f"{report.output}: {report.model}, {report.task}, {counted(report.networks, report.skipped)}"
    show(text, asdict(report), as_json=as_json, quiet=quiet)
