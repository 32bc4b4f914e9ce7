"""Contrastive: the loss against a slow oracle, what a run learns and says, linear probes against scikit-learn."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from weightspace.cli import run
from weightspace.datasets import ZooDataset
from weightspace.errors import ConfigError, TaskError
from weightspace.tasks import (
    Contrastive,
    ContrastiveOptions,
    LinearProbe,
    evaluate,
    load_run,
    nt_xent,
    predict,
    train,
    train_config,
)
from weightspace.testing import assert_invariant, tiny_zoo
from weightspace.zoo import Zoo

SMALL = {"model.hidden": 4, "model.layers": 2, "model.head": 16, "task.dimensions": 12, "task.projection": 6}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Two views of each item; beside the label a number that is one of the weights' statistics."""
    inr = tiny_zoo(networks=120, views=2)["inr"]
    value = inr.spec.unflatten(torch.from_numpy(inr.weights))["layers.2.weight"].mean((1, 2)).numpy()
    inr = replace(inr, labels={**inr.labels, "mean": (100.0 + 7.0 * value).astype(np.float32)})
    return Zoo({"inr": inr}).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "contrastive"
    return fit(config_of(zoo, epochs=6), path)


def config_of(zoo, model="dws", *, epochs=1, changes=None, **values):
    fields = {"zoo": str(zoo), "model": model, "task": "contrastive", "epochs": epochs, "batch_size": 16}
    small = SMALL if model == "dws" else {"task.dimensions": 12}
    return train_config({**fields, "learning_rate": 1e-2, **values}, {**small, **(changes or {})})


class Embedding(nn.Module):
    """What a run gives, without the projection."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, weights):
        return self.network(weights)["embedding"]


def fit(config, path):
    return train(config, path, device="cpu", progress=False)


# -- the loss ----------------------------------------------------------------------------------------------


def slow_loss(x, instances, items, temperature):
    """One pair at a time, in float64."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows, means = range(len(x)), []
    for i in rows:
        negatives = sum(np.exp(x[i] @ x[n] / temperature) for n in rows if items[n] != items[i])
        terms = []
        for p in rows:
            if p != i and instances[p] == instances[i]:
                positive = np.exp(x[i] @ x[p] / temperature)
                terms.append(-np.log(positive / (positive + negatives)))
        means += [np.mean(terms)] if terms else []
    return np.mean(means)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(
    ("instances", "items"),
    [
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]),
        ([0, 1, 2, 3, 0, 1, 2, 3], [5, 5, 6, 7, 5, 5, 6, 7]),
        ([0, 1, 0, 2, 0, 2, 1, 3], [0, 1, 0, 2, 0, 2, 1, 3]),
    ],
    ids=["pairs", "two networks of one item", "three of one, and one alone"],
)
def test_the_loss_is_that_of_the_formula(instances, items, temperature):
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    found = nt_xent(x, torch.tensor(instances), torch.tensor(items), temperature)
    expected = slow_loss(x.double().numpy(), instances, items, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_symmetric_reads_directions_alone_and_is_float32():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    instances = torch.tensor([0, 1, 2, 0, 1, 2])
    order = torch.tensor([3, 4, 5, 0, 1, 2])
    expected = nt_xent(x, instances)
    torch.testing.assert_close(nt_xent(x[order], instances), expected)
    torch.testing.assert_close(nt_xent(x * torch.linspace(0.1, 9, 6)[:, None], instances), expected)
    assert nt_xent(x.bfloat16(), instances).dtype == torch.float32


def test_without_negatives_the_loss_and_its_gradient_are_zero():
    x = torch.randn(4, 3, requires_grad=True)
    loss = nt_xent(x, torch.tensor([0, 1, 0, 1]), torch.tensor([7, 7, 7, 7]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert bool((x.grad == 0).all())


def test_negatives_that_are_left_out_stay_so_at_any_temperature():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(nt_xent(opposite, torch.tensor([0, 0]), temperature=1e-5)) == 0.0


def test_scores_by_hand():
    """Two items at right angles: every copy finds the other; one that stands among strangers does not."""
    task = Contrastive(ContrastiveOptions(dimensions=2, projection=0, temperature=1.0))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([[0, 0], [1, 1], [0, 0], [1, 1]])
    scores = task.scores(x, targets)
    # two negatives at cosine 0, the positive at 1
    assert scores["information"] == pytest.approx(np.log(3) - np.log(1 + 2 / np.e), rel=1e-5)
    assert scores["retrieval"] == 1.0
    strange = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.1, 2.0], [0.0, 2.0]])
    assert task.scores(strange, targets)["retrieval"] == 0.5


