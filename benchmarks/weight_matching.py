"""How many pairs of networks are aligned a second: all at once, one pair at a time, and by `rebasin`.

Pairs of SIRENs 2-32-32-1 with SIREN's own initialisation, matched until no group has anything left to gain.
The methods take turns, and each keeps its best rate, so that a busy moment of the machine strikes none of them
alone. `rebasin` (PyPI) is measured where it is installed; it is handed modules that exist already.

    python benchmarks/weight_matching.py
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import _report
import torch
from torch import Tensor

from weightspace.align import weight_matching
from weightspace.nets import MLP
from weightspace.spec import Weights, WeightSpec

WIDTHS = (2, 32, 32, 1)
W0 = 30.0
ONE_BY_ONE = "weightspace, one pair at a time"
Pairs = tuple[Weights, Weights]
Method = tuple[int, Callable[[], Tensor]]  # how many pairs it aligns, and what it does in one turn


def random_networks(networks: int, generator: torch.Generator) -> Weights:
    """Networks with SIREN's initialisation, and biases as ``nn.Linear`` draws them."""

    def uniform(bound: float, *shape: int) -> Tensor:
        return (2.0 * torch.rand(networks, *shape, generator=generator) - 1.0) * bound

    weights = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(WIDTHS)):
        bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / W0
        weights[f"layers.{layer}.weight"] = uniform(bound, fan_out, fan_in)
        weights[f"layers.{layer}.bias"] = uniform(1 / math.sqrt(fan_in), fan_out)
    return weights


def first(weights: Weights, count: int) -> Weights:
    return {name: tensor[:count] for name, tensor in weights.items()}


def align_one_by_one(spec: WeightSpec, pairs: Pairs) -> Callable[[], Tensor]:
    """One call per pair, as if there were no batch axis."""
    a, b = ([{name: t[i] for name, t in side.items()} for i in range(_count(side))] for side in pairs)

    def run() -> Tensor:
        reports = [weight_matching(spec, x, y)[1] for x, y in zip(a, b, strict=True)]
        return torch.stack([report.distance_after for report in reports])

    return run


def align_together(spec: WeightSpec, pairs: Pairs, **options: Any) -> Callable[[], Tensor]:
    """One call for all pairs."""
    return lambda: weight_matching(spec, *pairs, **options)[1].distance_after


def align_with_rebasin(spec: WeightSpec, pairs: Pairs, turns: int) -> Callable[[], Tensor]:
    """The PyPI package. It permutes modules in place, so fresh ones lie ready for every turn."""
    from rebasin import PermutationCoordinateDescent

    probe = torch.zeros(1, WIDTHS[0])
    ready = [[[_module(side, i) for side in pairs] for i in range(_count(pairs[0]))] for _ in range(turns)]

    def run() -> Tensor:
        modules = ready.pop()
        for a, b in modules:
            PermutationCoordinateDescent(a, b, input_data_b=probe).rebasin()
        aligned = {name: torch.stack([b.state_dict()[name] for _, b in modules]) for name in pairs[1]}
        return (spec.flatten(aligned) - spec.flatten(pairs[0])).norm(dim=-1)

    return run


def _module(weights: Weights, row: int) -> MLP:
    net = MLP(WIDTHS, w0=W0)
    net.load_state_dict({name: tensor[row] for name, tensor in weights.items()})
    return net


def _count(weights: Weights) -> int:
    return len(next(iter(weights.values())))


def prepare(spec: WeightSpec, pairs: int, turns: int) -> tuple[dict[str, Method], Pairs]:
    """The methods by name, and the pairs that all of them align.

    What goes pair by pair gets a tenth of the pairs, rebasin a fiftieth.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = random_networks(pairs, generator), random_networks(pairs, generator)
    tenth, fiftieth = ((first(a, max(2, pairs // n)), first(b, max(2, pairs // n))) for n in (10, 50))
    both, all_three = ("permutation", "sign"), ("permutation", "sign", "phase")
    few = min(64, pairs)
    step = first(a, few), first(b, few)  # what one training step aligns
    methods: dict[str, Method] = {
        ONE_BY_ONE: (_count(tenth[0]), align_one_by_one(spec, tenth)),
        "weightspace, batched": (pairs, align_together(spec, (a, b), restarts=1)),
        "weightspace, batched, 2 starts": (pairs, align_together(spec, (a, b), restarts=2)),
        "weightspace, batched, signs too": (pairs, align_together(spec, (a, b), symmetries=both, restarts=1)),
        "weightspace, batched, signs and phases too": (
            pairs,
            align_together(spec, (a, b), symmetries=all_three, restarts=1),
        ),
        "weightspace, a training step's, signs too": (
            few,
            align_together(spec, step, symmetries=both, restarts=1),
        ),
    }
    if importlib.util.find_spec("rebasin") is not None:
        methods["rebasin"] = (_count(fiftieth[0]), align_with_rebasin(spec, fiftieth, turns))
    return methods, fiftieth


def measure(pairs: int, rounds: int) -> list[dict[str, Any]]:
    """Take turns, ``rounds`` times and once more: the first turn warms up, and the minimum forgets it."""
    spec = WeightSpec.mlp(WIDTHS, activation="sine", w0=W0)
    methods, shared = prepare(spec, pairs, rounds + 1)
    seconds = dict.fromkeys(methods, math.inf)
    after = {}
    for _ in range(rounds + 1):
        for name, (count, run) in methods.items():
            start = time.perf_counter()
            distances = run()
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / count)
            after[name] = float(distances[: _count(shared[0])].mean())
    before = float((spec.flatten(shared[0]) - spec.flatten(shared[1])).norm(dim=-1).mean())
    return [
        {
            "method": name,
            "ratio": seconds[ONE_BY_ONE] / seconds[name],
            "pairs_per_second": 1 / seconds[name],
            "pairs": count,
            "distance_before": before,
            "distance_after": after[name],
        }
        for name, (count, _) in methods.items()
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--toy`` overrides sizes so that the program can be tested in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000, help="pairs in the batch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method; the best counts")
    parser.add_argument("--toy", action="store_true", help="4 pairs, 1 round")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.pairs, arguments.rounds = 4, 1
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write ``weight_matching.json`` and ``weight_matching.md``."""
    arguments = parse(argv)
    rows = measure(arguments.pairs, arguments.rounds)
    others = ["rebasin"] if any(row["method"] == "rebasin" for row in rows) else []
    setting = {
        "command": _report.command_line("weight_matching.py", argv),
        "network": f"SIREN {'-'.join(map(str, WIDTHS))}, w0 = {W0:g}",
        "pairs": arguments.pairs,
        "rounds": arguments.rounds,
        "distances": f"means over the first {max(2, arguments.pairs // 50)} pairs",
        **_report.environment("torch", "numpy", "scipy", *others),
    }
    columns = {
        "method": "{method}",
        "ratio": "{ratio:.2f}x",
        "pairs/s": "{pairs_per_second:.0f}",
        "pairs": "{pairs}",
        "distance before": "{distance_before:.3f}",
        "distance after": "{distance_after:.3f}",
    }
    table = _report.to_markdown("Aligning pairs of networks", columns, rows, setting)
    _report.write(arguments.output, "weight_matching", table, rows, setting)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
