"""How the cost of a training step grows with the depth of the networks that are read, and what a ResNet-20 takes.

Forward and backward on random weights: perceptrons 2-32-...-32-1 with 3, 10 and 30 layers, whose number of
parameters is proportional to their depth but for the ends; then a ResNet-20 with BatchNorm, of 0.27 million parameters,
traced. A process of its own for each row, so that its peak of memory is its own.

    python benchmarks/metanetwork_scaling.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from torch import Tensor, nn

from weightspace.devices import keep_freed_memory
from weightspace.models import model_config
from weightspace.spec import WeightSpec

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DWS, full mixing": ("dws", {"hidden": 16}),
    "UNF, shared mixing": ("unf", {"hidden": 16}),
    "UNF, no mixing": ("unf", {"hidden": 16, "global_mixing": "none"}),
    "graph network, PNA style": ("graph", {"hidden": 16}),
    "graph network, GMN style": ("graph", {"hidden": 16, "preset": "gmn"}),
}
DEPTHS = (3, 10, 30)
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "UNF, shared mixing, hidden 16, 3 layers": ("unf", {"hidden": 16, "layers": 3}),
    "graph network, hidden 16, 3 layers": ("graph", {"hidden": 16, "layers": 3}),
}
COLUMNS = {
    "metanetwork": "{title}",
    "networks": "{networks}",
    "batch": "{batch}",
    "ms per step": "{milliseconds:.0f}",
    "ms per layer read": "{per_layer:.1f}",
    "parameters": "{parameters:,}",
    "peak GB": "{gigabytes:.2f}",
}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(fan_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def resnet20(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    before = widths[0]
    for width in widths:
        for number in range(3):
            layers.append(Block(before, width, 2 if number == 0 and width != widths[0] else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)).eval()


def spec_of(networks: str, width: int) -> WeightSpec:
    """``ResNet-20``, or the number of layers of a perceptron."""
    if networks == "ResNet-20":
        module = resnet20((width, 2 * width, 4 * width))
        return WeightSpec.trace(module, torch.randn(2, 3, 32, 32), verify=False)
    return WeightSpec.mlp([2, *[width] * (int(networks) - 1), 1], activation="relu")


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Median time of a step and the peak of memory, in this process."""
    if row["threads"]:
        torch.set_num_threads(row["threads"])
        keep_freed_memory()
    spec = spec_of(row["networks"], row["width"])
    torch.manual_seed(0)
    model = model_config(row["name"], row["options"]).build(spec, None, 10)
    weights = spec.unflatten(torch.randn(row["batch"], spec.num_parameters))
    before = _peak()
    times = []
    for _ in range(row["rounds"] + 1):
        start = time.perf_counter()
        model.zero_grad()
        model(weights).square().sum().backward()
        times.append(time.perf_counter() - start)
    layers = 20 if row["networks"] == "ResNet-20" else int(row["networks"])
    milliseconds = 1e3 * float(np.median(times[1:]))
    return {
        "milliseconds": milliseconds,
        "per_layer": milliseconds / layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gigabytes": _peak(),
        "before": before,
        "parameters_read": spec.num_parameters,
    }


def _measured_alone(row: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def _peak() -> float:
    """Most memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``metanetwork_scaling.json`` and ``metanetwork_scaling.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="perceptrons per step; of ResNet-20 always 4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--toy", action="store_true", help="narrow networks, two depths, one round, one process"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.row is not None:
        print(json.dumps(measure(json.loads(arguments.row))))
        return 0
    depths, width, rounds = ((2, 3), 2, 1) if arguments.toy else (DEPTHS, 32, 10)
    jobs = [(title, *model, str(depth)) for title, model in MODELS.items() for depth in depths]
    jobs += [(title, *model, "ResNet-20") for title, model in LARGE.items()]
    rows = []
    for title, name, options, networks in jobs:
        large = networks == "ResNet-20"
        row = {
            "title": title,
            "name": name,
            "options": options,
            "networks": networks,
            "batch": 4 if large else arguments.batch,
            "threads": 0 if arguments.toy else arguments.threads,
            "width": min(width, 16) if large else width,
            "rounds": 1 if large else rounds,
        }
        rows.append({**row, **(measure(row) if arguments.toy else _measured_alone(row))})
        rows[-1]["networks"] = networks if large else f"{networks} layers"
        print(f"{title}, {rows[-1]['networks']}: {rows[-1]['milliseconds']:.0f} ms", file=sys.stderr)
    setting = {
        "command": _report.command_line("metanetwork_scaling.py", argv, {"-o": "OUTDIR"}),
        "perceptrons": f"2-{width}-...-{width}-1, random weights",
        "ms per step": "median; forward and backward, without the optimiser",
        "peak GB": f"of the whole process; {rows[0]['before']:.2f} of it before the first step",
        **_report.environment("torch"),
    }
    table = _report.to_markdown("Cost against the depth of what is read", COLUMNS, rows, setting)
    _report.write(arguments.output, "metanetwork_scaling", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