def test_scores_of_a_large_split_ask_some_and_compare_with_all(monkeypatch):
    from weightspace.tasks import _contrastive

    task = Contrastive(ContrastiveOptions(dimensions=3, projection=2))
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30).repeat(2)[:, None].expand(60, 2)
    whole = task.scores(x, targets)
    assert whole["information"] == pytest.approx(
        np.log(59) - float(nt_xent(x[:, 3:], targets[:, 0])), rel=1e-4
    )
    monkeypatch.setattr(_contrastive, "CELLS", 60 * 7)
    assert task.scores(x, targets) == pytest.approx(whole)
    monkeypatch.setattr(_contrastive, "MOST_QUERIES", 20)
    some = task.scores(x, targets)
    assert some["information"] == pytest.approx(whole["information"], abs=1.0)
    assert some["information"] != whole["information"]


# -- a run -------------------------------------------------------------------------------------------------


def test_training_teaches_to_recognise_copies(zoo, trained):
    untrained = fit(config_of(zoo, changes={"learning_rate": 1e-9}), trained.run.parent / "untrained")
    assert trained.metrics["information"] > untrained.metrics["information"] + 0.5
    assert trained.metrics["retrieval"] > 2 * untrained.metrics["retrieval"]
    assert (trained.run / "val.png").read_bytes()[:4] == b"\x89PNG"


def test_validation_draws_stay_the_same_and_are_those_of_evaluation(trained):
    report = evaluate(trained.run, split="val", device="cpu")
    assert report.metrics == pytest.approx(trained.metrics, rel=1e-5)
    assert report.networks == 24
    assert report.target is None
    lines = list(csv.DictReader((trained.run / "metrics.csv").read_text().splitlines()))
    best = float(lines[trained.best_epoch - 1]["val_information"])
    assert best == pytest.approx(report.metrics["information"], rel=1e-4)


def test_the_embedding_is_of_networks_as_they_are_and_invariant(zoo, trained):
    loaded, dataset = load_run(trained.run), ZooDataset(zoo, "test", target=None)
    with torch.no_grad():
        outputs = loaded.network(dataset.read(range(len(dataset)))[0])
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "embedding": (24, 12),
        "projection": (24, 6),
    }
    path = trained.run.parent / "embeddings.csv"
    report = predict(trained.run, zoo, path, split="test", device="cpu")
    assert report.columns == ("row", "network", "split", *(f"embedding_{at}" for at in range(12)))
    written = np.array(
        [
            [float(row[f"embedding_{at}"]) for at in range(12)]
            for row in csv.DictReader(path.read_text().splitlines())
        ]
    )
    np.testing.assert_array_equal(written.astype(np.float32), outputs["embedding"].numpy())
    assert_invariant(Embedding(loaded.network), loaded.spec, symmetries=["permutation"])


def test_without_a_projection_the_loss_is_of_the_embedding(zoo, tmp_path):
    report = fit(config_of(zoo, changes={"task.projection": 0}), tmp_path / "run")
    loaded, dataset = load_run(report.run), ZooDataset(zoo, "test", target=None)
    assert list(loaded.network(dataset.read([0, 1])[0])) == ["embedding"]
    assert np.isfinite(report.metrics["information"])


def test_each_batch_holds_two_copies_of_each_network(zoo, tmp_path, monkeypatch):
    seen = []
    loss = Contrastive.loss

    def spied(self, readout, targets, *, training):
        seen.append((targets.clone(), readout.detach().clone(), training))
        return loss(self, readout, targets, training=training)

    monkeypatch.setattr(Contrastive, "loss", spied)
    fit(config_of(zoo), tmp_path / "run")
    for targets, readout, _ in seen[2:]:  # the first two estimate the memory
        first, second = targets.chunk(2)
        assert torch.equal(first, second)
        assert not torch.equal(*readout.chunk(2)), "both copies are augmented, each in its own way"
    assert sum(len(targets) for targets, _, training in seen[2:] if not training) == 2 * 24


