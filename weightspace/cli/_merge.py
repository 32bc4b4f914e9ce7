"""Average networks into one; align them first.

A network is ZOO.h5::POPULATION[ROW], file.safetensors or file.pt.

Example: weightspace merge zoo.h5::inr[0] aligned.safetensors -o merged.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightspace.cli._options import Architecture, Json, Overwrite, Quiet, parse_architecture
from weightspace.cli._output import show
from weightspace.errors import ConfigError


def command(
    networks: Annotated[list[str], typer.Argument(help="Two networks or more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    weights: Annotated[
        str | None, typer.Option(help="One coefficient per network, as in 0.3,0.7; equal by default.")
    ] = None,
    architecture: Architecture = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.merge import average
    from weightspace.zoo import check_checkpoint_output, load_networks, save_network

    if len(networks) < 2:
        raise ConfigError(f"merge: expected at least two networks, found {len(networks)}")
    check_checkpoint_output(output, overwrite=overwrite)
    coefficients = _coefficients(weights, len(networks))
    spec, loaded = load_networks(networks, parse_architecture(architecture))
    merged = average([network.weights for network in loaded], coefficients, spec=spec)
    save_network(output, merged, loaded[0].architecture, overwrite=overwrite)
    shares = ", ".join(f"{c:.3g} x {n.name}" for c, n in zip(coefficients, loaded, strict=True))
    document = {"method": "average", "weights": coefficients, "networks": networks, "output": output}
    show(f"{output}: {shares}", document, as_json=as_json, quiet=quiet)


def _coefficients(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0 / count] * count
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights: expected numbers such as 0.3,0.7, found {text!r}") from None
    if len(found) != count:
        raise ConfigError(f"--weights: expected one per network, {count}, found {len(found)}")
    return found
