"""Which digit does an INR show? All metanetworks trained on one zoo, judged on its test split.

Runs the commands that a user would: `weightspace generate` (unless the zoo exists), then `train` and `evaluate`
for each model. Learning curves and confusion matrices are copied beside the table.

    python benchmarks/classification.py --data-root DIR --zoo mnist-20k.h5 --runs runs
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

MODELS = ("mlp", "statistics", "dws", "probe")
PATHS = {"--data-root": "DIR", "--zoo": "ZOO.h5", "--runs": "RUNS", "-o": "OUTDIR"}
COLUMNS = {
    "model": "{model}",
    "test accuracy": "{accuracy:.1%}",
    "validation": "{validation:.1%}",
    "epochs": "{epochs}",
    "minutes": "{minutes:.1f}",
    "parameters": "{parameters:,}",
}


def run_model(name: str, zoo: Path, runs: Path, epochs: dict[str, int]) -> dict[str, Any]:
    """Train (or resume, or find finished) one model, then score it once on the test split."""
    config = train_config({"zoo": str(zoo), "model": name, "epochs": epochs.get(name)})
    trained = train(config, runs / name)
    tested = evaluate(runs / name, split="test")
    return {
        "model": name,
        "accuracy": tested.metrics["accuracy"],
        "validation": trained.metrics["accuracy"],
        "epochs": trained.epochs or "-",
        "minutes": trained.seconds / 60,
        "parameters": trained.parameters,
        "networks": tested.networks,
        "config": config.model_dump(mode="json", exclude={"zoo"}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with mnist/*-ubyte[.gz]")
    parser.add_argument("--recipe", default="mnist-inr")
    parser.add_argument("--count", type=int, default=20_000, help="images")
    parser.add_argument("--zoo", type=Path, default=Path("mnist-20k.h5"), help="made unless it exists")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--epochs", default="", help="as in dws=40,probe=20; the models' defaults otherwise")
    parser.add_argument("--name", default="mnist_classification", help="of the result files")
    parser.add_argument("--toy", action="store_true", help="24 embedded digits, one epoch")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    epochs = {
        name: int(value) for name, value in (pair.split("=") for pair in arguments.epochs.split(",") if pair)
    }
    overrides: dict[str, Any] = {}
    if arguments.toy:
        arguments.recipe, arguments.count = "digits-inr", 24
        overrides = {"network.hidden": [4], "protocol.steps": 20}
        epochs = dict.fromkeys(MODELS, 1)
    start = time.perf_counter()
    made = generate(
        arguments.recipe,
        arguments.zoo,
        count=arguments.count,
        data_root=arguments.data_root,
        overrides=overrides,
    )
    arguments.runs.mkdir(parents=True, exist_ok=True)
    zoo = Zoo.open(arguments.zoo)["inr"]
    setting = {
        "command": _report.command_line("classification.py", argv, PATHS),
        "zoo": f"{arguments.recipe}, {made.networks:,} networks, {made.digest}",
        "splits": ", ".join(f"{split} {len(zoo.rows_of(split)):,}" for split in ("train", "val", "test")),
        **_report.environment("torch", "scikit-learn", "lightning"),
    }
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        rows.append(run_model(name, arguments.zoo, arguments.runs, epochs))
        table = _report.to_markdown("Classifying INRs", COLUMNS, rows, setting)
        _report.write(arguments.output, arguments.name, table, rows, setting)
        for figure in ("learning_curve", "test"):
            drawn = arguments.runs / name / f"{figure}.png"
            if drawn.exists():
                shutil.copy(drawn, arguments.output / f"{arguments.name}_{name}_{figure}.png")
    print(f"total: {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
