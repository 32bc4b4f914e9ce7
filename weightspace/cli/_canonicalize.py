"""Write a zoo whose networks are sorted, or aligned to one of them; what they compute stays the same.

sort brings each network into its canonical form, which has no reference; align matches the units of all networks to
those of one. The zoo says which, and how. Interrupted, the same command goes on where it stopped.

Example: weightspace canonicalize digits.h5 -o sorted.h5 --method sort
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightspace.cli._options import Json, Overwrite, Quiet
from weightspace.cli._output import show

if TYPE_CHECKING:
    from weightspace.datasets import CanonicalPopulation, CanonicalReport


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The zoo to write.")],
    method: Annotated[str, typer.Option(help="sort or align.")] = "sort",
    reference: Annotated[
        int | None,
        typer.Option(
            metavar="ROW",
            help="Align: the row that stays; by default of the first network of the training split.",
        ),
    ] = None,
    symmetries: Annotated[
        str | None,
        typer.Option(help="Align: permutation, or permutation,sign and so on; by default all there are."),
    ] = None,
    population: Annotated[
        str | None,
        typer.Option(help="Which ones, between commas, for zoos with several; by default all."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search for the alignment.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.datasets import canonicalize_zoo

    report = canonicalize_zoo(
        zoo,
        output,
        method=method,
        reference=reference,
        population=population,
        symmetries=None if symmetries is None else [k.strip() for k in symmetries.split(",") if k.strip()],
        seed=seed,
        overwrite=overwrite,
        progress=not quiet,
    )
    show(_text(report), asdict(report), as_json=as_json, quiet=quiet)


def _text(report: CanonicalReport) -> str:
    lines = [f"{report.output}: {report.method} in {report.seconds:.1f} s"]
    lines += [f"  {name}: {_line(found)}" for name, found in report.populations.items()]
    return "\n".join([*lines, report.digest])


def _line(found: CanonicalPopulation) -> str:
    kept = f", {found.kept:,} left as stored (no canonical form)," if found.kept else ""
    parts = [
        f"{found.moved:,} of {found.rows:,} rows moved{kept} by {', '.join(found.symmetries) or 'nothing'}"
    ]
    if found.reference is not None:
        distances = f"{found.distance_before:.4g} -> {found.distance_after:.4g}"
        parts.append(f"mean L2 distance to row {found.reference} {distances}")
    if found.max_relative_change is None:
        parts.append("outputs not compared: the zoo does not say how to rebuild the networks")
    else:
        change = f"{found.max_relative_change:.1e}"
        parts.append(
            f"outputs of {found.compared} networks changed by at most {change} of their largest value"
        )
    return "; ".join(parts)
