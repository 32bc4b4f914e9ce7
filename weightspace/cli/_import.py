"""Bring networks from another layout into a zoo; `weightspace info` then says what it holds.

What was read waits in OUT.h5.parts: run the same command again after an interruption and it goes on. Nothing is
unpickled.

Example: weightspace import dwsnets mnist-inrs -o mnist.h5 --splits mnist_splits.json
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import show
from weightspace.zoo import IMPORTERS, ImportReport, import_zoo


def command(
    format: Annotated[str, typer.Argument(help=f"Layout of the source: {', '.join(IMPORTERS)}.")],
    source: Annotated[Path, typer.Argument(help="The folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zoo to write.")],
    settings: Settings = None,
    splits: Annotated[
        Path | None,
        typer.Option(
            help="JSON with the paths of train, val and test; default: what the layout says, or drawn."
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out what is damaged, not finite or does not fit, and count it."
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    report = import_zoo(
        format,
        source,
        output,
        options=parse_settings(settings),
        splits=splits,
        skip_bad=skip_bad,
        overwrite=overwrite,
        progress=not quiet,
    )
    show(_text(report), asdict(report), as_json=as_json, quiet=quiet)


def _text(report: ImportReport) -> str:
    populations = f" in {len(report.populations)} populations" if len(report.populations) > 1 else ""
    checkpoints = f", {report.rows:,} checkpoints" if report.rows != report.networks else ""
    splits = ", ".join(f"{name} {count:,}" for name, count in report.splits.items())
    lines = [
        f"{report.output}: {report.networks:,} networks{populations}{checkpoints}; {splits}; "
        f"{report.read:,} read in {report.seconds:.1f} s, {report.rows_per_second:,.0f}/s"
    ]
    if report.skipped:
        lines.append(f"{report.skipped:,} left out:")
        lines += [f"  {reason}" for reason in report.skipped_first]
        more = report.skipped - len(report.skipped_first)
        lines += [f"  and {more:,} more"] if more else []
    return "\n".join([*lines, report.digest])
