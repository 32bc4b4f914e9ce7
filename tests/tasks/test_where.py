"""Runs on some of the rows of a zoo: what they are trained, scored and used on, and what is written where."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from weightspace.errors import ConfigError, OutputError
from weightspace.tasks import edit, evaluate, load_config, predict, train, train_config
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

LAST = "epoch == last and accuracy > 0.2"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two checkpoints per network; only the last ones tell the target."""
    inr = tiny_zoo(networks=120, views=1)["inr"]
    network = np.repeat(np.arange(120, dtype=np.int64), 2)
    epoch = np.tile(np.float32([0, 9]), 120)
    value = inr.spec.unflatten(inr.read(slice(None)))["layers.2.weight"].mean((1, 2)).numpy()
    accuracy = np.where(epoch == 9, 0.5 + value[network], 0.1).astype(np.float32)
    weights = np.where(epoch[:, None] == 9, inr.weights[network], np.float32(0.01) * inr.weights[network])
    inr = replace(
        inr,
        weights=weights,
        network=network,
        step=epoch.astype(np.int64),
        metrics={"epoch": epoch, "accuracy": accuracy},
        hyperparameters={"optimizer": np.arange(120, dtype=np.int64) % 2},
        protocol={**inr.protocol, "choices": {"optimizer": ["sgd", "adam"]}},
    )
    return Zoo({"inr": inr}).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def config_of(zoo, where, **changes):
    values = {
        "zoo": str(zoo),
        "model": "statistics",
        "task": "regression",
        "target": "accuracy",
        "where": where,
    }
    return train_config(values, {"model.iterations": 30, **changes})


@pytest.fixture(scope="module")
def run(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(config_of(zoo, LAST), path, device="cpu", progress=False)
    return path


def selected(zoo, split, holds):
    inr = Zoo.open(zoo)["inr"]
    rows = inr.rows_of(split)
    return rows[[bool(holds(inr.metrics["epoch"][row], inr.metrics["accuracy"][row])) for row in rows]]


def test_a_run_is_scored_on_rows_like_those_it_was_trained_on(zoo, run):
    assert load_config(run).where == LAST
    own = evaluate(run, device="cpu")
    assert own.where == LAST
    assert own.networks == len(selected(zoo, "test", lambda e, a: e == 9 and a > 0.2)) > 5
    assert own.metrics["r2"] > 0.5
    assert own.metrics == evaluate(run, zoo, device="cpu").metrics
    low, high = own.intervals["kendall_tau"]
    assert low < own.metrics["kendall_tau"] < high
    written = json.loads((run / "evaluation-test.json").read_text())
    assert written["where"] == LAST
    assert written["intervals"]["r2"] == list(own.intervals["r2"])


def test_other_rows_are_scored_into_files_of_their_own(zoo, run):
    own = evaluate(run, device="cpu")
    before = (run / "evaluation-test.json").read_bytes()
    everything = evaluate(run, device="cpu", where="")
    assert everything.networks == len(selected(zoo, "test", lambda *_: True))
    assert everything.where is None
    assert everything.figure.name == "test-where-all.png"
    adam = evaluate(run, device="cpu", where="optimizer == 'adam' and epoch == last")
    assert 0 < adam.networks < own.networks
    assert adam.figure.is_file()
    assert adam.figure.name.startswith("test-where-")
    assert (run / "evaluation-test.json").read_bytes() == before


def test_predictions_are_of_all_rows_unless_told_otherwise(zoo, run, tmp_path):
    assert predict(run, zoo, tmp_path / "all.csv", device="cpu").networks == 240
    report = predict(run, zoo, tmp_path / "some.csv", split="val", where="epoch == first", device="cpu")
    with (tmp_path / "some.csv").open() as file:
        rows = [int(line["row"]) for line in csv.DictReader(file)]
    assert rows == selected(zoo, "val", lambda e, _: e == 0).tolist()
    assert report.networks == len(rows)


def test_edits_are_of_the_rows_that_are_asked_for(zoo, tmp_path):
    small = {"model.hidden": 2, "model.layers": 1, "task.of": "rendered", "task.side": 4}
    config = train_config({"zoo": str(zoo), "task": "editing", "epochs": 1, "where": "epoch == last"}, small)
    train(config, tmp_path / "run", device="cpu", progress=False)
    where = "epoch == first and optimizer == 'sgd'"
    edit(tmp_path / "run", zoo, tmp_path / "edited.h5", where=where, device="cpu")
    edited = Zoo.open(tmp_path / "edited.h5")["inr"]
    assert edited.networks == edited.rows == 60
    assert edited.protocol["edited"]["where"] == where
    assert edited.hyperparameters["optimizer"].tolist() == [0] * 60
    assert edited.step.tolist() == [0] * 60


def test_another_filter_is_another_run(zoo, run):
    with pytest.raises(
        OutputError, match="holds a run of another configuration \\(where: 'epoch == last and "
    ):
        train(config_of(zoo, "epoch == last"), run, device="cpu", progress=False)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("acc > 0.3", "where: expected one of accuracy, epoch, optimizer, label, step, "),
        ("accuracy > 30", "where: 'accuracy > 30' holds for none of 240 rows of 120 networks"),
        ("split == 'val'", "where: .* holds for 48 rows of 240, but for none of 144 rows of split train"),
    ],
)
def test_mistakes_come_before_anything_is_written(zoo, run, tmp_path, where, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(zoo, where), tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=message):
        evaluate(run, device="cpu", where=where, split="train")
    with pytest.raises(ConfigError, match=message):
        predict(run, zoo, tmp_path / "x.csv", split="train", where=where, device="cpu")
    assert not (tmp_path / "x.csv").exists()
