"""What do embeddings learned without labels know of a network? Contrastive DWS, read by linear probes.

Two zoos of INRs with several views per item: handwritten digits, whose label is to be read, and sines, whose frequency
and amplitude are (Navon et al. 2023, arXiv:2301.12780, section 7.3, have such an experiment). Every row sees the same
networks, and is scored on the same test split, by a linear probe that is fitted on the training split; the last row is
trained on the labels themselves. Runs what a user would: `weightspace generate`, `train --task contrastive`,
`evaluate --target`.

    python benchmarks/contrastive.py --work DIR
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _report
import torch
from classification import slug
from torch import Tensor

from weightspace.datagen import generate
from weightspace.datasets import ZooDataset
from weightspace.spec import Weights, WeightSpec, canonicalize
from weightspace.tasks import LinearProbe, evaluate, train, train_config

ZOOS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    # name: (recipe, what is set, labels by their column)
    "digits": ("digits-inr", {}, {"digit": "label"}),
    "sines": (
        "sine-inr",
        {"source.amplitude": {"uniform": [0.1, 1.0]}},
        {"frequency": "frequency_1", "amplitude": "amplitude_1"},
    ),
}
RAW: dict[str, Callable[[WeightSpec, Weights], Weights]] = {
    "weights": lambda spec, weights: weights,
    "canonical weights": lambda spec, weights: canonicalize(spec, weights)[0],
}
UNTRAINED = "untrained DWS"
CONTRASTIVE = {
    "contrastive, noise": "noise(0.1)",
    "contrastive, sign + noise": "sign, noise(0.1)",
    "contrastive, views + sign + noise": "views, sign, noise(0.1)",
}
SUPERVISED = "supervised DWS"
COLUMNS = {
    "what is read": "{title}",
    "digit, accuracy": "{digit_accuracy:.1%}",
    "frequency, R2": "{frequency_r2:.3f}",
    "frequency, MSE": "{frequency_mse:.3f}",
    "amplitude, R2": "{amplitude_r2:.3f}",
    "amplitude, MSE": "{amplitude_mse:.4f}",
    "minutes": "{minutes:.1f}",
}
SMALL = {"model.hidden": 16, "model.layers": 3}
TOY = {"network.hidden": [4], "protocol.steps": 20}


def score_weights(title: str, zoo: Path, target: str) -> dict[str, float]:
    """A linear probe of flat weights."""
    parts = [ZooDataset(zoo, split, target=target) for split in ("train", "val", "test")]
    features = [_flat(RAW[title], part) for part in parts]
    targets = [part.targets for part in parts]
    probe = LinearProbe.fit((features[0], targets[0]), (features[1], targets[1]), classes=parts[0].classes)
    found, true = probe(features[2]), targets[2]
    if parts[0].classes is not None:
        return {"accuracy": float((found.argmax(-1) == true).float().mean())}
    error = float((found[:, 0] - true).square().mean())
    return {"r2": 1 - error / float(true.var(correction=0)), "mse": error}


def _flat(change: Callable[[WeightSpec, Weights], Weights], dataset: ZooDataset) -> Tensor:
    weights, _ = dataset.read(range(len(dataset)))
    return dataset.spec.flatten(change(dataset.spec, weights))


def score_run(run: Path, zoo: Path, label: str, target: str | None) -> dict[str, float]:
    """Scores on the test split: those of a linear probe of ``target``, or of the run itself without one."""
    metrics = evaluate(run, target=target).metrics
    if "accuracy" in metrics:
        return {"accuracy": metrics["accuracy"]}
    spread = ZooDataset(zoo, "train", target=label).targets.double().var(correction=0)
    return {"r2": metrics["r2"], "mse": metrics["loss"] * float(spread)}


def train_embedding(title: str, zoo: Path, run: Path, epochs: int) -> None:
    """A contrastive run; the untrained one sees one epoch at no learning rate, for BatchNorm's statistics."""
    values: dict[str, Any] = {"zoo": str(zoo), "task": "contrastive", "epochs": epochs}
    values["augment"] = CONTRASTIVE.get(title, "noise(0.1)")
    if title == UNTRAINED:
        values |= {"epochs": 1, "learning_rate": 1e-12}
    train(train_config(values, SMALL), run)


def train_supervised(zoo: Path, run: Path, target: str, epochs: int) -> None:
    """A run on one label."""
    regression = ZooDataset(zoo, "train", target=target).targets.is_floating_point()
    task = "regression" if regression else "classification"
    values = {"zoo": str(zoo), "task": task, "target": target, "epochs": epochs}
    train(train_config({**values, "augment": "sign, noise(0.1)"}, SMALL), run)


def measure(title: str, zoos: dict[str, Path], runs: Path, epochs: int) -> dict[str, Any]:
    """One row."""
    start, row = time.perf_counter(), {"title": title}
    for name, zoo in zoos.items():
        run = runs / f"{name}-{slug(title)}"
        if title == UNTRAINED or title in CONTRASTIVE:
            train_embedding(title, zoo, run, epochs)
        for column, label in ZOOS[name][2].items():
            if title in RAW:
                scores = score_weights(title, zoo, label)
            elif title == SUPERVISED:
                train_supervised(zoo, runs / f"{run.name}-{column}", label, epochs)
                scores = score_run(runs / f"{run.name}-{column}", zoo, label, None)
            else:
                scores = score_run(run, zoo, label, label)
            row |= {f"{column}_{metric}": value for metric, value in scores.items()}
    return {**row, "minutes": (time.perf_counter() - start) / 60}


def make_zoos(arguments: argparse.Namespace) -> dict[str, Path]:
    """Generate what is not there yet."""
    zoos = {}
    for name, (recipe, changes, _) in ZOOS.items():
        sized = {**changes, **({"source.count": arguments.count} if name == "sines" else {})}
        zoos[name] = arguments.work / f"{name}-{arguments.count}x{arguments.views}.h5"
        generate(
            recipe,
            zoos[name],
            count=arguments.count,
            views=arguments.views,
            overrides={**sized, **(TOY if arguments.toy else {})},
        )
    return zoos


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("contrastive"), help="where zoos and runs go")
    parser.add_argument("--count", type=int, default=1000, help="items of each zoo")
    parser.add_argument("--views", type=int, default=3, help="networks per item")
    parser.add_argument("--epochs", type=int, default=12, help="of each training")
    parser.add_argument("--toy", action="store_true", help="40 tiny networks of each kind, one epoch")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.count, arguments.views, arguments.epochs = 20, 2, 1
    arguments.work.mkdir(parents=True, exist_ok=True)
    zoos = make_zoos(arguments)
    parts = {split: len(ZooDataset(zoos["digits"], split)) for split in ("train", "val", "test")}
    setting = {
        "command": _report.command_line("contrastive.py", argv, {"--work": "DIR", "-o": "OUTDIR"}),
        "zoos": f"{arguments.count} items each, {arguments.views} networks per item",
        "splits": ", ".join(f"{split} {count}" for split, count in parts.items()) + " networks",
        "metanetwork": f"DWS, {SMALL['model.layers']} layers of {SMALL['model.hidden']} channels, {arguments.epochs} epochs",
        "probe": "logistic or ridge regression on the training split, its penalty chosen on the validation split",
        **_report.environment("torch", "lightning"),
    }
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for title in (*RAW, UNTRAINED, *CONTRASTIVE, SUPERVISED):
        rows.append(measure(title, zoos, arguments.work / "runs", arguments.epochs))
        table = _report.to_markdown("Embeddings learned without labels", COLUMNS, rows, setting)
        _report.write(arguments.output, "contrastive", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
