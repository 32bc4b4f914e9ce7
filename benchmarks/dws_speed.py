"""How long a training step of DWS takes: forward and backward, batch 64, SIREN 2-32-32-1.

python benchmarks/dws_speed.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch

from weightspace.devices import keep_freed_memory
from weightspace.models import DWS
from weightspace.spec import WeightSpec

COLUMNS = {
    "model": "{model}",
    "ms per step": "{milliseconds:.1f}",
    "best": "{best:.1f}",
    "parameters": "{parameters:,}",
}
MODELS: dict[str, dict[str, Any]] = {
    "mean pooling, no norm": {"pooling": ("mean",), "norm": "none"},
    "mean and max pooling, BatchNorm": {"pooling": ("mean", "max"), "norm": "batch"},
}


def measure(batch: int, hidden: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """Median and best step of each model."""
    spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
    flat = torch.randn(batch, spec.num_parameters, generator=torch.Generator().manual_seed(0))
    weights = spec.unflatten(flat)
    rows = []
    for name, options in MODELS.items():
        model = DWS(spec, 10, hidden=hidden, layers=layers, **options)
        times = []
        for _ in range(rounds + 2):
            model.zero_grad()
            start = time.perf_counter()
            model(weights).square().sum().backward()
            times.append((time.perf_counter() - start) * 1e3)
        rows.append(
            {
                "model": name,
                "milliseconds": float(np.median(times[2:])),
                "best": min(times[2:]),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``dws_speed.json`` and ``dws_speed.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--plain-malloc", action="store_true", help="leave the allocator as it is")
    parser.add_argument("--toy", action="store_true", help="batch 4, hidden 4, 2 rounds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.batch, arguments.hidden, arguments.rounds = 4, 4, 2
    kept = not arguments.plain_malloc and keep_freed_memory()
    rows = measure(arguments.batch, arguments.hidden, arguments.layers, arguments.rounds)
    setting = {
        "command": _report.command_line("dws_speed.py", argv),
        "batch": arguments.batch,
        "hidden": arguments.hidden,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "freed memory": "kept, as in `weightspace train`" if kept else "returned to the system",
        **_report.environment("torch"),
        "measured elsewhere": "DWSNets' own code, same size, forward and backward: 496 ms",
    }
    table = _report.to_markdown("A training step of DWS", COLUMNS, rows, setting)
    _report.write(arguments.output, "dws_speed", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
