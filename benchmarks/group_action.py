"""How long a group acts on weights: batches of SIRENs, one large network, and their canonical representatives.

python benchmarks/group_action.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from torch import nn

from weightspace import WeightSpec

COLUMNS = {
    "work": "{work}",
    "parameters": "{parameters:,}",
    "median ms": "{milliseconds:.2f}",
    "best": "{best:.2f}",
}


def timed(work: str, parameters: int, rounds: int, run: Callable[[], object]) -> dict[str, Any]:
    """Median and best of some rounds, after two more."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "work": work,
        "parameters": parameters,
        "milliseconds": float(np.median(times[2:])),
        "best": min(times[2:]),
    }


def sirens(batch: int, rounds: int) -> list[dict[str, Any]]:
    spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(batch, spec.num_parameters, generator=generator)
    weights = spec.unflatten(flat)
    kinds = {"permutations": ("permutation",), "permutations, signs and phases": None}
    rows = []
    for text, symmetries in kinds.items():
        options = {} if symmetries is None else {"symmetries": symmetries}
        element = spec.random_element((batch,), generator=generator, **options)
        work = f"act on {batch} SIRENs 2-32-32-1: {text}"
        rows.append(timed(work, flat.numel(), rounds, lambda e=element: spec.act(e, weights)))
    work = f"canonicalize {batch} SIRENs 2-32-32-1"
    rows.append(timed(work, flat.numel(), rounds, lambda: spec.canonicalize(weights)))
    return rows


def one_large(width: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    heads = max(width // 64, 1)
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True)
        module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    spec = WeightSpec.trace(module, torch.zeros(1, 4, width))
    weights = {name: torch.randn(tensor.shape) for name, tensor in spec.tensors.items()}
    element = spec.random_element(generator=torch.Generator().manual_seed(0), symmetries=("permutation",))
    work = f"act on one transformer, width {width}, {layers} layers: permutations"
    return [timed(work, spec.num_parameters, rounds, lambda: spec.act(element, weights))]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``group_action.json`` and ``group_action.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="small networks, 2 rounds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    width, layers, few = 768, 12, 3
    if arguments.toy:
        arguments.batch, arguments.rounds, width, layers, few = 4, 2, 8, 1, 1
    rows = [*sirens(arguments.batch, arguments.rounds), *one_large(width, layers, few)]
    setting = {
        "command": _report.command_line("group_action.py", argv),
        "rounds": f"{arguments.rounds}, {few} for the transformer",
        **_report.environment("torch"),
    }
    table = _report.to_markdown("The group acts on weights", COLUMNS, rows, setting)
    _report.write(arguments.output, "group_action", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
