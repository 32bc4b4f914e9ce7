"""``--where`` and ``--population`` of train, evaluate and predict: what they print, and one line for every mistake."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

CPU = ["--device", "cpu"]
FIT = [*CPU, "--epochs", "1", "--task", "regression", "--target", "quality", "--set", "batch_size=8"]
GRAPH = [
    "--model",
    "graph",
    "--set",
    "model.types=role",
    "--set",
    "model.hidden=4",
    "--set",
    "model.layers=1",
]


def population(networks, hidden):
    """Two checkpoints per network."""
    inr = tiny_zoo(networks=networks, hidden=hidden, views=1)["inr"]
    network = np.repeat(np.arange(networks, dtype=np.int64), 2)
    return replace(
        inr,
        weights=inr.weights[network],
        network=network,
        step=np.tile(np.array([0, 9], np.int64), networks),
        metrics={"quality": np.linspace(0, 1, 2 * networks, dtype=np.float32)},
        hyperparameters={"optimizer": np.arange(networks, dtype=np.int64) % 2},
        protocol={**inr.protocol, "choices": {"optimizer": ["sgd", "adam"]}},
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    made = {"a": population(40, (8, 8)), "b": population(30, (5, 4))}
    return Zoo(made).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def test_a_filter_from_training_to_predictions(call, document, zoo, tmp_path):
    run = tmp_path / "run"
    where = "step == last and optimizer in ['sgd', 'adam']"
    model = ["--model", "statistics", "--set", "model.iterations=5", "--population", "a"]
    document("train", zoo, "-o", run, *FIT, *model, "--where", where)
    scored = document("evaluate", run, *CPU)
    assert (scored["networks"], scored["where"]) == (8, where)
    assert set(scored["intervals"]) == {"r2", "kendall_tau", "mean_absolute_error"}
    assert document("evaluate", run, *CPU, "--where", "")["networks"] == 16
    adam = document("evaluate", run, *CPU, "--where", "optimizer == 'adam'")
    assert adam["networks"] % 2 == 0
    assert 0 < adam["networks"] < 16
    _, out, _ = call("evaluate", run, *CPU)
    low, high = scored["intervals"]["mean_absolute_error"]
    assert (
        f"mean_absolute_error {scored['metrics']['mean_absolute_error']:.4g} ({low:.4g} to {high:.4g})" in out
    )
    found = document(
        "predict", run, zoo, "-o", tmp_path / "p.csv", *CPU, "--where", "step == first and split == 'val'"
    )
    with (tmp_path / "p.csv").open() as file:
        assert [int(line["row"]) % 2 for line in csv.DictReader(file)] == [0] * found["networks"]


def test_several_populations_from_training_to_predictions(call, document, zoo, tmp_path):
    run = tmp_path / "run"
    found = document("train", zoo, "-o", run, *FIT, *GRAPH, "--population", "a,b")
    assert list(found["populations"]) == ["a", "b"]
    scored = document("evaluate", run, *CPU)
    assert {name: part["networks"] for name, part in scored["populations"].items()} == {"a": 16, "b": 12}
    _, out, _ = call("evaluate", run, *CPU)
    assert "\na: 16 test networks, r2 " in out
    assert "\nb: 12 test networks, r2 " in out
    found = document("predict", run, zoo, "-o", tmp_path / "p.csv", *CPU)
    assert found["columns"][0] == "population"
    assert found["networks"] == 140


def test_mistakes_are_one_line(refuse, zoo, tmp_path):
    start = ["train", zoo, "-o", tmp_path / "run", *FIT]
    graph = [*start, *GRAPH, "--population", "a"]
    message = refuse(*graph, "--where", "test_accuracy > 0.3")
    assert (
        message
        == "where: expected one of quality, optimizer, label, step, network, source, view, split, found 'test_accuracy'"
    )
    assert (
        refuse(*graph, "--where", "quality > 7")
        == "where: 'quality > 7' holds for none of 80 rows of 40 networks"
    )
    assert "is no expression" in refuse(*graph, "--where", "quality >")
    assert "found 'adamw'" in refuse(*graph, "--where", "optimizer == 'adamw'")
    assert refuse(*start, *GRAPH) == "population: the zoo has several, name one of a, b"
    message = refuse(*start, "--model", "dws", "--population", "all")
    assert message.startswith(
        "model dws: reads networks of one weight space, found 2 populations; for several take probe"
    )
    assert not (tmp_path / "run").exists()
