"""Edit the networks of a zoo with a trained metanetwork, and write them as a zoo.

Labels, splits and stored signals stay; the zoo says which run edited it, and how.

Example: weightspace edit runs/dilate digits.h5 -o dilated.h5 --split test
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import AnySplit, Device, Json, Overwrite, PopulationName, Quiet, SkipBad, Where
from weightspace.cli._output import counted, show


def command(
    run: Annotated[Path, typer.Argument(help="A run directory of the task editing.")],
    zoo: Annotated[Path, typer.Argument(help="A zoo of the same weight space.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zoo to write.")],
    split: AnySplit = "all",
    population: PopulationName = None,
    where: Where = None,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.tasks import edit

    report = edit(
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
    text = (
        f"{report.output}: {counted(report.networks, report.skipped)}, MSE x 100 "
        f"{100 * report.mse_before:.4g} before and {100 * report.mse_after:.4g} after\n{report.digest}"
    )
    show(text, asdict(report), as_json=as_json, quiet=quiet)
