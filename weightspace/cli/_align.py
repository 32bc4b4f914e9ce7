"""Bring the units of network B onto those of network A; what B computes stays the same.

A network is ZOO.h5::POPULATION[ROW], file.safetensors or file.pt.

Example: weightspace align zoo.h5::inr[0] zoo.h5::inr[1] -o aligned.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from weightspace.cli._options import Architecture, Json, Overwrite, Quiet, parse_architecture
from weightspace.cli._output import show


def command(
    reference: Annotated[str, typer.Argument(metavar="A", help="The network that stays as it is.")],
    network: Annotated[str, typer.Argument(metavar="B", help="The network that is reordered.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    symmetries: Annotated[str, typer.Option(help="Some of permutation,sign,phase.")] = "permutation",
    restarts: Annotated[int, typer.Option(min=1, help="Starts of the search; the best is kept.")] = 2,
    architecture: Architecture = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    from weightspace.align import weight_matching
    from weightspace.nets import build
    from weightspace.spec import output_change
    from weightspace.zoo import check_checkpoint_output, load_networks, save_network

    check_checkpoint_output(output, overwrite=overwrite)
    known = parse_architecture(architecture)
    spec, (a, b) = load_networks([reference, network], known)
    kinds = tuple(kind.strip() for kind in symmetries.split(",") if kind.strip())
    aligned, report = weight_matching(
        spec, reference=a.weights, weights=b.weights, symmetries=kinds, restarts=restarts, seed=seed
    )
    assert a.architecture is not None
    net = build(a.architecture)
    few = 1024 if len(net.input_shape) == 1 else 64  # images cost more
    inputs = net.random_inputs(few, torch.Generator().manual_seed(seed))
    change = output_change(net, b.weights, aligned, inputs)
    save_network(output, aligned, a.architecture, overwrite=overwrite)
    text = (
        f"{output}: L2 distance {report.distance_before:.4g} -> {report.distance_after:.4g} after "
        f"{int(report.sweeps)} sweeps; the function changed by {change:.1e} of its largest value"
    )
    document = {
        "method": "weight-matching",
        "symmetries": kinds,
        "objective": float(report.objective),
        "distance_before": float(report.distance_before),
        "distance_after": float(report.distance_after),
        "max_relative_change": change,
        "output": output,
    }
    show(text, document, as_json=as_json, quiet=quiet)
