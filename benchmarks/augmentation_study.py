"""What do augmentations bring? Metanetworks trained with each on Fashion-MNIST INRs, one view of each image.

Every run is what `weightspace train` does, with `--augment` alone changed, on the first 1,000, 2,500 or 5,000 networks of
the training split; the validation split picks the epoch. All are judged on the same networks: the test split, and those of
the training split beyond the first 5,000, which no run was trained on. Runs that are finished are not repeated.

    python benchmarks/augmentation_study.py --data-root DIR --zoo fashion-9k.h5 --runs runs
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import _inrs
import _report
import numpy as np
import torch

from weightspace.tasks import evaluate, train, train_config
from weightspace.zoo import SPLITS, Population, Zoo

CONDITIONS = {
    "none": "",
    "sign + noise": "sign, noise(0.05)",
    "input space": "rotation(30), scaling(0.2), translation(0.25)",
    "direct MixUp": "mixup(direct)",
    "permuted MixUp": "mixup(permuted)",
    "aligned MixUp": "mixup(aligned)",
    "sign + noise + aligned MixUp": "sign, noise(0.05), mixup(aligned)",
}
# smaller than the defaults, so that a study of some thirty runs fits into hours on two cores
MODELS: dict[str, dict[str, Any]] = {
    "dws": {"model.hidden": 16},
    "graph": {"model.hidden": 16, "model.layers": 3},
}
COLUMNS = {
    "metanetwork": "{model}",
    "augmentation": "{condition}",
    "networks": "{networks:,}",
    "test accuracy": "{accuracy:.1%}",
    "spread over seeds": "{spread}",
    "against none": "{gain}",
    "train accuracy": "{fitted}",
    "seeds": "{seeds}",
    "epochs": "{epochs}",
    "minutes a run": "{minutes:.1f}",
}


@dataclass(frozen=True)
class Job:
    """One run."""

    model: str
    condition: str
    networks: int
    seed: int
    epochs: int
    zoo: Path
    held_out: Path
    run: Path


def subset(zoo: Path, networks: int, folder: Path) -> Path:
    """A zoo with the first networks of the training split, and all of the others; made unless it is there."""
    path = folder / f"{zoo.stem}-{networks}.h5"
    if not path.exists():
        whole = Zoo.open(zoo)
        (name,) = whole
        population = whole[name]
        train = population.rows_of("train")
        if len(train) < networks:
            raise SystemExit(f"--sizes: the zoo has {len(train)} networks to train on, fewer than {networks}")
        kept = np.sort(
            np.concatenate([train[:networks], *(population.rows_of(split) for split in SPLITS[1:])])
        )
        Zoo({name: _of_rows(population, kept)}, whole.sources, whole.recipe).save(path)
    return path


def held_out(zoo: Path, networks: int, folder: Path) -> Path:
    """A zoo of the test split and the networks of the training split beyond the first ones; made unless it is there."""
    path = folder / f"{zoo.stem}-beyond-{networks}.h5"
    if not path.exists():
        whole = Zoo.open(zoo)
        (name,) = whole
        population = whole[name]
        kept = np.sort(np.concatenate([population.rows_of("train")[networks:], population.rows_of("test")]))
        others = _of_rows(population, kept)
        test = np.full_like(others.split, SPLITS.index("test"))
        Zoo({name: replace(others, split=test)}, whole.sources, whole.recipe).save(path)
    return path


def _of_rows(population: Population, rows: np.ndarray) -> Population:
    """A population of networks with one checkpoint each."""
    networks = population.network[rows]
    tables = {
        "metrics": {name: values[rows] for name, values in population.metrics.items()},
        **{
            table: {name: values[networks] for name, values in getattr(population, table).items()}
            for table in ("labels", "hyperparameters")
        },
    }
    return Population(
        population.spec,
        np.asarray(population.weights[rows]),
        np.arange(len(rows)),
        population.step[rows],
        *(getattr(population, name)[networks] for name in ("source", "view", "split")),
        **tables,
        architecture=population.architecture,
        protocol=population.protocol,
        dtype=population.dtype,
    )


def run_job(job: Job) -> dict[str, Any]:
    """Train, or find finished, and score on the test split; on one thread, as runs go on side by side."""
    torch.set_num_threads(1)
    finished = job.run / "study.json"
    if finished.exists():
        return dict(json.loads(finished.read_text()))
    values = {
        "zoo": str(job.zoo),
        "model": job.model,
        "augment": CONDITIONS[job.condition],
        "epochs": job.epochs,
        "seed": job.seed,
    }
    report = train(train_config(values, MODELS[job.model]), job.run, progress=False)
    tested = evaluate(job.run, job.held_out, split="test")
    last = (job.run / "metrics.csv").read_text().splitlines()
    fitted = dict(zip(last[0].split(","), last[-1].split(","), strict=True))["train_accuracy"]
    found = {
        "accuracy": tested.metrics["accuracy"],
        "judged": tested.networks,
        "validation": report.metrics["accuracy"],
        "fitted": float(fitted),
        "minutes": report.seconds / 60,
        "best_epoch": report.best_epoch,
    }
    finished.write_text(json.dumps(found))
    return found


def rows_of(jobs: Sequence[Job], found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per metanetwork, augmentation and size of which some runs are finished."""
    rows: list[dict[str, Any]] = []
    for model, condition, networks in dict.fromkeys((j.model, j.condition, j.networks) for j in jobs):
        mine = {
            j.seed: found[j]
            for j in found
            if (j.model, j.condition, j.networks) == (model, condition, networks)
        }
        if mine:
            rows.append(
                {
                    "model": model,
                    "condition": condition,
                    "networks": networks,
                    **_summary(mine, jobs[0].epochs),
                }
            )
    base = {(row["model"], row["networks"]): row["accuracy"] for row in rows if row["condition"] == "none"}
    for row in rows:
        none = base.get((row["model"], row["networks"]))
        row["gain"] = (
            "-" if none is None or row["condition"] == "none" else f"{100 * (row['accuracy'] - none):+.1f}"
        )
    return rows


