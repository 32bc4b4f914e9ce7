"""Join shards that were made in parts, or finished zoos that belong together.

With one zoo: the shards in OUT.h5.parts, as `weightspace generate --shards` leaves them. With several zoos and -o:
populations of one name become one, and networks of one item stay in one split.

Example: weightspace join digits.h5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._generate import report_document, report_text
from weightspace.cli._options import Json, Overwrite, Quiet
from weightspace.cli._output import show
from weightspace.errors import ConfigError


def command(
    zoos: Annotated[
        list[Path], typer.Argument(help="The zoo whose shards wait in OUT.h5.parts, or finished zoos.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The zoo to write, with several zoos.")
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with the source's files, which the zoo stores.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    if len(zoos) == 1 and output is None:
        from weightspace.datagen import join_shards

        report = join_shards(zoos[0], data_root=data_root, overwrite=overwrite)
        show(report_text(report), report_document(report), as_json=as_json, quiet=quiet)
        return
    if output is None:
        raise ConfigError(f"join: expected -o OUT.h5 with {len(zoos)} zoos")
    _join_finished(zoos, output, overwrite=overwrite, as_json=as_json, quiet=quiet)


def _join_finished(zoos: list[Path], output: Path, *, overwrite: bool, as_json: bool, quiet: bool) -> None:
    from weightspace.zoo import Zoo, join_finished

    digest = join_finished(zoos, output, overwrite=overwrite)
    networks = sum(population.networks for population in Zoo.open(output).populations.values())
    document = {"output": output, "joined": True, "digest": digest, "networks": networks, "zoos": zoos}
    text = f"{output}: {networks:,} networks of {len(zoos)} zoos\n{digest}"
    show(text, document, as_json=as_json, quiet=quiet)
