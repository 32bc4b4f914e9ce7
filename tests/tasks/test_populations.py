"""One metanetwork for several populations: shared parameters, scores of each, transfer, and what is refused."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.datasets import ZooDataset
from weightspace.errors import ConfigError, RunError, TaskError, ZooError
from weightspace.nets import CNN
from weightspace.tasks import evaluate, load_config, load_run, predict, train, train_config
from weightspace.tasks._several import SharedMetanetwork, build_shared
from weightspace.testing import tiny_zoo
from weightspace.zoo import SPLITS, Zoo

ANY = {"model.types": "role", "normalisation": "fan_in", "model.norm": "layer"}
SMALL = {
    "graph": {"model.hidden": 8, "model.layers": 2, "model.head": 16, "augment": "", **ANY},
    "probe": {"model.probes": 8, "model.hidden": [16], "model.dropout": 0.0},
    "dws": {"model.hidden": 4, "model.layers": 1},
}


def regression(name, networks, hidden, seed=0):
    """A population whose target is the mean of the last weight, whatever the architecture."""
    inr = tiny_zoo(networks=networks, hidden=hidden, views=1, seed=seed)["inr"]
    value = inr.spec.unflatten(inr.read(slice(None)))[f"layers.{len(hidden)}.weight"].mean((1, 2)).numpy()
    return replace(inr, metrics={"quality": value.astype(np.float32), "psnr": inr.metrics["psnr"]})


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    shapes = {"a": (120, (8, 8)), "b": (80, (5, 7, 6)), "c": (40, (6,))}
    made = {name: regression(name, *shape) for name, shape in shapes.items()}
    return Zoo(made).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    made = {"d": regression("d", 60, (9, 5), seed=3), "e": regression("e", 40, (4, 4, 4), seed=4)}
    return Zoo(made).save(tmp_path_factory.mktemp("zoo") / "other.h5")


def config_of(zoo, model="graph", population="all", *, epochs=12, changes=None, **values):
    given = {
        "zoo": str(zoo),
        "model": model,
        "task": "regression",
        "target": "quality",
        "population": population,
    }
    return train_config(
        {**given, "batch_size": 16, "epochs": epochs, "learning_rate": 1e-2, **values},
        {**SMALL[model], **(changes or {})},
    )


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "graph"
    train(config_of(zoo), path, device="cpu", progress=False)
    return path


def test_one_metanetwork_learns_all_of_them(zoo, run):
    report = json.loads((run / "report.json").read_text())
    assert list(report["populations"]) == ["a", "b", "c"]
    scored = evaluate(run, device="cpu")
    assert scored.metrics["r2"] > 0.8
    counts = {name: int((Zoo.open(zoo)[name].split == 2).sum()) for name in "abc"}
    assert {name: found["networks"] for name, found in scored.populations.items()} == counts
    assert scored.networks == sum(counts.values())
    assert all(found["metrics"]["kendall_tau"] > 0.4 for found in scored.populations.values())
    low, high = scored.intervals["r2"]
    assert low < scored.metrics["r2"] < high
    written = json.loads((run / "evaluation-test.json").read_text())
    assert written["populations"]["b"]["networks"] == counts["b"]


def test_each_population_is_scored_as_by_itself(run):
    scored = evaluate(run, device="cpu")
    for name, found in scored.populations.items():
        alone = evaluate(run, device="cpu", population=name)
        assert alone.metrics == pytest.approx(found["metrics"], rel=1e-4)
        assert alone.figure.name == f"test-{name}.png"
        assert alone.populations == {}
    error = sum(f["networks"] * f["metrics"]["mean_absolute_error"] for f in scored.populations.values())
    assert scored.metrics["mean_absolute_error"] == pytest.approx(error / scored.networks, rel=1e-5)
    two = evaluate(run, device="cpu", population="a,c")
    assert list(two.populations) == ["a", "c"]
    assert re.fullmatch(r"test-2-populations-[0-9a-f]{8}\.png", two.figure.name)
    assert evaluate(run, device="cpu", population="c,b,a").figure.name == "test.png"


def test_other_architectures_are_read_by_transfer(run, other):
    scored = evaluate(run, other, population="all", device="cpu")
    assert list(scored.populations) == ["d", "e"]
    assert scored.metrics["kendall_tau"] > 0.3, "the mean of the last weight means the same there"
    assert re.fullmatch(r"test-other-[0-9a-f]{8}\.png", scored.figure.name)
    assert re.fullmatch(
        r"test-other-[0-9a-f]{8}-e\.png", evaluate(run, other, population="e", device="cpu").figure.name
    )


def test_what_is_saved_reads_what_was_trained(zoo, run, tmp_path):
    """The readers of a loaded run are those that were trained, population by population."""
    report = predict(run, zoo, tmp_path / "out.csv", split="val", population="all", device="cpu")
    with (tmp_path / "out.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert report.columns == ("population", "row", "network", "split", "prediction", "target")
    assert [line["population"] for line in lines] == sorted(line["population"] for line in lines)
    error = np.mean([abs(float(line["prediction"]) - float(line["target"])) for line in lines])
    stored = json.loads((run / "report.json").read_text())
    assert error == pytest.approx(stored["metrics"]["mean_absolute_error"], rel=1e-4)


def test_the_run_says_what_it_needs_and_resumes(zoo, run):
    config = load_config(run)
    assert config.population == "all"
    assert (config.options["node_features"], config.options["edge_features"]) == (1, 1)
    before = (run / "model.safetensors").stat().st_mtime_ns
    again = train(config_of(zoo), run, device="cpu", progress=False)
    assert set(again.populations) == {"a", "b", "c"}
    assert (run / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_run_ends_like_an_undisturbed_one(zoo, tmp_path, monkeypatch):
    from weightspace.tasks._module import MetanetworkModule

    config = config_of(zoo, epochs=3, changes={"augment": "sign, noise(0.05)"})
    train(config, tmp_path / "whole", device="cpu", progress=False)
    start = MetanetworkModule.on_train_epoch_start

    def stop(module):
        if module.current_epoch == 2:
            raise RuntimeError("pulled the plug")
        start(module)

    with monkeypatch.context() as patch:
        patch.setattr(MetanetworkModule, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(config, tmp_path / "parts", device="cpu", progress=False)
    train(config, tmp_path / "parts", device="cpu", progress=False)
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_text()


def test_probes_of_one_set_of_inputs_run_all_of_them(zoo, tmp_path):
    train(config_of(zoo, "probe", epochs=4), tmp_path / "run", device="cpu", progress=False)
    scored = evaluate(tmp_path / "run", device="cpu")
    assert list(scored.populations) == ["a", "b", "c"]
    loaded = load_run(tmp_path / "run")
    population = Zoo.open(zoo)["b"]
    element = population.spec.random_element((80,), generator=torch.Generator().manual_seed(0))
    weights = population.weights_of(slice(None))
    reader = loaded.reader_of(population, "zoo")
    with torch.no_grad():
        torch.testing.assert_close(
            reader(population.spec.act(element, weights)), reader(weights), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("changes", [{}, {"model.norm": "batch"}, {"model.probes": 3}])
def test_readers_share_what_is_trained_and_nothing_else(zoo, changes):
    config = config_of(zoo, changes={"model.node_features": 1, "model.edge_features": 1, **changes})
    populations = dict(Zoo.open(zoo).populations)
    task = _task(zoo, config)
    shared = build_shared(config, populations, task)
    assert isinstance(shared, SharedMetanetwork)
    for moved in (shared, shared.to(torch.float32), shared.double().float()):
        names = dict(moved.model.named_parameters())
        for name in "abc":
            others = dict(moved.of(name).model.named_parameters())
            assert others.keys() == names.keys()
            assert all(others[key] is parameter for key, parameter in names.items())
            saved = moved.of(name).model.state_dict(keep_vars=True)
            assert all(saved[key] is tensor for key, tensor in moved.model.state_dict(keep_vars=True).items())
    assert len(list(shared.parameters())) == len(names)
    batches = {name: population.weights_of([0, 1, 2]) for name, population in populations.items()}
    shared.train()
    before = {key: tensor.clone() for key, tensor in shared.state_dict().items() if "running_mean" in key}
    shared(batches["b"], "b")
    after = shared.state_dict()
    assert all(not torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert before or "norm" not in changes.get("model.norm", "")
    shared.eval()
    assert not any(module.training for name in "abc" for module in shared.of(name).modules())
    alone = [build_shared(config, {name: populations[name]}, task).eval() for name in "bc"]
    with torch.no_grad():
        for single, name in zip(alone, "bc", strict=True):
            single.model.load_state_dict(shared.model.state_dict())
            torch.testing.assert_close(single(batches[name]), shared(batches[name], name))


def _task(zoo, config):
    from weightspace.tasks import TASKS

    return TASKS["regression"].from_data(
        ZooDataset(zoo, "train", target="quality", population="a"), config.settings()
    )


def test_a_gradient_of_every_population_reaches_the_same_parameters(zoo):
    config = config_of(zoo, changes={"model.node_features": 1, "model.edge_features": 1})
    populations = dict(Zoo.open(zoo).populations)
    shared = build_shared(config, populations, _task(zoo, config))
    gradients = []
    for name in "abc":
        shared.zero_grad()
        shared(populations[name].weights_of([0, 1]), name).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in shared.parameters() if p.grad is not None]))
    assert all(bool(g.abs().sum() > 0) for g in gradients)
    assert not torch.allclose(gradients[0], gradients[1])


def test_convolutional_networks_of_several_architectures(tmp_path):
    """Widths of features differ: 3 x 3 and 5 x 5 kernels, with norms and without."""
    torch.manual_seed(0)
    shapes = {
        "cnn-000": CNN((1, 8, 8), (4, 4), 3),
        "cnn-001": CNN((1, 8, 8), (3, 5, 4), 3, kernel_size=(5, 3, 3), norm="layer", activation="tanh"),
    }
    populations = {}
    for name, net in shapes.items():
        nets = [CNN(**net.arguments()) for _ in range(24)]
        norms = [float(n.classifier.weight.detach().square().sum()) for n in nets]
        zoo = Zoo.from_state_dicts(
            [n.state_dict() for n in nets], module=net, metrics={"norm": norms}, fractions=(0.6, 0.2, 0.2)
        )
        populations[name] = next(iter(zoo.populations.values()))
    path = Zoo(populations).save(tmp_path / "wild.h5")
    for model in ("graph", "probe"):
        config = config_of(path, model, epochs=2, target="norm", batch_size=8)
        train(config, tmp_path / model, device="cpu", progress=False)
        scored = evaluate(tmp_path / model, device="cpu")
        assert set(scored.populations) == set(populations)
    assert load_config(tmp_path / "graph").options["edge_features"] == 25


@pytest.mark.parametrize(
    ("values", "changes", "kind", "message"),
    [
        (
            {"model": "dws"},
            {},
            ConfigError,
            "model dws: reads networks of one weight space, found 3 populations; for several",
        ),
        (
            {},
            {"model.types": "tensor"},
            ConfigError,
            "model graph: reads networks of one weight space, found 3 populations",
        ),
        (
            {},
            {"normalisation": "tensor"},
            ConfigError,
            "normalisation: expected fan_in or none for several populations, found tensor",
        ),
        ({}, {"devices": 2}, ConfigError, "devices: expected 1 with several populations, found 2"),
        ({"population": "a,z"}, {}, ZooError, "population: expected one of a, b, c, found 'z'"),
        ({"population": None}, {}, ConfigError, "population: the zoo has several, name one of a, b, c"),
        ({}, {"model.edge_features": 1, "model.layout": "neural-graphs"}, None, ""),
    ],
)
def test_what_cannot_is_refused_by_name(zoo, tmp_path, values, changes, kind, message):
    config = config_of(zoo, **{"epochs": 1, "model": "graph", **values}, changes=changes)
    if kind is None:
        assert train(config, tmp_path / "run", device="cpu", progress=False).epochs == 1
        return
    with pytest.raises(kind, match="^" + re.escape(message)):
        train(config, tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


def test_editing_is_of_one_population(zoo, tmp_path):
    values = {"zoo": str(zoo), "model": "graph", "task": "editing", "population": "all"}
    with pytest.raises(TaskError, match="task editing: expected networks of one population, found 3"):
        train(
            train_config(values, {**ANY, "task.of": "rendered", "task.side": 4}),
            tmp_path / "run",
            progress=False,
        )


def test_answers_of_other_sizes_are_refused(zoo, tmp_path):
    """Probes answer with as many numbers as networks have outputs."""
    inr = Zoo.open(zoo)["a"]
    nets = [CNN((2, 4, 4), (3,), 2) for _ in range(20)]
    cnn = Zoo.from_state_dicts(
        [n.state_dict() for n in nets], module=nets[0], metrics={"quality": np.arange(20.0)}
    )
    path = Zoo({"inr": inr, "cnn": cnn[next(iter(cnn))]}).save(tmp_path / "mixed.h5")
    with pytest.raises(
        ConfigError, match="population: inr needs a metanetwork of other sizes than the first one"
    ):
        train(config_of(path, "probe", changes={}), tmp_path / "run", device="cpu", progress=False)


def test_a_run_of_one_population_still_names_one(zoo, tmp_path):
    train(config_of(zoo, population="a", epochs=1), tmp_path / "run", device="cpu", progress=False)
    alone = evaluate(tmp_path / "run", device="cpu")
    assert alone.figure.name == "test.png"
    everything = evaluate(tmp_path / "run", device="cpu", population="all")
    assert list(everything.populations) == ["a", "b", "c"]
    train(config_of(zoo, "dws", population="a", epochs=1), tmp_path / "dws", device="cpu", progress=False)
    with pytest.raises(RunError, match=r"those of population b of .* have"):
        evaluate(tmp_path / "dws", device="cpu", population="all")


def test_populations_without_networks_in_a_split_are_left_out(zoo, tmp_path):
    opened = Zoo.open(zoo)
    train_only = replace(opened["c"], split=np.zeros(40, np.uint8))
    few = replace(opened["b"], split=np.r_[0, np.full(79, 2)].astype(np.uint8))
    path = Zoo({"a": opened["a"], "b": few, "c": train_only}).save(tmp_path / "zoo.h5")
    report = train(config_of(path, epochs=1), tmp_path / "run", device="cpu", progress=False)
    assert report.populations == {}, "only a has networks in the validation split"
    scored = evaluate(tmp_path / "run", device="cpu")
    assert set(scored.populations) == {"a", "b"}
    assert SPLITS[2] == scored.split == "test"
