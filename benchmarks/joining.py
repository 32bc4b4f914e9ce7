"""How fast shards become one zoo, as a share of the disk's sequential copy speed.

The copy reads all shards one after the other and writes their bytes to one file, flushed to disk; joining does so as
well, and verifies every shard's checksum and computes that of the whole. Both in turns, in the same run.

    python benchmarks/joining.py --folder DIR
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np

from weightspace.nets import MLP
from weightspace.zoo import Population, Zoo, join_zoos, spec_of

COLUMNS = {
    "what": "{what}",
    "ratio": "{ratio:.2f}x",
    "GB/s": "{gigabytes_per_second:.3f}",
    "seconds": "{seconds:.2f}",
    "CPU seconds": "{cpu_seconds:.2f}",
    "peak memory (MB)": "{megabytes:.0f}",
}
WIDTHS = (2, 64, 64, 1)


def make_shards(folder: Path, size: int, rows: int) -> list[Path]:
    """Zoos of random networks with all that a zoo of INRs has."""
    net = MLP(WIDTHS)
    spec = spec_of(net)
    rng = np.random.default_rng(0)
    count = max(2, round(size / (4 * rows * spec.num_parameters)))
    paths = []
    for number in range(count):
        index = np.arange(rows, dtype=np.int64)
        population = Population(
            spec=spec,
            weights=rng.standard_normal((rows, spec.num_parameters), dtype=np.float32),
            network=index,
            step=index,
            source=index + number * rows,
            view=np.zeros_like(index),
            split=np.zeros(rows, np.uint8),
            metrics={"psnr": rng.random(rows, dtype=np.float32)},
            labels={"label": index % 10},
        )
        paths.append(Zoo({"inr": population}).save(folder / f"shard-{number:05d}.h5"))
    return paths


def copy(paths: Sequence[Path], output: Path) -> None:
    """What the disk can do: the same bytes, one after the other."""
    buffer = memoryview(bytearray(2**23))
    with output.open("wb", buffering=0) as target:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    target.write(buffer[:got])
        os.fsync(target.fileno())


def peak_of_join(paths: Sequence[Path], output: Path) -> float:
    """MB that a process of its own takes at most, libraries included."""
    code = """
import resource, sys
from pathlib import Path
from weightspace.zoo import join_zoos
paths = sorted(Path(sys.argv[1]).glob("shard-*.h5"))
join_zoos(paths[: int(sys.argv[3])], Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
"""
    command = [sys.executable, "-c", code, str(paths[0].parent), str(output), str(len(paths))]
    found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    output.unlink()
    return found


def timed(run: Callable[[], object], output: Path) -> tuple[float, float]:
    """Seconds, and those of the processor; what other files left to be written is not counted."""
    os.sync()
    start, cpu = time.perf_counter(), time.process_time()
    run()
    found = time.perf_counter() - start, time.process_time() - cpu
    output.unlink()
    return found


def measure(paths: Sequence[Path], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Both, in turns."""
    output = folder / "joined.h5"
    size = sum(path.stat().st_size for path in paths)
    times: dict[str, list[tuple[float, float]]] = {"copy": [], "join": []}
    for _ in range(rounds):
        times["copy"].append(timed(lambda: copy(paths, output), output))
        times["join"].append(timed(lambda: join_zoos(paths, output), output))
    few, all_ = (peak_of_join(part, output) for part in (paths[: len(paths) // 4 or 1], paths))
    reference = min(times["copy"])[0]
    rows = []
    for name, megabytes in (("copy", 2**23 / 1e6), ("join", all_)):
        seconds, cpu_seconds = min(times[name])
        rows.append(
            {
                "what": {"copy": "copy the same bytes", "join": "verify, digest and join"}[name],
                "ratio": reference / seconds,
                "gigabytes_per_second": size / seconds / 1e9,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "megabytes": megabytes,
                "megabytes_of_a_quarter": megabytes if name == "copy" else few,
                "all_seconds": [found for found, _ in times[name]],
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``joining.json`` and ``joining.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=2.0, help="GB of shards")
    parser.add_argument("--rows", type=int, default=1024, help="networks per shard")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the best counts")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; a temporary one by default")
    parser.add_argument("--toy", action="store_true", help="1 MB, 1 round")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.size, arguments.rows, arguments.rounds = 0.001, 8, 1
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        paths = make_shards(folder, int(arguments.size * 1e9), arguments.rows)
        rows = measure(paths, folder, arguments.rounds)
        size = sum(path.stat().st_size for path in paths)
    setting = {
        "command": _report.command_line("joining.py", argv, {"--folder": "DIR"}),
        "shards": f"{len(paths)} of {arguments.rows} networks 2-64-64-1, {size / 1e9:.3g} GB in all",
        "peak memory of a quarter of them": f"{rows[1]['megabytes_of_a_quarter']:.0f} MB",
        "load of the machine before and after": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        **_report.environment("numpy", "h5py"),
    }
    table = _report.to_markdown("Joining shards", COLUMNS, rows, setting)
    _report.write(arguments.output, "joining", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