def _summary(runs: dict[int, dict[str, Any]], epochs: int) -> dict[str, Any]:
    accuracies = [run["accuracy"] for run in runs.values()]
    return {
        "accuracy": mean(accuracies),
        "accuracies": accuracies,
        "spread": f"{stdev(accuracies):.1%}" if len(accuracies) > 1 else "-",
        "fitted": f"{mean(run['fitted'] for run in runs.values()):.0%}",
        "seeds": len(runs),
        "epochs": epochs,
        "minutes": mean(run["minutes"] for run in runs.values()),
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Learning curves: accuracy by the number of networks, with every run as a point."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5.0 * len(models) + 2.0, 4.2), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    colours = dict(zip(CONDITIONS, ["0.4", *[f"C{i}" for i in range(len(CONDITIONS) - 1)]], strict=True))
    for axes, model in zip(panels, models, strict=True):
        for condition in dict.fromkeys(row["condition"] for row in rows):
            mine = sorted(
                (r for r in rows if (r["model"], r["condition"]) == (model, condition)),
                key=lambda r: r["networks"],
            )
            sizes = [row["networks"] for row in mine]
            axes.plot(
                sizes,
                [100 * row["accuracy"] for row in mine],
                "o-",
                color=colours[condition],
                label=condition,
            )
            for row in mine:
                axes.plot(
                    [row["networks"]] * row["seeds"],
                    [100 * a for a in row["accuracies"]],
                    ".",
                    color=colours[condition],
                )
        axes.set(xscale="log", xlabel="networks to train on", title=model)
        axes.set_xticks(
            sorted({row["networks"] for row in rows}),
            [f"{n:,}" for n in sorted({r["networks"] for r in rows})],
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy in %")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, and write the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    _inrs.add_arguments(parser)
    parser.set_defaults(recipe="fashion-mnist-inr", count=9000, zoo=Path("fashion-9k.h5"))
    parser.add_argument("--models", default="dws,graph")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--sizes", default="5000", help="networks to train on, as in 1000,2500,5000")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--name", default="augmentation_study", help="of the result files")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.epochs, arguments.sizes, arguments.seeds, arguments.jobs = 1, "12", "0,1", 1
    setting = _inrs.prepare(arguments, "augmentation_study.py", argv, "lightning")
    judging = held_out(arguments.zoo, 12 if arguments.toy else 5000, arguments.runs)
    setting["judged on"] = f"{Zoo.open(judging)['inr'].rows:,} networks that no run was trained on"
    jobs = [
        Job(model, condition, int(size), int(seed), arguments.epochs, zoo, judging, run)
        for seed in arguments.seeds.split(",")
        for size in arguments.sizes.split(",")
        for condition in arguments.conditions.split(",")
        for model in arguments.models.split(",")
        for zoo in [subset(arguments.zoo, int(size), arguments.runs)]
        for run in [
            arguments.runs / f"{model}-{condition.replace(' ', '-')}-{size}-{arguments.epochs}-{seed}"
        ]
    ]
    found: dict[Job, dict[str, Any]] = {}
    for job, result in _results(jobs, arguments.jobs):
        found[job] = result
        print(f"{job.run.name}: {result}", flush=True)
        rows = rows_of(jobs, found)
        table = _report.to_markdown("What augmentations bring", COLUMNS, rows, setting)
        _report.write(arguments.output, arguments.name, table, rows, setting)
        if len({row["networks"] for row in rows}) > 1:
            draw(rows, arguments.output / f"{arguments.name}.png")
    return 0


def _results(jobs: Sequence[Job], side_by_side: int) -> Any:
    """Jobs and what came out, as they finish; one after the other in this process for one at a time."""
    if side_by_side == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    with ProcessPoolExecutor(side_by_side, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


if __name__ == "__main__":
    raise SystemExit(main())
