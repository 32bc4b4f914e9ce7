"""Draw a zoo: INRs beside their targets; of classifiers accuracies, learning curves, hyperparameters and filters.

Of other networks it draws the histogram of every metric and label. With --augment it draws what some INRs represent
before and after three draws of the augmentation.

Example: weightspace show digits.h5 -o digits.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Json, Overwrite
from weightspace.cli._output import show
from weightspace.datasets import AUGMENTATIONS, Augmentation, draw_augmented, parse_augmentations
from weightspace.errors import ConfigError
from weightspace.zoo import Zoo, draw_zoo


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")],
    augment: Annotated[
        str | None,
        typer.Option(help='INRs before and after, for instance "rotation(30), noise(0.1)".'),
    ] = None,
    population: Annotated[
        str | None, typer.Option(help="Which one; by default all, of INRs the first.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=200,
            help="Networks to draw; by default 30 INRs, 8 with --augment, or the filters of 8.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice, and of --augment.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    if augment is None:
        path = draw_zoo(
            Zoo.open(zoo), output, population=population, count=count, seed=seed, overwrite=overwrite
        )
    else:
        path = draw_augmented(
            Zoo.open(zoo),
            _parsed(augment),
            output,
            population=population,
            count=count or 8,
            seed=seed,
            overwrite=overwrite,
        )
    show(f"{path}", {"output": path}, as_json=as_json)


def _parsed(text: str) -> Augmentation:
    augment = parse_augmentations(text)
    if augment is None:
        raise ConfigError(f"augment: expected some of {', '.join(AUGMENTATIONS)}, found {text!r}")
    return augment
