"""Which digit does an INR show? All families of metanetworks on one zoo, judged on its test split.

Runs what a user would: `weightspace generate` (unless the zoo exists), then `train` and `evaluate` for each family and
seed. The numbers of epochs are such that training takes ten minutes at most on two cores.

    python benchmarks/classification.py --data-root DIR --zoo mnist-10k.h5 --runs runs
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import _inrs
import _report

from weightspace.tasks import TrainConfig, evaluate, train, train_config

# title: (model, what is set, epochs or None for models that are fitted in one go)
FAMILIES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "flat MLP": ("mlp", {}, 30),
    "aligned MLP": ("mlp", {"model.align": True}, 30),
    "statistics + trees": ("statistics", {}, None),
    "statistics + MLP": ("statistics", {"model.reader": "mlp"}, 60),
    "DeepSets": ("deepsets", {}, 60),
    "DWS": ("dws", {}, 35),
    "NFN-HNP": ("nfn", {}, 35),
    "UNF": ("unf", {}, 45),
    "graph network": ("graph", {}, 30),
    "graph network + 128 probes": ("graph", {"model.probes": 128}, 30),
    "64 probes": ("probe", {}, 60),
    "ProbeGen": ("probe", {"model.preset": "paper"}, 60),
}
COLUMNS = {
    "metanetwork": "{title}",
    "test accuracy": "{accuracy:.1%}",
    "spread over seeds": "{spread}",
    "validation": "{validation:.1%}",
    "seeds": "{seeds}",
    "epochs": "{epochs}",
    "minutes": "{minutes:.1f}",
    "parameters": "{parameters:,}",
}


def slug(title: str) -> str:
    """A title as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def configuration(title: str, zoo: Path, epochs: int | None, seed: int) -> TrainConfig:
    """What one run is trained with."""
    model, changes, full = FAMILIES[title]
    chosen = dict(changes)
    options = {"preset": chosen.pop("model.preset")} if "model.preset" in chosen else {}
    values = {"zoo": str(zoo), "model": model, "options": options, "seed": seed}
    return train_config({**values, "epochs": full and (epochs or full)}, chosen)


def run_family(title: str, zoo: Path, runs: Path, epochs: int | None, seeds: Sequence[int]) -> dict[str, Any]:
    """Train (or resume, or find finished) one family, and score each run once on the test split."""
    trained, tested = [], []
    for seed in seeds:
        run = runs / f"{slug(title)}-{seed}"
        trained.append(train(configuration(title, zoo, epochs, seed), run))
        tested.append(evaluate(run, split="test"))
    accuracies = [report.metrics["accuracy"] for report in tested]
    return {
        "title": title,
        "accuracy": mean(accuracies),
        "accuracies": accuracies,
        "spread": f"{stdev(accuracies):.1%}" if len(accuracies) > 1 else "-",
        "validation": mean(report.metrics["accuracy"] for report in trained),
        "seeds": len(seeds),
        "epochs": trained[0].epochs or "-",
        "minutes": mean(report.seconds for report in trained) / 60,
        "parameters": trained[0].parameters,
        "networks": tested[0].networks,
        "config": configuration(title, zoo, epochs, seeds[0]).model_dump(mode="json", exclude={"zoo"}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _inrs.add_arguments(parser)
    parser.add_argument("--families", help="only these, as in 'DWS,graph network'")
    parser.add_argument("--seeds", default="0", help="as in 0,1,2")
    parser.add_argument("--epochs", type=int, help="of all families; their own otherwise")
    parser.add_argument("--name", default="mnist_classification", help="of the result files")
    arguments = parser.parse_args(argv)
    titles = list(FAMILIES) if arguments.families is None else arguments.families.split(",")
    if unknown := set(titles) - set(FAMILIES):
        parser.error(f"--families: expected some of {', '.join(FAMILIES)}, found {', '.join(unknown)}")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    epochs = 1 if arguments.toy else arguments.epochs
    start = time.perf_counter()
    setting = _inrs.prepare(arguments, "classification.py", argv, "scikit-learn", "lightning")
    rows: list[dict[str, Any]] = []
    for title in titles:
        rows.append(run_family(title, arguments.zoo, arguments.runs, epochs, seeds))
        table = _report.to_markdown("Classifying INRs", COLUMNS, rows, setting)
        _report.write(arguments.output, arguments.name, table, rows, setting)
        for figure in ("learning_curve", "test"):
            drawn = arguments.runs / f"{slug(title)}-{seeds[0]}" / f"{figure}.png"
            if drawn.exists():
                shutil.copy(drawn, arguments.output / f"{arguments.name}_{slug(title)}_{figure}.png")
    print(f"total: {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
