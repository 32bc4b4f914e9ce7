"""How long an import of one-file networks takes, beside merely reading the files with `torch.load`.

One `.pth` state dict per INR, as DWSNets lays them out, made here in a temporary folder. In every round all files are
read by a plain loop, and imported; the second way also lists the folders, checks every network, keeps what it read
for a resumed import, and writes the zoo. The rounds alternate, so that a noisy machine disturbs both alike.

Files of `torch.save` differ in their numbers alone, so the importer interprets the pickle of the first of them only
(`weightspace/zoo/transfer/_state_files.py`). For files where it cannot do so, those of PyTorch before 1.6, it calls
`torch.load` itself: that is the second pair of rows.

    python benchmarks/importing.py
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

from weightspace.nets import MLP
from weightspace.zoo import import_zoo

COLUMNS = {
    "files": "{files}",
    "method": "{method}",
    "speed": "{ratio:.2f}x",
    "files per second": "{per_second:,.0f}",
    "us per file": "{microseconds:.0f}",
}
KINDS = {"archives (PyTorch 1.6 and later)": True, "pickles (before 1.6)": False}


def make_files(folder: Path, networks: int, zipped: bool) -> list[Path]:
    """Random SIRENs 2-32-32-1 under the names of `nn.Sequential`, one file each."""
    paths = []
    for item in range(networks):
        torch.manual_seed(item)
        path = folder / f"mnist_png_training_{item % 10}_{item}" / "checkpoints" / "net.pth"
        path.parent.mkdir(parents=True)
        state = {name.replace("layers", "seq"): t for name, t in MLP((2, 32, 32, 1)).state_dict().items()}
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        paths.append(path)
    return paths


def seconds(run: Callable[[], object]) -> float:
    """Of one run."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def read_all(paths: Sequence[Path]) -> None:
    """The plain loop."""
    for path in paths:
        torch.load(path, weights_only=True, map_location="cpu")


def measure(folder: Path, kind: str, networks: int, rounds: int) -> list[dict[str, object]]:
    """Both ways in turns; medians over the rounds."""
    paths = make_files(folder / "source", networks, KINDS[kind])
    output = folder / "zoo.h5"

    def import_all() -> None:
        import_zoo("dwsnets", folder / "source", output, overwrite=True, progress=False)

    read_all(paths)  # the files are in the system's cache from here on
    times = np.array([[seconds(lambda: read_all(paths)), seconds(import_all)] for _ in range(rounds)])
    speed = np.median(times[:, 0] / times[:, 1])
    methods = ("torch.load of each file, and nothing else", 1.0), ("weightspace import", float(speed))
    return [
        {
            "files": kind,
            "method": method,
            "ratio": ratio,
            "per_second": networks / float(took),
            "microseconds": float(took) / networks * 1e6,
        }
        for (method, ratio), took in zip(methods, np.median(times, axis=0), strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``importing.json`` and ``importing.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=10_000, help="files to import")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way")
    parser.add_argument("--toy", action="store_true", help="60 files, 2 rounds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.networks, arguments.rounds = 60, 2
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(Path(folder), kind, arguments.networks, arguments.rounds)
    setting = {
        "command": _report.command_line("importing.py", argv),
        "networks": f"{arguments.networks:,} SIRENs 2-32-32-1, one file each",
        "speed": "relative to the plain loop in the same round, median",
        "rounds": arguments.rounds,
        **_report.environment("torch", "numpy", "h5py"),
    }
    table = _report.to_markdown("Importing one-file networks", COLUMNS, rows, setting)
    _report.write(arguments.output, "importing", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
