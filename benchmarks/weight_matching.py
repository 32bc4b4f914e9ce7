"""How many pairs of networks are aligned a second: all at once, one pair at a time, and by `rebasin`.

Pairs of SIRENs 2-32-32-1 with SIREN's own initialisation, matched until no group has anything left to gain.
The methods take turns, and each keeps its best rate, so that a busy moment of the machine strikes none of them
alone. `rebasin` (PyPI) is measured where it is installed; it is handed modules that exist already.

Two more tables are about single pairs of larger networks, as `nn` initialises them: multilayer perceptrons
784-512-512-512-10 against `rebasin`, with what either reaches, and residual networks of 20 layers, four times as wide
as those of the paper. The third is about the assignment alone, against SciPy's.

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
from torch import Tensor, nn

from weightspace.align import weight_matching
from weightspace.align._assignment import assign
from weightspace.nets import MLP, ResNet
from weightspace.spec import Weights, WeightSpec
from weightspace.zoo import spec_of

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


# -- single pairs of larger networks -----------------------------------------------------------------------


def perceptron(seed: int, width: int) -> nn.Module:
    torch.manual_seed(seed)
    return MLP((784, width, width, width, 10), activation="relu")


def residual(seed: int, width: int) -> nn.Module:
    """ResNet-20; 4 times as wide it has 4.3 million parameters."""
    torch.manual_seed(seed)
    return ResNet((3, 32, 32), 10, blocks=(3, 3, 3) if width > 1 else (1, 1), channels=16, width=float(width))


def measure_single(build: Callable[[int, int], nn.Module], width: int, pairs: int) -> list[dict[str, Any]]:
    """Pairs of random networks, one call each; one pair more than is counted warms up."""
    spec = spec_of(build(0, width))
    peer = importlib.util.find_spec("rebasin") is not None and build is perceptron
    rows = []
    for pair in range(-1, pairs):
        modules = [build(2 * pair + 2 + side, width) for side in (0, 1)]
        a, b = ({name: t.detach().clone() for name, t in m.state_dict().items()} for m in modules)
        start = time.perf_counter()
        _, report = weight_matching(spec, a, b)
        row = {"seconds": time.perf_counter() - start, "objective": report.objective.item()}
        if peer:
            row |= _peer(modules, a)
        rows += [row] if pair >= 0 else []
    return rows


def _peer(modules: Sequence[nn.Module], reference: Weights) -> dict[str, float]:
    from rebasin import PermutationCoordinateDescent

    probe = torch.zeros(1, 784)
    start = time.perf_counter()
    PermutationCoordinateDescent(*modules, input_data_b=probe).rebasin()
    seconds = time.perf_counter() - start
    moved = modules[1].state_dict()
    objective = sum(float((reference[name].double() * moved[name].double()).sum()) for name in reference)
    return {"peer_seconds": seconds, "peer_objective": objective}


def summarise(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Best times over the pairs, and on how many the objective is at least the peer's."""
    best = min(row["seconds"] for row in rows)
    found: dict[str, Any] = {"method": name, "seconds": best, "pairs": len(rows), "each": list(rows)}
    if "peer_seconds" not in rows[0]:
        return {**found, "ratio": "-", "peer": "-", "wins": "-", "gain": "-"}
    peer = min(row["peer_seconds"] for row in rows)
    wins = sum(row["objective"] >= row["peer_objective"] for row in rows)
    gain = sum(row["objective"] / row["peer_objective"] - 1 for row in rows) / len(rows)
    return {
        **found,
        "ratio": f"{peer / best:.2f}x",
        "peer": f"{peer:.3f}",
        "wins": f"{wins} of {len(rows)}",
        "gain": f"{gain:+.1%}",
    }


def measure_assignment(size: int, rounds: int) -> list[dict[str, Any]]:
    """Similarities of random units, and of units that are shuffled and noisy copies; best of the rounds."""
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, 784, generator=generator) for _ in range(2))
    copies = a[torch.randperm(size, generator=generator)] + b
    rows = []
    for name, other in (("random units", b), ("noisy copies", copies)):
        scores = a @ other.T
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda scores=scores: assign(scores[None]),
            "scipy": lambda scores=scores: linear_sum_assignment(scores.numpy(), maximize=True),
        }
        times = dict.fromkeys(ways, math.inf)
        for way in list(ways) * (rounds + 1):
            start = time.perf_counter()
            ways[way]()
            times[way] = min(times[way], time.perf_counter() - start)
        rows.append({"method": f"{name}, {size}", "ratio": times["scipy"] / times["ours"], **times})
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--toy`` overrides sizes so that the program can be tested in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000, help="pairs in the batch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each method; the best counts")
    parser.add_argument("--single", type=int, default=20, help="single pairs of perceptrons")
    parser.add_argument("--toy", action="store_true", help="4 pairs, 1 round, narrow networks")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.pairs, arguments.rounds, arguments.single = 4, 1, 1
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
    more, tables = measure_more(arguments)
    _report.write(arguments.output, "weight_matching", table + tables, rows + more, setting)
    return 0


def measure_more(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """What is measured of single pairs and of assignments, and the tables of it."""
    width, wide = (16, 1) if arguments.toy else (512, 4)
    singles = [
        summarise(f"MLP, 3 x {width}", measure_single(perceptron, width, arguments.single)),
        summarise(f"ResNet-20, x {wide}", measure_single(residual, wide, min(3, arguments.single))),
    ]
    columns = {
        "network": "{method}",
        "rebasin's time over ours": "{ratio}",
        "seconds": "{seconds:.3f}",
        "seconds, rebasin": "{peer}",
        "pairs": "{pairs}",
        "objective at least rebasin's": "{wins}",
        "objective above rebasin's": "{gain}",
    }
    assignments = measure_assignment(width, 5 * arguments.rounds)
    shown = {
        "scores": "{method}",
        "SciPy's time over ours": "{ratio:.2f}x",
        "seconds": "{ours:.5f}",
        "seconds, SciPy": "{scipy:.5f}",
    }
    texts = [
        _report.to_markdown("One pair of larger networks", columns, singles, {}),
        _report.to_markdown("One assignment", shown, assignments, {}),
    ]
    return [*singles, *assignments], "".join(
        "\n" + text.rstrip("\n").replace("# ", "## ", 1) + "\n" for text in texts
    )


if __name__ == "__main__":
    raise SystemExit(main())