def test_a_reader_of_other_networks_has_the_projection_too(zoo, tmp_path):
    other = tiny_zoo(networks=20, hidden=(6, 5)).save(tmp_path / "other.h5")
    fit(config_of(zoo, "probe", augment="noise(0.1)", changes={"task.projection": 4}), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    reader = loaded.reader_of(Zoo.open(other)["inr"], "other.h5")
    assert reader is not loaded.network
    for name, parameter in loaded.network.named_parameters():
        torch.testing.assert_close(dict(reader.named_parameters())[name], parameter)
    assert evaluate(tmp_path / "run", other, split="train", device="cpu").networks == 12


# -- linear probes -----------------------------------------------------------------------------------------


def test_a_probe_reads_the_label_and_numbers_from_embeddings(trained):
    label = evaluate(trained.run, target="label", device="cpu")
    assert label.metrics["accuracy"] > 0.6  # of three classes
    assert (label.target, label.networks) == ("label", 24)
    written = json.loads((trained.run / "evaluation-test-target-label.json").read_text())
    assert written["metrics"] == pytest.approx(label.metrics)
    assert label.figure.name == "test-target-label.png"
    assert label.figure.stat().st_size > 5000
    number = evaluate(trained.run, target="mean", device="cpu")
    assert number.metrics["r2"] > 0.5
    low, high = number.intervals["r2"]
    assert low < number.metrics["r2"] < high


def test_a_probe_is_fitted_to_the_zoo_that_is_scored(zoo, trained, tmp_path):
    """The label of another zoo may mean something else, or the first zoo may have none."""
    inr = Zoo.open(zoo)["inr"]
    other = Zoo({"inr": replace(inr, labels={"turned": (inr.labels["label"] + 1) % 3})}).save(
        tmp_path / "o.h5"
    )
    turned = evaluate(trained.run, other, target="turned", device="cpu")
    assert (
        turned.metrics["accuracy"] == evaluate(trained.run, target="label", device="cpu").metrics["accuracy"]
    )


def test_the_command_probes(trained, capfd):
    assert (
        run(
            ["evaluate", str(trained.run), "--target", "label", "--split", "val", "--device", "cpu", "--json"]
        )
        == 0
    )
    found = json.loads(capfd.readouterr().out)
    assert (found["target"], found["split"], list(found["metrics"])) == ("label", "val", ["accuracy", "loss"])


def data(outputs, rows=80, features=6, noise=1.0):
    generator = torch.Generator().manual_seed(0)
    x = 3.0 + 5.0 * torch.randn(rows, features, generator=generator)
    y = x @ torch.randn(features, outputs, generator=generator)
    return x, y + noise * y.std() * torch.randn(rows, outputs, generator=generator)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_ridge_is_that_of_scikit_learn(penalty):
    from sklearn.linear_model import Ridge

    x, y = data(1)
    probe = LinearProbe.fit((x, y[:, 0]), (x, y[:, 0]), penalties=[penalty])
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    expected = Ridge(alpha=penalty * len(x)).fit(standard, y[:, 0].double().numpy())
    np.testing.assert_allclose(probe.weight[:, 0].numpy(), expected.coef_, rtol=1e-5)
    np.testing.assert_allclose(probe(x)[:, 0].numpy(), expected.predict(standard), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_logistic_regression_is_that_of_scikit_learn(penalty):
    from sklearn.linear_model import LogisticRegression

    x, y = data(4)
    labels = y.argmax(-1)
    probe = LinearProbe.fit((x, labels), (x, labels), classes=4, penalties=[penalty])
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    expected = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=5000).fit(
        standard, labels.numpy()
    )
    np.testing.assert_allclose(
        probe(x).double().softmax(-1).numpy(), expected.predict_proba(standard), atol=2e-4
    )


def test_the_validation_split_chooses_the_penalty():
    x, y = data(1, rows=24, features=20, noise=2.0)
    half = (x[:12], y[:12, 0]), (x[12:], y[12:, 0])
    noisy = LinearProbe.fit(*half)
    assert LinearProbe.fit(half[0], half[0]).penalty < noisy.penalty
    each = {p: LinearProbe.fit(*half, penalties=[p]) for p in (1e-5, 1e-2, 1.0, 100.0)}
    errors = {p: float((probe(half[1][0])[:, 0] - half[1][1]).square().mean()) for p, probe in each.items()}
    assert LinearProbe.fit(*half, penalties=list(each)).penalty == min(errors, key=errors.get)


def test_constant_features_and_classes_that_training_lacks_do_no_harm():
    x, y = data(2)
    x[:, 0] = 4.0
    labels = 2 * y.argmax(-1)  # of three classes the middle one is missing
    probe = LinearProbe.fit((x, labels), (x, labels), classes=3)
    assert bool(probe(x).isfinite().all())
    assert bool((probe(x).argmax(-1) != 1).all())


def test_a_feature_of_one_value_is_not_divided_by_rounding():
    x, y = torch.full((100, 1), 1 / 3, dtype=torch.float64), torch.arange(100.0)
    assert float(x.std(0, correction=0)) > 0
    assert float(LinearProbe.fit((x, y), (x, y)).std) == 1.0


# -- mistakes ----------------------------------------------------------------------------------------------


def test_augmentations_must_make_copies_that_differ(zoo, tmp_path):
    with pytest.raises(
        ConfigError, match=r"augment: task contrastive compares augmented copies .* found none"
    ):
        fit(config_of(zoo, augment=""), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"expected augmentations that do not mix it with others, found mixup"
    ):
        fit(config_of(zoo, augment="sign, mixup(direct)"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fit(config_of(zoo, augment="mixup(self), noise(0.1)"), tmp_path / "run")


def test_what_cannot_be_trained_so_is_refused(zoo, tmp_path):
    with pytest.raises(
        TaskError, match="expected a metanetwork that is trained by gradients, found Statistics"
    ):
        fit(config_of(zoo, "statistics"), tmp_path / "run")
    with pytest.raises(ConfigError, match="target: task contrastive predicts none, found 'label'"):
        config_of(zoo, target="label")
    with pytest.raises(ConfigError, match=r"task.temperature: input should be greater than or equal to 0.01"):
        config_of(zoo, changes={"task.temperature": 0})
    inr = tiny_zoo(networks=12)["inr"]
    two = Zoo({"a": inr, "b": tiny_zoo(hidden=(5, 4))["inr"]}).save(tmp_path / "two.h5")
    changes = {"population": "all", "augment": "noise(0.1)"}
    with pytest.raises(TaskError, match="task contrastive: expected networks of one population, found 2"):
        fit(config_of(two, "probe", changes=changes), tmp_path / "run")
    alone = replace(
        inr, source=np.zeros(12, np.int64), split=np.repeat([0, 1], [8, 4]).astype(inr.split.dtype)
    )
    one = Zoo({"inr": alone}).save(tmp_path / "one.h5")
    with pytest.raises(TaskError, match="expected networks of several items in split 'train', found one"):
        fit(config_of(one), tmp_path / "run")


def test_probes_are_for_embeddings(zoo, trained, tmp_path):
    config = train_config(
        {"zoo": str(zoo), "model": "mlp", "epochs": 1}, {"model.hidden": [8], "model.dropout": 0.0}
    )
    fit(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"target: expected none for task classification, .* found 'label'"):
        evaluate(tmp_path / "run", target="label", device="cpu")
    with pytest.raises(TaskError, match="target: the zoo has no label or metric 'colour'"):
        evaluate(trained.run, target="colour", device="cpu")
    with pytest.raises(ConfigError, match="target: expected a label, hyperparameter or metric, found ''"):
        evaluate(trained.run, target="", device="cpu")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_probe_of_what_is_not_finite_or_of_nothing_is_refused(part):
    x, y = data(3)
    bad = x.clone()
    bad[4, 1] = torch.nan
    wrong = y[:, 0].clone()
    wrong[2] = torch.inf
    cases = {
        f"row 4 of the features for {part} is NaN or infinite": (bad, y[:, 0]),
        f"row 2 of the targets for {part} is NaN or infinite": (x, wrong),
        f"expected features for {part}, found none": (x[:0], y[:0, 0]),
    }
    for message, broken in cases.items():
        parts = {"train": (x, y[:, 0]), "val": (x, y[:, 0]), part: broken}
        with pytest.raises(TaskError, match=f"linear probe: {message}"):
            LinearProbe.fit(*parts.values())


def test_a_network_with_an_infinite_output_is_named_by_its_row(zoo, trained, tmp_path):
    inr = Zoo.open(zoo)["inr"]
    row = int(inr.rows_of("val")[5])
    weights = np.array(inr.weights)
    weights[row] = 1e30
    bad = Zoo({"inr": replace(inr, weights=weights)}).save(tmp_path / "bad.h5")
    with pytest.raises(TaskError, match=rf"output for row {row} is NaN or infinite"):
        evaluate(trained.run, bad, split="val", device="cpu")
