"""Do alignment and merging work? Networks trained independently on MNIST and Fashion-MNIST, and what is between them.

MLPs of three hidden layers and small ResNets with BatchNorm and with LayerNorm, which share nothing but the training
images: seeds differ in initialisation and in the order of the images. The parts:

    barriers  loss and accuracy between pairs of MLPs, by width and by method, with and without REPAIR
    resnets   the same for ResNets, with statistics averaged, estimated again, and REPAIR
    many      two to five networks merged into one
    star      a star model, between which and others there are lower barriers than among the others
    singular  what weight matching does to singular vectors
    surface   the loss on the plane through two networks and one of them aligned

Networks that are trained, and measurements that are made, are not made again.

    python benchmarks/alignment_study.py --data-root DIR --runs runs
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import _alignment_figures
import _alignment_tables
import _report
import torch
from _endpoints import Endpoint, Store, batches, score
from torch import Tensor

from weightspace import align, merge
from weightspace.spec import Weights

Data = list[tuple[Tensor, Tensor]]
Found = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What is trained and on how much it is judged.

    Args:
        data: data sets of the MLPs; the first is also that of the parts which take one.
        widths: of the MLPs.
        seeds: networks of each width, by data set; widths that are not named have ``pair``.
        trained: widths at which the methods that train, and C2M3, are measured.
        resnets: multiples of the channels.
        norms: of the ResNets.
        resnet_data: data set of the ResNets.
        epochs: of MLPs and of ResNets.
        points: places between two networks, for MLPs and for ResNets.
        images: of the training and of the test set that MLPs, and that ResNets, are judged on.
        star: widths of star models.
        singular: widths of the singular vectors.
        surface: width of the loss surface, and its resolution.
        options: of matchers.
    """

    data: tuple[str, ...] = ("mnist", "fashion-mnist")
    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    seeds: Mapping[tuple[str, int], int] = field(default_factory=dict)
    trained: tuple[int, ...] = (32, 64, 128, 256)
    resnets: tuple[float, ...] = (1, 2, 4)
    norms: tuple[str, ...] = ("batch", "layer")
    resnet_data: str = "mnist"
    epochs: tuple[int, int] = (10, 2)
    points: tuple[int, int] = (11, 5)
    images: tuple[tuple[int, int], tuple[int, int]] = ((5_000, 10_000), (2_000, 4_000))
    star: tuple[int, ...] = (32, 64, 128, 256)
    singular: tuple[int, ...] = (128, 256, 512, 1024)
    surface: tuple[int, int] = (256, 25)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def mlps(self, data: str, width: int) -> list[Endpoint]:
        """The networks of one width."""
        count = self.seeds.get((data, width), 2)
        return [Endpoint(data, "mlp", width, seed, self.epochs[0]) for seed in range(count)]

    def pair_of_resnets(self, norm: str, width: float) -> list[Endpoint]:
        """Two networks of one size."""
        return [
            Endpoint(self.resnet_data, f"resnet-{norm}", width, seed, self.epochs[1]) for seed in range(2)
        ]


_FIVE = [("mnist", width) for width in (32, 64, 128, 256, 1024)] + [("fashion-mnist", 256)]
_THREE = [("fashion-mnist", width) for width in (32, 64, 128)]
FULL = Scale(
    seeds={**dict.fromkeys(_FIVE, 5), **dict.fromkeys(_THREE, 3)},
    # the rate does not fall: with a higher one, or longer, the star itself loses one to two points of accuracy
    options={"starlight": {"epochs": 3, "learning_rate": 1e-4, "rematch": 100}},
)
TOY = Scale(
    data=("digits",),
    widths=(8, 16),
    seeds={("digits", 8): 3},
    trained=(8,),
    resnets=(0.25,),
    norms=("batch",),
    resnet_data="digits",
    epochs=(4, 1),
    points=(3, 3),
    images=((200, 200), (100, 100)),
    star=(8,),
    singular=(8, 16),
    surface=(8, 3),
    options={"starlight": {"epochs": 1}, "straight-through": {"epochs": 1}, "sinkhorn": {"steps": 5}},
)


