"""The zoo of INRs on which several programs train metanetworks, and the options that say where it is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report

from weightspace.datagen import generate
from weightspace.zoo import Zoo

PATHS = {"--data-root": "DIR", "--zoo": "ZOO.h5", "--runs": "RUNS", "-o": "OUTDIR"}
TOY = {"network.hidden": [4], "protocol.steps": 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the zoo, the runs and the results."""
    parser.add_argument("--data-root", type=Path, help="folder with the *-ubyte[.gz] files")
    parser.add_argument("--count", type=int, default=10_000, help="images")
    parser.add_argument("--zoo", type=Path, default=Path("mnist-10k.h5"), help="made unless it exists")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.set_defaults(recipe="mnist-inr")
    parser.add_argument("--toy", action="store_true", help="24 embedded digits, one epoch")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")


def prepare(
    arguments: argparse.Namespace, program: str, argv: Sequence[str] | None, *libraries: str
) -> dict[str, Any]:
    """Make the zoo unless it exists, and the folder of the runs; returns the setting to report."""
    recipe, count = ("digits-inr", 24) if arguments.toy else (arguments.recipe, arguments.count)
    made = generate(
        recipe,
        arguments.zoo,
        count=count,
        data_root=arguments.data_root,
        overrides=TOY if arguments.toy else None,
    )
    arguments.runs.mkdir(parents=True, exist_ok=True)
    zoo = Zoo.open(arguments.zoo)["inr"]
    return {
        "command": _report.command_line(program, argv, PATHS),
        "zoo": f"{recipe}, {made.networks:,} networks, {made.digest}",
        "splits": ", ".join(f"{split} {len(zoo.rows_of(split)):,}" for split in ("train", "val", "test")),
        **_report.environment("torch", *libraries),
    }
