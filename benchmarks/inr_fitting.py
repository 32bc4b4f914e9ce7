"""How many INRs a second: one at a time in PyTorch, batched in PyTorch, and the compiled kernel.

SIREN 2-32-32-1 on images of 28 x 28 pixels, full grid at every step, no early stopping. The three take turns,
and each keeps its best rate, so that a busy moment of the machine strikes none of them alone.

    python benchmarks/inr_fitting.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import _report
import numpy as np
import torch
from torch.nn.functional import mse_loss

from weightspace.datagen._fit import fit_networks
from weightspace.nets import MLP

WIDTHS = (2, 32, 32, 1)
SIDE = 28
LEARNING_RATE = 5e-4
LOOP = "PyTorch, one at a time"


@dataclass(frozen=True)
class Row:
    """One engine's rate, and how well its networks fit (so that nothing is fast because it is wrong)."""

    engine: str
    networks_per_second: float
    ratio: float
    networks: int
    median_psnr: float


def make_problem(networks: int) -> tuple[MLP, np.ndarray, np.ndarray, np.ndarray]:
    """Initial parameters as SIREN draws them, the pixel grid, and smooth random images."""
    net = MLP(WIDTHS)
    rng = np.random.default_rng(0)
    initial = np.empty((networks, sum(p.numel() for p in net.parameters())), np.float32)
    for row in initial:
        at = 0
        for layer, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
            bound = 1 / fan_in if layer == 0 else np.sqrt(6 / fan_in) / net.w0
            size = fan_out * (fan_in + 1)
            row[at : at + size] = rng.uniform(-bound, bound, size)
            at += size
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    coordinates = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    waves = rng.normal(0, 4, (networks, 2, 6))
    phases = rng.uniform(0, 2 * np.pi, (networks, 1, 6))
    targets = 0.5 + 0.08 * np.sin(coordinates @ waves + phases).sum(-1, keepdims=True)
    return net, initial, coordinates, targets.astype(np.float32)


def fit_one_at_a_time(
    net: MLP, initial: np.ndarray, coordinates: np.ndarray, targets: np.ndarray, steps: int
) -> np.ndarray:
    """What a user would write; returns the PSNR of each network."""
    points = torch.from_numpy(coordinates)
    psnr = []
    for row, target in zip(initial, torch.from_numpy(targets), strict=True):
        torch.nn.utils.vector_to_parameters(torch.from_numpy(row.copy()), net.parameters())
        optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = mse_loss(net(points), target)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            psnr.append(float(-10 * torch.log10(mse_loss(net(points), target))))
    return np.array(psnr)


def engines(steps: int) -> dict[str, Callable[..., np.ndarray]]:
    """Name to function of (net, initial, coordinates, targets) that returns the PSNRs."""

    def engine(name: str) -> Callable[..., np.ndarray]:
        return lambda *problem: (
            fit_networks(
                *problem, steps=steps, learning_rate=LEARNING_RATE, target_psnr=None, engine=name
            ).psnr
        )

    return {
        LOOP: lambda *problem: fit_one_at_a_time(*problem, steps),
        "weightspace, batched": engine("batched"),
        "weightspace, kernel": engine("kernel"),
    }


def measure(networks: int, steps: int, rounds: int) -> list[Row]:
    """Take turns, ``rounds`` times. The loop gets a sixteenth of the networks, the batch a quarter."""
    counts = dict(zip(engines(1), (max(1, networks // 16), max(8, networks // 4), networks), strict=True))
    problem = make_problem(max(counts.values()))
    best = dict.fromkeys(counts, 0.0)
    psnr = {}
    for name, run in engines(1).items():
        run(*_part(problem, counts[name]))  # compile, and warm the caches
    for _ in range(rounds):
        for name, run in engines(steps).items():
            start = time.perf_counter()
            psnr[name] = run(*_part(problem, counts[name]))
            best[name] = max(best[name], counts[name] / (time.perf_counter() - start))
    return [
        Row(name, best[name], best[name] / best[LOOP], counts[name], float(np.median(psnr[name])))
        for name in counts
    ]


def _part(problem: tuple[MLP, np.ndarray, np.ndarray, np.ndarray], networks: int) -> tuple[object, ...]:
    net, initial, coordinates, targets = problem
    return net, initial[:networks], coordinates, targets[:networks]


def setting(arguments: argparse.Namespace, command: str) -> dict[str, object]:
    """All that is needed to read the numbers, and to measure them again."""
    return {
        "command": command,
        "network": f"SIREN {'-'.join(map(str, WIDTHS))}, w0 = 30",
        "points": SIDE * SIDE,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        **_report.environment("torch", "numba", "numpy"),
    }


COLUMNS = {
    "engine": "{engine}",
    "ratio": "{ratio:.1f}x",
    "networks/s": "{networks_per_second:.2f}",
    "networks": "{networks}",
    "median PSNR (dB)": "{median_psnr:.2f}",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--toy`` overrides sizes so that the program can be tested in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=128, help="networks for the fastest engine")
    parser.add_argument("--steps", type=int, default=1000, help="Adam steps per network")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine; the best counts")
    parser.add_argument("--toy", action="store_true", help="4 networks, 3 steps, 1 round")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.networks, arguments.steps, arguments.rounds = 4, 3, 1
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``inr_fitting.json`` and ``inr_fitting.md``."""
    arguments = parse(argv)
    command = _report.command_line("inr_fitting.py", argv)
    rows = measure(arguments.networks, arguments.steps, arguments.rounds)
    facts = setting(arguments, command)
    documents = [asdict(row) for row in rows]
    table = _report.to_markdown("Fitting INRs", COLUMNS, documents, facts)
    _report.write(arguments.output, "inr_fitting", table, documents, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
