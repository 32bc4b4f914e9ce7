"""Train a population of networks and write it as one zoo.

Finished shards wait in OUT.h5.parts until the zoo is complete: run the same command again after an interruption
and it goes on where it stopped.

Example: weightspace generate digits-inr -o digits.h5 --views 5 --seed 0
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import show


def command(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (see `weightspace recipes`) or a YAML file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zoo to write.")],
    count: Annotated[int | None, typer.Option(help="Items to fit; all by default.")] = None,
    views: Annotated[int | None, typer.Option(help="Networks fitted to each item.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with the source's files.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.datagen import generate

    report = generate(
        recipe,
        output,
        count=count,
        views=views,
        seed=seed,
        data_root=data_root,
        device=device,
        overrides=parse_settings(settings),
        overwrite=overwrite,
        progress=not quiet,
    )
    state = (
        f"{report.trained:,} trained in {report.seconds:.1f} s, {report.networks_per_second:.1f} networks/s"
        if report.trained
        else "complete already"
    )
    diverged = f", {report.diverged} diverged" if report.diverged else ""
    text = (
        f"{report.output}: {report.networks:,} networks, median PSNR {report.median_psnr:.1f} dB{diverged}; {state}\n"
        f"{report.digest}"
    )
    show(text, asdict(report), as_json=as_json, quiet=quiet)
