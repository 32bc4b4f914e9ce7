"""Write a page about a zoo: protocol, distributions, hyperparameters against metrics, the weights in the plane, samples.

One HTML file that needs nothing else: no network, no scripts.

Example: weightspace report digits.h5 -o digits.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Json, Overwrite
from weightspace.cli._output import show
from weightspace.zoo import Zoo, report_zoo


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML to write.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    path = report_zoo(Zoo.open(zoo), output, overwrite=overwrite)
    show(f"{path}", {"output": path}, as_json=as_json)
