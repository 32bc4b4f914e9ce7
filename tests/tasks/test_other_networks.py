"""Trained metanetworks on networks that they were not trained on: read where that is possible, refused otherwise."""

import csv
import re
from dataclasses import replace

import pytest
import torch

from weightspace.errors import RunError
from weightspace.models import GraphNetwork, GraphOptions, to_graph
from weightspace.tasks import evaluate, load_run, predict, train, train_config
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

ANY = {"model.types": "role", "normalisation": "fan_in"}
SMALL = {
    "graph": {"model.hidden": 4, "model.layers": 2, "model.head": 8},
    "probe": {"model.probes": 8, "model.hidden": [16]},
    "dws": {"model.hidden": 4, "model.layers": 2, "model.head": 8},
    "mlp": {"model.hidden": [16]},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def deeper(tmp_path_factory):
    """A zoo of wider and deeper networks, and one population like those of the other zoo."""
    wide, same = tiny_zoo(networks=30, hidden=(5, 7, 6)), tiny_zoo(networks=20, seed=3)
    zoo = Zoo({"deep": wide["inr"], "same": same["inr"]}, wide.sources | same.sources)
    return zoo.save(tmp_path_factory.mktemp("deeper") / "deeper.h5")


def trained(zoo, run, model, changes=None):
    values = {"zoo": str(zoo), "model": model, "epochs": 1, "batch_size": 8}
    config = train_config(values, {**SMALL[model], **(changes or {})})
    train(config, run, device="cpu", progress=False)
    return run


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("graph", ANY),
        ("graph", {**ANY, "model.probes": 4}),
        ("graph", {**ANY, "model.style": "gmn"}),
        ("probe", {}),
    ],
)
def test_networks_of_any_architecture_are_read(zoo, deeper, tmp_path, model, changes):
    run = trained(zoo, tmp_path / "run", model, changes)
    report = predict(run, deeper, tmp_path / "deep.csv", population="deep", device="cpu")
    assert report.networks == 30
    population = Zoo.open(deeper)["deep"]
    loaded = load_run(run)
    reader = loaded.reader_of(population, "deeper.h5")
    # graphs are invariant to permutations alone, probes to signs as well
    symmetries = ("permutation",) if model == "graph" else None
    element = population.spec.random_element(
        (30,), generator=torch.Generator().manual_seed(0), symmetries=symmetries
    )
    weights = population.spec.unflatten(torch.tensor(population.weights[:]))
    with torch.no_grad():
        out, moved = reader(weights), reader(population.spec.act(element, weights))
    torch.testing.assert_close(moved, out, rtol=1e-3, atol=1e-4)
    with (tmp_path / "deep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["prediction"]) for row in rows] == out.argmax(-1).tolist()
    assert out.std(0).max() > 1e-6, "networks are told apart"
    scored = evaluate(run, deeper, population="deep", device="cpu")
    assert scored.networks == len(population.network[population.split[population.network] == 2])
    assert loaded.reader_of(Zoo.open(deeper)["same"], "deeper.h5") is loaded.network


@pytest.mark.parametrize("style", ["pna", "gmn"])
def test_other_networks_are_read_as_graphs_of_their_own(zoo, deeper, tmp_path, style):
    """What is predicted is what the parameters of the run say of the normalised weights as sparse graphs."""
    run = load_run(trained(zoo, tmp_path / "run", "graph", {**ANY, "model.style": style}))
    population = Zoo.open(deeper)["deep"]
    weights = population.spec.unflatten(torch.tensor(population.weights[:]))
    fan_in = (2, 1, 5, 1, 7, 1, 6, 1)  # of weight and bias of each layer
    normalised = {name: w * fan**0.5 for (name, w), fan in zip(weights.items(), fan_in, strict=True)}
    config = run.config.model_options().settled(run.spec)
    options = GraphOptions(
        types="role", node_features=config.node_features, edge_features=config.edge_features
    )
    sparse = GraphNetwork(
        None,
        3,
        options=options,
        **config.model_dump(
            include={"hidden", "layers", "style", "aggregation", "head", "dropout", "fourier"}
        ),
    )
    sparse.load_state_dict(run.network.model.state_dict())
    with torch.no_grad():
        expected = sparse.eval()(to_graph(population.spec, normalised, options=options))
        found = run.reader_of(population, "deeper.h5")(weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_graph_network_reads_the_training_networks_as_it_did(zoo, tmp_path):
    """Rebuilt for another spec and back, it has the same parameters."""
    run = trained(zoo, tmp_path / "run", "graph", ANY)
    loaded = load_run(run)
    settled = loaded.config.model_options().settled(loaded.spec)
    assert (settled.node_features, settled.edge_features) == (1, 1)
    weights = loaded.spec.unflatten(torch.randn(3, loaded.spec.num_parameters))
    again = settled.build(loaded.spec, None, 3).eval()
    again.load_state_dict(loaded.network.model.state_dict())
    torch.testing.assert_close(
        again(loaded.network.normalisation(weights)), loaded.network(weights), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("dws", {}),
        ("mlp", {}),
        ("graph", {}),
        ("graph", {"model.types": "role", "normalisation": "tensor"}),
        ("graph", {"normalisation": "fan_in"}),
    ],
)
def test_others_refuse_them_and_say_what_would_not(zoo, deeper, tmp_path, model, changes):
    run = trained(zoo, tmp_path / "run", model, changes)
    message = (
        "trained on networks of 105 parameters, but those of "
        f"{deeper} have 112 (tensor 'layers.0.weight' should have shape [8, 2], found [5, 2]); probes read networks of "
        "any weight space, and so do graph networks trained with model.types=role and normalisation=fan_in"
    )
    with pytest.raises(RunError, match=re.escape(message)):
        predict(run, deeper, tmp_path / "out.csv", population="deep", device="cpu")
    assert not (tmp_path / "out.csv").exists()


def test_probes_see_what_networks_compute_and_weights_do_not_tell(zoo, tmp_path):
    """Another output offset: the spec is the same, the function is not."""
    inr = Zoo.open(zoo)["inr"]
    arguments = {**inr.architecture["arguments"], "output_offset": 0.0}
    other = replace(inr, architecture={**inr.architecture, "arguments": arguments})
    weights = inr.spec.unflatten(torch.tensor(inr.weights[:]))
    for model, changes, differs in (
        ("probe", {}, True),
        ("graph", {"model.probes": 4}, True),
        ("mlp", {}, False),
    ):
        run = load_run(trained(zoo, tmp_path / f"{model}", model, changes))
        if model == "graph":
            with pytest.raises(RunError, match=r"runs networks of architecture .*0\.5.* are .*0\.0"):
                run.reader_of(other, "other.h5")
            continue
        before, after = run.network(weights), run.reader_of(other, "other.h5")(weights)
        assert ((before - after).abs().max() > 1e-3) == differs


def test_networks_that_cannot_be_run(zoo, tmp_path):
    inr = Zoo.open(zoo)["inr"]
    run = load_run(trained(zoo, tmp_path / "run", "probe"))
    with pytest.raises(
        RunError, match=r"cannot read the networks of other\.h5: model probe: the zoo does not say"
    ):
        run.reader_of(replace(inr, architecture=None), "other.h5")
    arguments = {**inr.architecture["arguments"], "widths": [3, 8, 8, 1]}
    with pytest.raises(RunError, match=r"cannot read the networks of other\.h5: "):
        run.reader_of(replace(inr, architecture={**inr.architecture, "arguments": arguments}), "other.h5")
