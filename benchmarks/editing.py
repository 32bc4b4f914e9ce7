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

import _inrs
import _report

from weightspace.tasks import evaluate, train, train_config

# (edit, model, its options, epochs)
ROWS: list[tuple[str, str, dict[str, Any], int]] = [
    ("dilate", "dws", {}, 30),
    ("dilate", "graph", {"model.probes": 64}, 30),
    ("contrast", "dws", {}, 30),
]
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
    _inrs.add_arguments(parser)
    parser.add_argument("--edits", help="only these, as in dilate,contrast")
    arguments = parser.parse_args(argv)
    known = {row[0] for row in ROWS}
    edits = known if arguments.edits is None else set(arguments.edits.split(","))
    if not edits <= known:
        parser.error(f"--edits: expected some of {', '.join(sorted(known))}, found {arguments.edits}")
    start = time.perf_counter()
    setting = _inrs.prepare(arguments, "editing.py", argv, "lightning")
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
