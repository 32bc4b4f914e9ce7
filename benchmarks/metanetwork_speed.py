"""How long a training step of each metanetwork takes: forward and backward, batch 64, SIREN 2-32-32-1.

Beside the time: the floating point operations that PyTorch counts in matrix products, per second, against the
rate of one large matrix product on the same machine in the same run; and the most memory that the process held
in a step, beyond what it held before the model was made.

    python benchmarks/metanetwork_speed.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from weightspace.devices import keep_freed_memory
from weightspace.models import MODELS, model_config
from weightspace.nets import MLP
from weightspace.spec import Weights, WeightSpec
from weightspace.tasks import Metanetwork

NETWORK = MLP((2, 32, 32, 1), activation="sine", w0=30.0)
CLASSES = 10
# title: (model, its options, rounds at full size)
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "DWS, hidden 32, 4 layers, mean, no norm": ("dws", {"pooling": ("mean",), "norm": "none"}, 30),
    "DWS, hidden 32, 4 layers": ("dws", {}, 30),
    "DWS, paper preset": ("dws", {"preset": "paper"}, 30),
    "NFN-HNP, 3 x 512, paper preset": ("nfn", {"preset": "paper"}, 1),
    "UNF": ("unf", {}, 30),
    "graph, PNA style, hidden 32, 4 layers": ("graph", {}, 20),
    "graph, PNA style, hidden 32, 4 layers, compiled": ("graph", {"compile": True}, 20),
    "graph, GMN style, hidden 32, 4 layers": ("graph", {"preset": "gmn"}, 20),
    "graph + 64 probes": ("graph", {"probes": 64}, 20),
    "64 probes + MLP": ("probe", {"probes": 64}, 100),
    "ProbeGen, paper preset": ("probe", {"preset": "paper"}, 100),
    "DeepSets": ("deepsets", {}, 30),
    "statistics + MLP": ("statistics", {"reader": "mlp"}, 100),
    "flat MLP": ("mlp", {}, 100),
    "flat MLP, aligned": ("mlp", {"align": True}, 10),
}
TOY = {"nfn": {"hidden": 8}}
COLUMNS = {
    "model": "{model}",
    "ms per step": "{milliseconds:.1f}",
    "best": "{best:.1f}",
    "parameters": "{parameters:,}",
    "peak MB": "{megabytes:.0f}",
    "GFLOP": "{gflop:.2f}",
    "GFLOP/s": "{gflop_per_second:.0f}",
    "of matrix product": "{share:.0%}",
}


def matrix_product_rate(size: int, rounds: int) -> float:
    """GFLOP/s of the best of some square matrix products."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2e-9 * size**3 / min(seconds(lambda: torch.mm(left, right)) for _ in range(rounds))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Most memory that this process has held since :func:`forget_peak`, in MB; 0 where Linux does not tell."""
    return _status("VmHWM")


def forget_peak() -> float:
    """Give freed memory back, begin a new peak, and return the memory that is held, in MB."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024e-6 for line in lines if line.startswith(field)), 0.0)


def build(name: str, options: dict[str, Any], spec: WeightSpec) -> nn.Module:
    torch.manual_seed(0)
    architecture = {"kind": "mlp", "arguments": NETWORK.arguments()}
    compiled = options.pop("compile", False)
    model = Metanetwork(model_config(name, options).build(spec, architecture, CLASSES), None)
    if compiled:
        model.compile(dynamic=False)
    return model


def measure(
    name: str, options: dict[str, Any], spec: WeightSpec, weights: Weights, rounds: int
) -> dict[str, Any]:
    """Operations and memory of the first step, and the times of those after it."""
    before = forget_peak()
    options = dict(options)
    model = build(name, options, spec)

    def step() -> None:
        model.zero_grad()
        model(weights).square().sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    times = [seconds(step) for _ in range(rounds)]
    gflop = counter.get_total_flops() * 1e-9
    return {
        "options": model_config(name, options).model_dump(mode="json"),
        "milliseconds": 1e3 * float(np.median(times)),
        "best": 1e3 * min(times),
        "rounds": rounds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": peak_memory() - before,
        "gflop": gflop,
        "gflop_per_second": gflop / float(np.median(times)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``metanetwork_speed.json`` and ``metanetwork_speed.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", help="only these, as in dws,probe")
    parser.add_argument("--plain-malloc", action="store_true", help="leave the allocator as it is")
    parser.add_argument(
        "--toy", action="store_true", help="batch 4, 2 rounds, a narrow NFN, threads as they are"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    chosen = set(MODELS if arguments.models is None else arguments.models.split(","))
    if not chosen <= set(MODELS):
        parser.error(f"--models: expected some of {', '.join(MODELS)}, found {arguments.models}")
    if not arguments.toy:
        torch.set_num_threads(arguments.threads)
    kept = not arguments.plain_malloc and keep_freed_memory()
    size, rounds = (256, 2) if arguments.toy else (4096, 5)
    rate = matrix_product_rate(size, rounds)
    spec = WeightSpec.mlp(NETWORK.widths, activation=NETWORK.activation, w0=NETWORK.w0)
    batch = 4 if arguments.toy else arguments.batch
    flat = torch.randn(batch, spec.num_parameters, generator=torch.Generator().manual_seed(0))
    rows = []
    for title, (name, options, full) in ROWS.items():
        if name in chosen:
            if arguments.toy:
                options, full = {**options, **TOY.get(name, {})}, 2
            row = measure(name, options, spec, spec.unflatten(flat), full)
            rows.append({"model": title, **row, "share": row["gflop_per_second"] / rate})
            print(title, f"{row['milliseconds']:.1f} ms", file=sys.stderr, flush=True)
    setting = {
        "command": _report.command_line("metanetwork_speed.py", argv, {"-o": "OUTDIR"}),
        "batch": batch,
        "networks": f"SIREN {'-'.join(map(str, NETWORK.widths))}, random weights",
        "a matrix product": f"{size} x {size}, {rate:.0f} GFLOP/s",
        "ms per step": "median; forward and backward, without the optimiser",
        "freed memory": "kept, as in `weightspace train`" if kept else "returned to the system",
        **_report.environment("torch"),
        "measured elsewhere, same size and cores": "DWSNets' own code 496 ms; NFN's own code 3,570 ms and 1.9 GB",
    }
    table = _report.to_markdown("A training step of each metanetwork", COLUMNS, rows, setting)
    _report.write(arguments.output, "metanetwork_speed", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
