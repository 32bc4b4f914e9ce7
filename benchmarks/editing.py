"""Editing the weights of INRs so that they render other images: each edit, and the error beside doing nothing.

Runs what a user would: `weightspace generate` (unless the zoo exists), then `train --task editing` and `evaluate`. Errors
are mean squared errors of rendered pixels in [0, 1], times 100, on the test split.

    python benchmarks/editing.py --data-root DIR --zoo mnist-10k.h5 --runs runs
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report

from weightspace.datagen import generate
from weightspace.tasks import evaluate, train, train_config
from weightspace.zoo import Zoo

# (edit, model, its options, epochs)
ROWS: list[tuple[str, str, dict[str, Any], int]] = [
    ("dilate", "dws", {}, 30),
    ("dilate", "graph", {"model.probes": 64}, 30),
    ("contrast", "dws", {}, 30),
]
PATHS = {"--data-root": "DIR", "--zoo": "ZOO.h5", "--runs": "RUNS", "-o": "OUTDIR"}
COLUMNS = {
    "edit": "{edit}",
    "metanetwork": "{model}",
    "MSE x 100": "{error:.2f}",
    "of networks as they were": "{before:.2f}",
    "epochs": "{epochs}",
    "minutes": "{minutes:.1f}",
    "parameters": "{parameters:,}",
}


def run(
    edit: str, model: str, changes: dict[str, Any], epochs: int, zoo: Path, folder: Path
) -> dict[str, Any]:
    """Train (or resume, or find finished) one metanetwork, and score it once on the test split."""
    values = {"zoo": str(zoo), "task": "editing", "model": model, "epochs": epochs}
    config = train_config(values, {"task.edit": edit, **changes})
    trained = train(config, folder)
    tested = evaluate(folder, split="test")
    return {
        "edit": edit,
        "model": f"{model} + probes" if "model.probes" in changes else model,
        "error": tested.metrics["mse_x_100"],
        "before": tested.reference["mse_x_100"],
        "epochs": epochs,
        "minutes": trained.seconds / 60,
        "parameters": trained.parameters,
        "networks": tested.networks,
        "config": config.model_dump(mode="json", exclude={"zoo"}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``editing.json`` and ``editing.md`` as the results come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with mnist/*-ubyte[.gz]")
    parser.add_argument("--count", type=int, default=10_000, help="images")
    parser.add_argument("--zoo", type=Path, default=Path("mnist-10k.h5"), help="made unless it exists")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--edits", help="only these, as in dilate,contrast")
    parser.add_argument("--toy", action="store_true", help="24 embedded digits, one epoch, small models")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    known = {row[0] for row in ROWS}
    edits = known if arguments.edits is None else set(arguments.edits.split(","))
    if not edits <= known:
        parser.error(f"--edits: expected some of {', '.join(sorted(known))}, found {arguments.edits}")
    recipe, overrides = "mnist-inr", {}
    if arguments.toy:
        recipe, arguments.count = "digits-inr", 24
        overrides = {"network.hidden": [4], "protocol.steps": 20}
    start = time.perf_counter()
    made = generate(
        recipe, arguments.zoo, count=arguments.count, data_root=arguments.data_root, overrides=overrides
    )
    arguments.runs.mkdir(parents=True, exist_ok=True)
    zoo = Zoo.open(arguments.zoo)["inr"]
    setting = {
        "command": _report.command_line("editing.py", argv, PATHS),
        "zoo": f"{recipe}, {made.networks:,} networks, {made.digest}",
        "splits": ", ".join(f"{split} {len(zoo.rows_of(split)):,}" for split in ("train", "val", "test")),
        **_report.environment("torch", "lightning"),
    }
    rows: list[dict[str, Any]] = []
    for edit, model, changes, epochs in ROWS:
        if edit in edits:
            if arguments.toy:
                changes, epochs = {**changes, "model.hidden": 4, "model.layers": 1}, 1
            folder = arguments.runs / f"{edit}-{model}"
            rows.append(run(edit, model, changes, epochs, arguments.zoo, folder))
            table = _report.to_markdown("Editing INRs", COLUMNS, rows, setting)
            _report.write(arguments.output, "editing", table, rows, setting)
            shutil.copy(folder / "test.png", arguments.output / f"editing_{edit}_{model}.png")
    print(f"total: {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
