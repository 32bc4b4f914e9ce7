"""Say what a recipe will make and cost on this machine, before anything is made.

The time follows from a probe of about two seconds, which runs the recipe's own training.

Example: weightspace plan digits-inr --count 300
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Device, Json, Settings, parse_settings
from weightspace.cli._output import show


def command(
    recipe: Annotated[
        str, typer.Argument(help="A built-in recipe (see `weightspace recipes`) or a YAML file.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the zoo would be written.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Items to fit, or classifiers to train.")] = None,
    views: Annotated[int | None, typer.Option(help="Networks fitted to each item.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder with the source's files.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    device: Device = "auto",
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    from weightspace.datagen import plan

    found = plan(
        recipe,
        output,
        count=count,
        views=views,
        seed=seed,
        data_root=data_root,
        device=device,
        overrides=parse_settings(settings),
    )
    show(str(found), asdict(found), as_json=as_json)