@dataclass(frozen=True)
class Bench:
    """What measurements are made with."""

    scale: Scale
    store: Store

    def all_training(self, endpoint: Endpoint) -> Data:
        """All training images, in the batches that stars are trained on."""
        return batches(self.store.images(endpoint).train, 250)

    def data(self, endpoint: Endpoint) -> tuple[Data, Data]:
        """The first training and test images, in batches."""
        train, test = self.scale.images[endpoint.kind != "mlp"]
        images = self.store.images(endpoint)
        first = (
            tuple(tensor[:train] for tensor in images.train),
            tuple(tensor[:test] for tensor in images.test),
        )
        return batches(first[0], 500), batches(first[1], 1000)

    def aligned(
        self, endpoints: Sequence[Endpoint], method: str
    ) -> tuple[list[Weights], align.MatchReport | None]:
        """The networks after a method; ``"naive"`` leaves them as they are."""
        networks = [self.store.weights(endpoint) for endpoint in endpoints]
        if method == "naive":
            return networks, None
        first = endpoints[0]
        return align.align_networks(
            self.store.spec(first),
            networks,
            method,
            module=self.store.module(first),
            data=self.all_training(first) if method == "starlight" else self.data(first)[0],
            **self.scale.options.get(method, {}),
        )


@dataclass(frozen=True)
class Job:
    """One measurement.

    Args:
        part: of the study.
        facts: that tell it from the others of its part.
        endpoints: that must be trained.
        measure: what comes out.
    """

    part: str
    facts: Mapping[str, Any]
    endpoints: Sequence[Endpoint]
    measure: Callable[[Bench], Found]

    @property
    def name(self) -> str:
        """Of the file."""
        return "-".join([self.part, *(str(value).replace(" ", "-") for value in self.facts.values())])


# -- barriers ----------------------------------------------------------------------------------------------


def barrier_jobs(scale: Scale) -> list[Job]:
    """Pairs of MLPs: all of the first three networks of narrow widths, else the first two."""
    jobs = []
    for width in scale.widths:
        for data in scale.data:
            networks = scale.mlps(data, width)
            jobs += [
                _between(pair, width, method, ("none", "repair"))
                for pair in combinations(networks[: 3 if width <= 128 else 2], 2)
                for method in mlp_methods(width in scale.trained)
            ]
    return [Job("barriers", *rest) for rest in jobs]


def mlp_methods(trained: bool) -> list[str]:
    """The methods that pairs of MLPs are aligned with."""
    methods = ["naive", "weight-matching", "activation-matching"]
    return [*methods, "straight-through", "sinkhorn"] if trained else methods


def resnet_jobs(scale: Scale) -> list[Job]:
    """Pairs of ResNets."""
    repairs = {"batch": ("none", "batch-norm", "repair"), "layer": ("none", "repair")}
    return [
        Job("resnets", *_between(scale.pair_of_resnets(norm, width), width, method, repairs[norm]))
        for width in scale.resnets
        for norm in scale.norms
        for method in ("naive", "weight-matching", "activation-matching")
    ]


def _between(
    pair: Sequence[Endpoint], width: float, method: str, repairs: Sequence[str]
) -> tuple[dict[str, Any], Sequence[Endpoint], Callable[[Bench], Found]]:
    a, b = pair
    facts = {"data": a.data, "network": a.kind, "width": width, "pair": f"{a.seed}{b.seed}", "method": method}

    def measure(bench: Bench) -> Found:
        networks, report = bench.aligned(pair, method)
        module, (train, test) = bench.store.module(a), bench.data(a)
        points = bench.scale.points[a.kind != "mlp"]
        curves = {
            how: align.barrier(module, *networks, train, test=test, points=points, repair=how).as_dict()
            for how in repairs
        }
        return {"matching": _matching(report), "curves": curves}

    return facts, pair, measure


def _matching(report: align.MatchReport | None) -> Found | None:
    if report is None:
        return None
    return {
        "seconds": report.seconds,
        "distance_before": float(report.distance_before[-1]),
        "distance_after": float(report.distance_after[-1]),
    }


# -- many networks -----------------------------------------------------------------------------------------


