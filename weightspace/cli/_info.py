"""Say what a zoo holds: architectures, rows, metrics, protocol, digest.

Example: weightspace info digits.h5 --json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from weightspace.cli._options import Json
from weightspace.cli._output import show
from weightspace.zoo import SPLITS, Population, Zoo, verify_digest


def command(
    zoo: Annotated[Path, typer.Argument(help="A zoo file.")],
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the digest and compare.")] = False,
    as_json: Json = False,
) -> None:
    opened = Zoo.open(zoo)
    digest = verify_digest(zoo) if verify else opened.digest
    document = {
        "format_version": opened.format_version,
        "digest": digest,
        "verified": verify,
        "recipe": opened.recipe,
        "sources": {name: list(source.items.shape) for name, source in opened.sources.items()},
        "populations": {name: _describe(population) for name, population in opened.populations.items()},
    }
    show(_text(zoo, document), document, as_json=as_json)


def _describe(population: Population) -> dict[str, Any]:
    return {
        "networks": population.networks,
        "rows": population.rows,
        "parameters": population.spec.num_parameters,
        "items": len(np.unique(population.source)),
        "architecture": population.architecture,
        "protocol": population.protocol,
        "dtype": population.dtype,
        "splits": {name: int((population.split == at).sum()) for at, name in enumerate(SPLITS)},
        "labels": {name: len(np.unique(values)) for name, values in population.labels.items()},
        "step": _quantiles(population.step),
        "metrics": {name: _quantiles(values) for name, values in population.metrics.items()},
        "spec": repr(population.spec),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {"min": float("nan"), "median": float("nan"), "max": float("nan"), "not_finite": len(values)}
    levels = np.quantile(finite, [0.0, 0.5, 1.0])
    return {
        **{name: float(value) for name, value in zip(("min", "median", "max"), levels, strict=True)},
        "not_finite": len(values) - len(finite),
    }


def _text(path: Path, document: dict[str, Any]) -> str:
    recipe = (document["recipe"] or {}).get("name", "none")
    lines = [
        f"{path}: zoo format {document['format_version']}, recipe {recipe}",
        f"{document['digest']}{' (verified)' if document['verified'] else ''}",
    ]
    for name, entry in document["populations"].items():
        splits = ", ".join(f"{key} {value:,}" for key, value in entry["splits"].items())
        lines += [
            "",
            f"population {name}: {entry['networks']:,} networks of {entry['items']:,} items, "
            f"{entry['rows']:,} rows, {entry['parameters']:,} parameters, {entry['dtype']}",
            f"  splits    {splits}",
            f"  labels    {', '.join(f'{key} ({value} values)' for key, value in entry['labels'].items()) or 'none'}",
        ]
        for key, q in {"step": entry["step"], **entry["metrics"]}.items():
            diverged = f", {q['not_finite']} not finite" if q["not_finite"] else ""
            lines.append(
                f"  {key:<9} min {q['min']:.4g}, median {q['median']:.4g}, max {q['max']:.4g}{diverged}"
            )
        if entry["architecture"]:
            arguments = ", ".join(
                f"{key}={value}" for key, value in entry["architecture"]["arguments"].items()
            )
            lines.append(f"  network   {entry['architecture']['kind']}({arguments})")
        lines.append("  protocol" if entry["protocol"] else "  protocol  not recorded")
        lines += [f"    {key:<15} {value}" for key, value in entry["protocol"].items()]
        lines += [f"  {line}" for line in entry["spec"].splitlines()]
    return "\n".join(lines)
