"""How accurate is a CNN, told from its weights? All families of metanetworks on one zoo of classifiers.

Runs what a user would: `weightspace generate` (unless the zoo exists), then `train --task regression --target
test_accuracy` and `evaluate` for each family. Networks are split as wholes; intervals are of 1,000 bootstrap samples of
the test split's networks.

    python benchmarks/accuracy_prediction.py --data-root DIR --zoo fashion-cnns.h5 --runs runs
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report
from classification import slug

from weightspace.datagen import generate
from weightspace.tasks import evaluate, train, train_config
from weightspace.zoo import Zoo

# title: (model, what is set, epochs or None for models that are fitted in one go)
FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "statistics + trees": ("statistics", {}, None),
    "statistics + MLP": ("statistics", {"model.reader": "mlp"}, 40),
    "DeepSets": ("deepsets", {}, 15),
    "64 probes": ("probe", {}, 15),
    "DWS": ("dws", {}, 10),
    "UNF": ("unf", {}, 10),
    "NFN-HNP": ("nfn", {"model.channels": [32, 32, 32]}, 8),
    "graph network": ("graph", {}, 5),
}
SEVERAL = ("64 probes", "graph network")
"""Families that read networks of other architectures."""
COLUMNS = {
    "metanetwork": "{title}",
    "trained on": "{trained}",
    "tested on": "{tested}",
    "Kendall's tau": "{tau:.3f}",
    "95 % of tau": "{tau_low:.3f} to {tau_high:.3f}",
    "R2": "{r2:.3f}",
    "95 % of R2": "{r2_low:.3f} to {r2_high:.3f}",
    "epochs": "{epochs}",
    "minutes": "{minutes:.1f}",
    "parameters": "{parameters:,}",
}
TOY = {
    "network.channels": 3,
    "training.epochs": 2,
    "checkpoints": [0],
    "data.count": 200,
    "training.dropout": 0.0,
}


def run_family(
    title: str, zoo: Path, runs: Path, population: str, others: Sequence[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train one family on a population (or all), and score it on that and on others' test splits."""
    model, changes, full = FAMILIES[title]
    values = {
        "zoo": str(zoo),
        "model": model,
        "task": "regression",
        "target": "test_accuracy",
        "population": population,
        "where": arguments.where,
        "epochs": full and (1 if arguments.toy else arguments.epochs or full),
    }
    run = runs / f"{slug(title)}-{slug(population)}"
    trained = train(train_config(values, changes), run)
    rows = []
    for tested in (population, *others):
        report = evaluate(run, split="test", population=None if tested == population else tested)
        rows.append(
            {
                "title": title,
                "trained": population,
                "tested": tested,
                **_score("tau", "kendall_tau", report),
                **_score("r2", "r2", report),
                "networks": report.networks,
                "epochs": trained.epochs or "-",
                "minutes": trained.seconds / 60,
                "parameters": trained.parameters,
            }
        )
    return rows


def _score(name: str, metric: str, report: Any) -> dict[str, float]:
    low, high = report.intervals[metric]
    return {name: report.metrics[metric], f"{name}_low": low, f"{name}_high": high}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fashion-cnn-zoo", help="of the zoo")
    parser.add_argument("--data-root", type=Path, help="folder with fashion-mnist/*-ubyte[.gz]")
    parser.add_argument("--zoo", type=Path, default=Path("fashion-cnns.h5"), help="made unless it exists")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs go")
    parser.add_argument("--families", help="only these, as in 'DWS,graph network'")
    parser.add_argument("--where", default=None, help="which rows, as in 'epoch == last'")
    parser.add_argument("--epochs", type=int, help="of all families; their own otherwise")
    parser.add_argument("--name", default="accuracy_prediction", help="of the result files")
    parser.add_argument(
        "--toy", action="store_true", help="24 tiny CNNs of the digits, one epoch, two families"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    titles = list(FAMILIES) if arguments.families is None else arguments.families.split(",")
    if unknown := set(titles) - set(FAMILIES):
        parser.error(f"--families: expected some of {', '.join(FAMILIES)}, found {', '.join(unknown)}")
    start = time.perf_counter()
    if arguments.toy:
        titles = ["statistics + trees", "64 probes"]
        changes = {**TOY, "network.activation": {"choice": ["relu", "tanh"]}}
        made = generate("digits-cnn", arguments.zoo, count=40, overrides=changes, progress=False)
    else:
        made = generate(arguments.recipe, arguments.zoo, data_root=arguments.data_root)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    populations = list(Zoo.open(arguments.zoo))
    paths = {"--data-root": "DIR", "--zoo": "ZOO.h5", "--runs": "RUNS", "-o": "OUTDIR"}
    setting = {
        "command": _report.command_line("accuracy_prediction.py", argv, paths),
        "zoo": f"{made.networks:,} networks, {made.digest}",
        "target": "test_accuracy of each checkpoint, of networks that were never seen",
        "rows": arguments.where or "all checkpoints",
        **_report.environment("torch", "scikit-learn", "lightning"),
    }
    rows: list[dict[str, Any]] = []
    for title in titles:
        others = populations[1:] if title in SEVERAL else []
        rows += run_family(title, arguments.zoo, arguments.runs, populations[0], others, arguments)
        if title in SEVERAL and len(populations) > 1:
            rows += run_family(title, arguments.zoo, arguments.runs, "all", (), arguments)
        table = _report.to_markdown("Predicting accuracy from weights", COLUMNS, rows, setting)
        _report.write(arguments.output, arguments.name, table, rows, setting)
        figure = arguments.runs / f"{slug(title)}-{slug(populations[0])}" / "test.png"
        if figure.exists() and not arguments.toy:
            shutil.copy(figure, arguments.output / f"{arguments.name}_{slug(title)}.png")
    print(f"total: {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
