"""What each recipe makes: a part of it is generated, and its quantiles and its cost are written down.

The documentation's cards show the table. The cost of the whole recipe is extrapolated from the part.

    python benchmarks/recipe_cards.py --data-root DIR
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _report
import numpy as np

from weightspace.datagen import generate, load_recipe, recipe_names
from weightspace.errors import DataError
from weightspace.zoo import Zoo

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
COLUMNS = {
    "recipe": "{recipe}",
    "metric": "{metric}",
    **{f"{level:.0%}": f"{{q{round(100 * level)}:.3g}}" for level in LEVELS},
    "diverged": "{diverged}",
    "networks": "{networks:,}",
    "of": "{whole:,}",
    "networks/s": "{per_second:.3g}",
    "hours for all": "{hours:.2f}",
    "MB for all": "{megabytes:.1f}",
}
PART = {"digits-resnet": 24, "tiny-rnn": 16, "cnn-wild-park": 20, "digits-finetuned": 48}
"""Networks of recipes that take long; the others make 64."""


def card(name: str, data_root: Path | None, networks: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """One row; None where the recipe's files are missing."""
    recipe = load_recipe(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zoo.h5"
        try:
            report = generate(
                name, path, count=networks, data_root=data_root, overrides=settings, progress=False
            )
            whole = getattr(recipe, "count", None) or len(recipe.source.load(data_root))
        except DataError as error:
            print(f"{name}: left out, {error}")
            return None
        zoo = Zoo.open(path)
        # neither the base of fine-tuned networks nor copies
        trained = [zoo[name] for name in zoo if name != "base" and not zoo[name].protocol.get("copies")]
        values = np.concatenate([last_of(population, report.metric) for population in trained])
        quantiles = np.nanquantile(values, LEVELS)
        return {
            "recipe": name,
            "metric": report.metric,
            **{
                f"q{round(100 * level)}": float(value) for level, value in zip(LEVELS, quantiles, strict=True)
            },
            "diverged": report.diverged,
            "networks": report.trained,
            "whole": whole,
            "per_second": report.networks_per_second,
            "hours": whole / report.networks_per_second / 3600,
            "megabytes": path.stat().st_size / 1e6 * whole / report.trained,
        }


def last_of(population: Any, metric: str) -> np.ndarray:
    """A metric of each network's last checkpoint."""
    return population.metrics[metric][np.r_[population.network[1:] != population.network[:-1], True]]


def main(argv: Sequence[str] | None = None) -> int:
    """Generate, print the table, and write ``recipe_cards.json`` and ``recipe_cards.md``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with mnist, fashion-mnist and others")
    parser.add_argument("--recipes", nargs="*", help="which; all by default")
    parser.add_argument("--networks", type=int, default=64, help="of each recipe")
    parser.add_argument("--toy", action="store_true", help="two networks of one recipe")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    names, settings = arguments.recipes or recipe_names(), {}
    if arguments.toy:
        names, settings = ["digits-mlp"], {"training.epochs": 1, "checkpoints": [0]}
        arguments.networks = 2
    rows = []
    for name in names:
        row = card(name, arguments.data_root, min(PART.get(name, 64), arguments.networks), settings)
        if row is not None:
            rows.append(row)
    setting = {
        "command": _report.command_line("recipe_cards.py", argv, {"--data-root": "DIR"}),
        "quantiles": "over networks, of their last checkpoints",
        **_report.environment("torch", "numba", "numpy"),
    }
    table = _report.to_markdown("What the recipes make", COLUMNS, rows, setting)
    _report.write(arguments.output, "recipe_cards", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
