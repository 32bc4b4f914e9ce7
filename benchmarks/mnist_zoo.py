"""From command to finished file: 10,000 INRs of MNIST with each protocol.

Runs the `weightspace generate` command itself, Python's start and compilation included.

    python benchmarks/mnist_zoo.py --data-root DIR
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report

from weightspace.zoo import Zoo

COLUMNS = {
    "protocol": "{protocol}",
    "minutes": "{minutes:.2f}",
    "networks/s": "{networks_per_second:.1f}",
    "networks": "{networks:,}",
    "median steps": "{median_steps:.0f}",
    "median PSNR (dB)": "{median_psnr:.2f}",
    "file (MB)": "{megabytes:.1f}",
}


def generate(protocol: str, recipe: Sequence[str], folder: Path) -> dict[str, Any]:
    """One run of the command."""
    output = folder / f"{protocol}.h5"
    command = [
        sys.executable,
        "-c",
        "from weightspace.cli import main; main()",
        "generate",
        *recipe,
        "-o",
        str(output),
        "--set",
        f"protocol={protocol}",
        "--json",
        "--quiet",
    ]
    start = time.perf_counter()
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    seconds = time.perf_counter() - start
    steps = sorted(Zoo.open(output)["inr"].step)
    return {
        "protocol": protocol,
        "minutes": seconds / 60,
        "networks_per_second": report["networks"] / seconds,
        "networks": report["networks"],
        "median_steps": float(steps[len(steps) // 2]),
        "median_psnr": report["median"],
        "megabytes": output.stat().st_size / 1e6,
        "digest": report["digest"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``mnist_zoo.json`` and ``mnist_zoo.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with mnist/*-ubyte[.gz]")
    parser.add_argument("--count", type=int, default=10_000, help="images")
    parser.add_argument("--toy", action="store_true", help="8 embedded digits, 4 hidden units")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    recipe = ["mnist-inr", "--count", str(arguments.count), "--data-root", str(arguments.data_root)]
    if arguments.toy:
        recipe = ["digits-inr", "--count", "8", "--set", "network.hidden=[4]"]
    elif arguments.data_root is None:
        parser.error("--data-root is required")
    with tempfile.TemporaryDirectory() as folder:
        rows = [generate(protocol, recipe, Path(folder)) for protocol in ("siren", "dws")]
    setting = {
        "command": _report.command_line("mnist_zoo.py", argv, {"--data-root": "DIR"}),
        "network": "SIREN 2-32-32-1, 784 samples, Adam 5e-4, 1000 steps or 40 dB",
        **_report.environment("torch", "numba", "numpy", "h5py"),
    }
    table = _report.to_markdown("Zoos of MNIST INRs, from command to file", COLUMNS, rows, setting)
    _report.write(arguments.output, "mnist_zoo", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
