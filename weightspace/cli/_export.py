"""Write networks of a zoo in another layout, into a new folder.

Example: weightspace export digits.h5 folder digits --where "split == 'test'"
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Json, Overwrite, Quiet, Where
from weightspace.cli._output import show
from weightspace.zoo import EXPORTERS, ExportReport, export_zoo


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    format: Annotated[str, typer.Argument(help=f"Layout to write: {', '.join(EXPORTERS)}.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make.")],
    population: Annotated[
        str | None, typer.Option(help="Which one, for zoos with several; default: all.")
    ] = None,
    where: Where = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    report = export_zoo(
        zoo,
        format,
        destination,
        population=population,
        where=where,
        overwrite=overwrite,
        progress=not quiet,
    )
    show(_text(report), asdict(report), as_json=as_json, quiet=quiet)


def _text(report: ExportReport) -> str:
    lost = f"\nthe layout has no place for {', '.join(report.left_out)}" if report.left_out else ""
    return f"{report.output}: {report.networks:,} networks, {report.rows:,} checkpoints{lost}"