def many_jobs(scale: Scale) -> list[Job]:
    """The first two to five networks, wherever there are as many."""
    jobs = []
    for data in scale.data:
        for width in scale.widths:
            networks = scale.mlps(data, width)
            counts = range(2, len(networks) + 1) if len(networks) >= 3 else []
            jobs += [
                Job(
                    "many",
                    {"data": data, "width": width, "models": models, "method": method},
                    networks[:models],
                    _merging(networks[:models], method),
                )
                for models in counts
                for method in ("naive", "weight-matching", "merge-many", "c2m3")
                if method != "c2m3" or width in scale.trained
            ]
    return jobs


def _merging(endpoints: Sequence[Endpoint], method: str) -> Callable[[Bench], Found]:
    def measure(bench: Bench) -> Found:
        networks, report = bench.aligned(endpoints, method)
        module, (train, _) = bench.store.module(endpoints[0]), bench.data(endpoints[0])
        test = batches(bench.store.images(endpoints[0]).test)
        merged = merge.average(networks)
        repaired = align.repair(module, merged, networks, train)
        return {
            "seconds": None if report is None else report.seconds,
            "ends": [score(module, network, test) for network in networks],
            "merged": score(module, merged, test),
            "repaired": score(module, repaired, test),
        }

    return measure


# -- star models -------------------------------------------------------------------------------------------


def star_jobs(scale: Scale) -> list[Job]:
    """The last network of each width is held out."""
    jobs = []
    for width in scale.star:
        networks = scale.mlps(scale.data[0], width)
        facts = {"data": scale.data[0], "width": width, "sources": len(networks) - 1}
        jobs.append(Job("star", facts, networks, _starring(networks)))
    return jobs


def _starring(endpoints: Sequence[Endpoint]) -> Callable[[Bench], Found]:
    *sources, held_out = endpoints

    def measure(bench: Bench) -> Found:
        spec, module = bench.store.spec(held_out), bench.store.module(held_out)
        train, test = bench.data(held_out)
        networks, report = bench.aligned(sources, "starlight")
        star = report.center

        def between(a: Weights, b: Weights) -> Found:
            matched, _ = align.weight_matching(spec, a, b)
            points = bench.scale.points[0]
            found = align.barrier(module, a, matched, train, test=test, points=points, repair="none")
            return _heights(found.as_dict())

        plain = [bench.store.weights(endpoint) for endpoint in endpoints]
        return {
            "seconds": report.seconds,
            "star": score(module, star, batches(bench.store.images(held_out).test)),
            "regular to regular": [between(a, b) for a, b in combinations(plain, 2)],
            "star to source": [between(star, network) for network in networks],
            "star to held-out": [between(star, plain[-1])],
        }

    return measure


def _heights(report: Found) -> Found:
    return {
        f"{split}_{what}": report[split][f"{what}_barrier"]
        for split in ("train", "test")
        for what in ("loss", "accuracy")
    }


# -- singular vectors, and a surface -----------------------------------------------------------------------


def singular_jobs(scale: Scale) -> list[Job]:
    """The first two networks of each width."""
    jobs = []
    for width in scale.singular:
        pair = scale.mlps(scale.data[0], width)[:2]
        jobs.append(Job("singular", {"data": scale.data[0], "width": width}, pair, _turning(pair)))
    return jobs


def _turning(pair: Sequence[Endpoint]) -> Callable[[Bench], Found]:
    def measure(bench: Bench) -> Found:
        (a, aligned), _ = bench.aligned(pair, "weight-matching")
        b = bench.store.weights(pair[1])
        found = align.singular_vectors(bench.store.spec(pair[0]), a, b, aligned)
        if pair[0].width == bench.scale.singular[-1]:
            title = f"Weight matching of MLPs of width {pair[0].width} on {pair[0].data}"
            found.draw(bench.store.folder.parent / "alignment_study_singular.png", title=title)
        return dict(found.as_dict())

    return measure


