"""Populations of classifiers against a loop that trains one network after the other.

Both train with Adam on the same items in memory, in one process with all threads; the loop is what a user writes in
PyTorch. Milliseconds are per network and step, orders, dropout and the optimizer included.

    python benchmarks/population_training.py
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
from torch.nn import functional as F

from weightspace.datagen import parse_recipe
from weightspace.datagen._shards import ShardState
from weightspace.datagen.sources import Signals
from weightspace.nets import build

COLUMNS = {
    "networks": "{name}",
    "ratio": "{ratio:.1f}x",
    "population (ms)": "{population:.3f}",
    "loop (ms)": "{loop:.3f}",
    "parameters": "{parameters:,}",
    "batch": "{batch}",
    "engine": "{engine}",
}
CASES: dict[str, dict[str, Any]] = {
    "Small CNN Zoo, 1x32x32": {
        "size": (32, 32),
        "batch": 128,
        "network": {"kind": "cnn", "layers": 3, "channels": 16, "stride": 2, "padding": 0},
    },
    "MLP 64-32-32-10": {"size": (8, 8), "batch": 64, "network": {"kind": "mlp", "hidden": [32, 32]}},
    "MLP 784-64-10": {"size": (28, 28), "batch": 128, "network": {"kind": "mlp", "hidden": [64]}},
    "ResNet, batch norm, 1x8x8": {
        "size": (8, 8),
        "batch": 64,
        "network": {"kind": "resnet", "blocks": [1, 1], "channels": 8},
    },
    "GRU 32, 6 tokens": {"size": None, "batch": 64, "network": {"kind": "rnn", "hidden": 32}},
}


def signals_of(size: tuple[int, int] | None, items: int) -> Signals:
    """Random items: the time of a step does not depend on what is learnt."""
    random = np.random.default_rng(0)
    labels = np.arange(items) % 10
    if size is None:
        return Signals(random.integers(12, size=(items, 6)), labels, vocabulary=12)
    return Signals(random.random((items, *size), dtype=np.float32), labels)


def population(case: dict[str, Any], items: int, networks: int) -> tuple[float, Any]:
    """Milliseconds per network and step, and the work."""
    recipe = parse_recipe(
        {
            "kind": "classifier",
            "name": "benchmark",
            "source": {"kind": "digits"},
            "data": {"val": 0.0, "test": 0.01},
            "network": case["network"],
            "training": {
                "optimizer": "adam",
                "learning_rate": {"log_uniform": [1e-4, 1e-2]},
                "batch_size": case["batch"],
                "epochs": 1,
            },
            "evaluation": 1,
            "count": networks,
            "shard": networks,
        }
    )
    work = recipe.work(signals_of(case["size"], items), "cpu")
    (shard,) = work.shards
    work.make(shard, ShardState(), lambda _: None)  # compiles
    start = time.perf_counter()
    zoo = work.make(shard, ShardState(), lambda _: None)
    seconds = time.perf_counter() - start
    steps = int(next(iter(zoo.populations.values())).step.max())
    return 1e3 * seconds / networks / steps, work


def loop(work: Any, batch: int, networks: int) -> float:
    """Milliseconds per network and step of plain PyTorch."""
    inputs = torch.from_numpy(work.data.inputs[work.data.train])
    labels = torch.from_numpy(work.data.labels[work.data.train])
    steps = len(inputs) // batch
    for trial in range(networks + 1):
        if trial == 1:
            start = time.perf_counter()
        net = build(work.architectures[0]).train()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for rows in torch.randperm(len(inputs))[: steps * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[rows]), labels[rows]).backward()
            optimizer.step()
    return 1e3 * (time.perf_counter() - start) / networks / steps


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``population_training.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=2_600, help="training items")
    parser.add_argument("--networks", type=int, default=64, help="in a population")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; the fastest counts")
    parser.add_argument("--toy", action="store_true", help="3 networks, 130 items, the CNN and one MLP")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    items, networks, repeats = arguments.items, arguments.networks, arguments.repeats
    cases = CASES
    if arguments.toy:
        items, networks, repeats = 260, 3, 1
        cases = {name: CASES[name] for name in ("Small CNN Zoo, 1x32x32", "MLP 64-32-32-10")}
    rows = []
    for name, case in cases.items():
        fused, alone = [], []
        for _ in range(repeats):  # in turns, so that a busy moment of the machine meets both
            milliseconds, work = population(case, items, networks)
            fused.append(milliseconds)
            alone.append(loop(work, case["batch"], min(3, networks)))
        _, _, engine = work._engine(0)
        rows.append(
            {
                "name": name,
                "ratio": min(alone) / min(fused),
                "population": min(fused),
                "loop": min(alone),
                "parameters": int(
                    sum(tensor.numel() for tensor in build(work.architectures[0]).parameters())
                ),
                "batch": case["batch"],
                "engine": type(engine).__name__.removesuffix("Engine").lower(),
            }
        )
    setting = {
        "command": _report.command_line("population_training.py", argv),
        "measured": f"{networks} networks at once, one epoch of {items:,} random items; the fastest of {repeats}",
        **_report.environment("torch", "numba", "numpy"),
    }
    table = _report.to_markdown("Training populations of classifiers", COLUMNS, rows, setting)
    _report.write(arguments.output, "population_training", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
