"""How long aligned MixUp of a batch of 64 takes, beside aligning its pairs one by one with SciPy.

python benchmarks/mixup.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import _report
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import weightspace as ws
from weightspace.datasets import Draws
from weightspace.nets import CNN, MLP
from weightspace.spec import Weights
from weightspace.zoo import spec_of

BATCH = 64
SWEEPS = 4  # that one pair after the other takes at most: fewer than the batch takes, in favour of the loop
COLUMNS = {
    "networks": "{networks}",
    "method": "{method}",
    "ratio": "{ratio:.1f}x",
    "ms per batch": "{milliseconds:.2f}",
}
NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "SIREN 2-32-32-1": lambda: MLP((2, 32, 32, 1)),
    "CNN of 4,970 parameters": lambda: CNN((1, 32, 32), (16, 16, 16), 10, stride=2, padding=0),
}


def sirens_one_by_one(weights: Weights, partner: Tensor) -> Weights:
    """Two-hidden-layer MLPs, pair by pair and layer by layer, by hand, as scripts in the field do it."""
    mixed = []
    for row, other in enumerate(partner.tolist()):
        a = [tensor[row] for tensor in weights.values()]
        b = [tensor[other] for tensor in weights.values()]
        for _ in range(SWEEPS):
            for layer in (0, 2):
                w, bias, after = layer, layer + 1, layer + 2
                cost = a[w] @ b[w].T + torch.outer(a[bias], b[bias]) + a[after].T @ b[after]
                order = torch.from_numpy(linear_sum_assignment(cost.numpy(), maximize=True)[1])
                b[w], b[bias], b[after] = b[w][order], b[bias][order], b[after][:, order]
        share = torch.rand(())
        mixed.append([torch.lerp(y, x, share) for x, y in zip(a, b, strict=True)])
    return {name: torch.stack(parts) for name, parts in zip(weights, zip(*mixed, strict=True), strict=True)}


def batches(module: torch.nn.Module, rounds: int) -> list[ws.Batch]:
    """Random networks, other ones in every round."""
    spec = spec_of(module)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(BATCH) % 10
    return [
        ws.Batch(
            spec,
            spec.unflatten(torch.randn(BATCH, spec.num_parameters, generator=generator) * 0.1),
            labels,
            10,
        )
        for _ in range(rounds)
    ]


def mix(augment: ws.MixUp, batch: ws.Batch) -> ws.Batch:
    """As a data set does in training: what does not suit was refused before."""
    return augment.apply(batch, Draws.of(0, BATCH))


def median_milliseconds(run: Callable[[ws.Batch], object], rounds: Sequence[ws.Batch]) -> float:
    """Median over rounds, without the first two."""
    times = []
    for batch in rounds:
        start = time.perf_counter()
        run(batch)
        times.append(time.perf_counter() - start)
    return float(np.median(times[2:])) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``mixup.json`` and ``mixup.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="batches per method")
    parser.add_argument("--toy", action="store_true", help="3 rounds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    rounds = 5 if arguments.toy else arguments.rounds
    partner = torch.arange(BATCH).roll(1)
    rows = []
    for name, make in NETWORKS.items():
        drawn = batches(make(), rounds)
        methods: dict[str, Callable[[ws.Batch], object]] = {
            f"mixup({kind})": partial(mix, ws.MixUp(kind)) for kind in ("aligned", "permuted", "direct")
        }
        if "SIREN" in name:
            alone = {
                f"pair by pair with SciPy, {SWEEPS} sweeps": lambda batch: sirens_one_by_one(
                    batch.weights, partner
                )
            }
            methods = alone | methods
        times = {method: median_milliseconds(run, drawn) for method, run in methods.items()}
        slowest = next(iter(times.values()))
        rows += [
            {"networks": name, "method": m, "ratio": slowest / t, "milliseconds": t} for m, t in times.items()
        ]
    setting = {
        "command": _report.command_line("mixup.py", argv),
        "batch": f"{BATCH} networks; SIRENs are matched by permutations, signs and phases, CNNs by permutations",
        "rounds": rounds,
        **_report.environment("torch", "numpy", "scipy"),
    }
    table = _report.to_markdown("MixUp of a batch", COLUMNS, rows, setting)
    _report.write(arguments.output, "mixup", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