def surface_jobs(scale: Scale) -> list[Job]:
    """The plane through the first two networks of one width and the second one aligned."""
    width, resolution = scale.surface
    pair = scale.mlps(scale.data[0], width)[:2]

    def measure(bench: Bench) -> Found:
        (a, aligned), _ = bench.aligned(pair, "weight-matching")
        networks = {"A": a, "B": bench.store.weights(pair[1]), "B aligned": aligned}
        module, (train, test) = bench.store.module(pair[0]), bench.data(pair[0])
        found = align.loss_surface(module, networks, train[:4], test=test[:4], resolution=resolution)
        figure = bench.store.folder.parent / "alignment_study_surface.png"
        found.draw(figure, title=f"Test loss, MLPs of width {width} on {pair[0].data}")
        return dict(found.as_dict())

    return [Job("surface", {"data": scale.data[0], "width": width}, pair, measure)]


PARTS: dict[str, Callable[[Scale], list[Job]]] = {
    "barriers": barrier_jobs,
    "resnets": resnet_jobs,
    "many": many_jobs,
    "star": star_jobs,
    "singular": singular_jobs,
    "surface": surface_jobs,
}


# -- the program -------------------------------------------------------------------------------------------


def measured(job: Job, bench: Bench, folder: Path, may_measure: bool = True) -> Found | None:
    """What a measurement gave: from disk, or made now; None where that must not be, or networks must not be trained."""
    path = folder / f"{job.name}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    if not (may_measure and all(map(bench.store.is_there, job.endpoints))):
        return None
    begin = time.perf_counter()
    found = job.measure(bench)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    print(f"{job.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``--toy`` takes the digits of scikit-learn, and tiny networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, help="folder with mnist/ and fashion-mnist/ (IDX files)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where networks and measurements go")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    parser.add_argument("--no-training", action="store_true", help="measure only what is trained already")
    parser.add_argument("--no-measuring", action="store_true", help="only write what is measured already")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="digits, tiny networks")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results"), metavar="OUTDIR")
    arguments = parser.parse_args(argv)
    for part in arguments.parts.split(","):
        if part not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}, found {part!r}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, and write tables, JSON and figures as results come."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    scale = TOY if arguments.toy else FULL
    store = Store(arguments.runs, arguments.data_root, may_train=not arguments.no_training)
    bench, folder = Bench(scale, store), arguments.runs / "measured"
    results: dict[str, list[tuple[Mapping[str, Any], Found]]] = {}
    for part in arguments.parts.split(","):
        for job in PARTS[part](scale):
            found = measured(job, bench, folder, not arguments.no_measuring)
            if found is not None:
                results.setdefault(part, []).append((job.facts, found))
    rows = [row for part in results for row in _alignment_tables.rows_of(part, results[part])]
    setting = {
        "command": _report.command_line(
            "alignment_study.py", argv, {"--data-root": "DIR", "--runs": "RUNS", "-o": "OUTDIR"}
        ),
        **_described(scale),
        **_report.environment("torch", "numpy", "scipy"),
    }
    table = _alignment_tables.document(rows, setting)
    _report.write(arguments.output, "alignment_study", table, rows, setting)
    _alignment_figures.draw(rows, arguments.output)
    for name in ("surface", "singular"):
        drawn = arguments.runs / f"alignment_study_{name}.png"
        if name in results and drawn.exists():
            (arguments.output / drawn.name).write_bytes(drawn.read_bytes())
    return 0


def _described(scale: Scale) -> dict[str, str]:
    mlp = scale.mlps(scale.data[0], scale.widths[0])[0]
    resnet = scale.pair_of_resnets("batch", 1)[0]
    (mlp_train, mlp_test), (resnet_train, resnet_test) = scale.images
    return {
        "independent": "the networks of a row differ in the seed of initialisation and of the order of the images",
        "MLPs": f"three hidden layers, ReLU; {mlp.protocol}",
        "ResNets": f"three blocks, 16 channels times the width, images averaged to 14x14; {resnet.protocol}",
        "MLPs' barriers": f"{scale.points[0]} places, first {mlp_train:,} training and {mlp_test:,} test images",
        "ResNets' barriers": (
            f"{scale.points[1]} places, first {resnet_train:,} training and {resnet_test:,} test images"
        ),
        "statistics": (
            "of REPAIR and of BatchNorm: of those training images, at every place; where BatchNorm follows every "
            "convolution, REPAIR comes to estimating its statistics again"
        ),
    }


if __name__ == "__main__":
    raise SystemExit(main())
