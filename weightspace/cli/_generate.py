"""Train a population of networks and write it as one zoo.

Finished shards wait in OUT.h5.parts until the zoo is complete: run the same command again after an interruption
and it goes on where it stopped. A job array makes parts with --shards; `weightspace join` brings them together.

Example: weightspace generate digits-inr -o digits.h5 --views 5 --seed 0
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightspace.cli._options import Device, Json, Overwrite, Quiet, Settings, parse_settings
from weightspace.cli._output import show

if TYPE_CHECKING:
    from weightspace.datagen import GenerateReport


def command(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (see `weightspace recipes`) or a YAML file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zoo to write.")],
    count: Annotated[int | None, typer.Option(help="Items to fit, or classifiers to train.")] = None,
    views: Annotated[int | None, typer.Option(help="Networks fitted to each item.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with the source's files.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    shards: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Make the I-th of N parts only, and leave its shards in OUT.h5.parts."
        ),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: shards as tasks of a Ray cluster.")] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster, as HOST:PORT; default: RAY_ADDRESS, else one on this machine."
        ),
    ] = None,
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
        shards=shards,
        engine=engine,
        address=address,
    )
    show(report_text(report), report_document(report), as_json=as_json, quiet=quiet)


def report_text(report: GenerateReport) -> str:
    """For people."""
    state = (
        f"{report.trained:,} trained in {report.seconds:.1f} s, {report.networks_per_second:.1f} networks/s"
        if report.trained
        else "nothing left to train"
    )
    if not report.joined:
        return (
            f"{report.output}.parts: {report.shards_done:,} of {report.shards:,} shards done; {state}\n"
            f"when all are done: weightspace join {report.output}"
        )
    diverged = f", {report.diverged} diverged" if report.diverged else ""
    return (
        f"{report.output}: {report.networks:,} networks, median {report.metric} {report.median:.3g}{diverged}; {state}\n"
        f"{report.digest}"
    )


def report_document(report: GenerateReport) -> dict[str, Any]:
    """For programs."""
    return asdict(report)
