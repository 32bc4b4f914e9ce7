"""How long a batch of 64 takes: mapped from a zoo, and from one `.pth` file per network.

Both read the same 64 random networks, reorder their units, flip signs, add noise, rotate the coordinates and normalise.
The zoo does so for the batch; the files are read, and augmented, one by one, as the field's data sets do.

    python benchmarks/batch_loading.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _report
import numpy as np
import torch

import weightspace as ws
from weightspace.datasets import parse_augmentations
from weightspace.nets import MLP
from weightspace.spec import Weights
from weightspace.zoo import spec_of

BATCH = 64
COLUMNS = {"method": "{method}", "ratio": "{ratio:.1f}x", "ms per batch": "{milliseconds:.3f}"}


def make_zoo(folder: Path, networks: int) -> tuple[Path, list[Path]]:
    """Random SIRENs, once as a zoo and once as a file per network."""
    net = MLP((2, 32, 32, 1))
    spec = spec_of(net)
    flat = torch.randn(networks, spec.num_parameters, generator=torch.Generator().manual_seed(0)) * 0.1
    states = [spec.unflatten(row.clone()) for row in flat]
    labels = np.arange(networks) % 10
    zoo = ws.Zoo.from_state_dicts(states, module=net, labels={"label": labels}, fractions=(1.0, 0.0, 0.0))
    files = []
    for index, state in enumerate(states):
        files.append(folder / f"{index}.pth")
        torch.save({name: tensor.clone() for name, tensor in state.items()}, files[-1])
    return zoo.save(folder / "zoo.h5"), files


def augment_one(weights: Weights, generator: torch.Generator) -> Weights:
    """Permutation, signs and noise of one 2-32-32-1 network, by hand, as scripts in the field do it."""
    w0, b0, w1, b1, w2, b2 = weights.values()
    p, q = torch.randperm(32, generator=generator), torch.randperm(32, generator=generator)
    s, t = ((torch.rand(32, generator=generator) < 0.5).float() * 2 - 1 for _ in range(2))
    moved = [
        s[:, None] * w0[p],
        s * b0[p],
        t[:, None] * w1[q][:, p] * s,
        t * b1[q],
        w2[:, q] * t,
        b2,
    ]
    noisy = [w + 0.1 * w.std(correction=0) * torch.randn(w.shape, generator=generator) for w in moved]
    angle = torch.deg2rad((2 * torch.rand((), generator=generator) - 1) * 30)
    cosine, sine = angle.cos(), angle.sin()
    noisy[0] = noisy[0] @ torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return dict(zip(weights, noisy, strict=True))


def from_files(files: Sequence[Path], generator: torch.Generator) -> Weights:
    """One file after the other, then stacked."""
    networks = [
        augment_one(torch.load(path, weights_only=True, map_location="cpu"), generator) for path in files
    ]
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def median_milliseconds(run: Callable[[np.ndarray], object], networks: int, rounds: int) -> float:
    """Median over rounds; every round reads other rows."""
    rng = np.random.default_rng(0)
    times = []
    for _ in range(rounds + 3):
        rows = rng.integers(0, networks, BATCH)
        start = time.perf_counter()
        run(rows)
        times.append(time.perf_counter() - start)
    return float(np.median(times[3:])) * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``batch_loading.json`` and ``batch_loading.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=4096, help="networks in the zoo")
    parser.add_argument("--rounds", type=int, default=300, help="batches per method")
    parser.add_argument("--toy", action="store_true", help="128 networks, 3 rounds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.networks, arguments.rounds = 128, 3
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path, files = make_zoo(Path(folder), arguments.networks)
        plain = ws.ZooDataset(path, "train")
        augment = parse_augmentations("permutation, sign, noise(0.1), rotation(30)")
        augmented = ws.ZooDataset(path, "train", augment=augment)
        normalise = ws.Normalisation.fit(plain)
        methods: dict[str, Callable[[np.ndarray], object]] = {
            "one .pth per network, augmented one by one, normalised": lambda rows: normalise(
                from_files([files[row] for row in rows], generator)
            ),
            "zoo: permutation, sign, noise, rotation, normalised": lambda rows: normalise(
                augmented.read(rows)[0]
            ),
            "zoo: the same without normalisation": augmented.read,
            "zoo, read only": plain.read,
        }
        times = {
            name: median_milliseconds(
                run, arguments.networks, max(3, arguments.rounds // (10 if ".pth" in name else 1))
            )
            for name, run in methods.items()
        }
    slowest = next(iter(times.values()))
    rows = [{"method": n, "ratio": slowest / t, "milliseconds": t} for n, t in times.items()]
    command = _report.command_line("batch_loading.py", argv)
    setting = {
        "command": command,
        "batch": f"{BATCH} networks, SIREN 2-32-32-1, of {arguments.networks}",
        "rounds": arguments.rounds,
        **_report.environment("torch", "numpy", "h5py"),
    }
    table = _report.to_markdown("Reading and augmenting a batch", COLUMNS, rows, setting)
    _report.write(arguments.output, "batch_loading", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
