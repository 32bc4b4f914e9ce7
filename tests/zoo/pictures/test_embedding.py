"""Weights in the plane: what is planted is found, and memory stays bounded."""

from dataclasses import replace

import numpy as np
import pytest

from weightspace.zoo import Population
from weightspace.zoo.pictures import _embedding
from weightspace.zoo.pictures._associations import associate, associations
from weightspace.zoo.pictures._embedding import embed, embedded, sketch_of
from weightspace.zoo.pictures._summary import Summary, Variable


def correlation(found, summary):
    return abs(np.corrcoef(found.points[:, 0], summary.metrics["test_accuracy"][found.networks])[0, 1])


def test_finds_the_direction_of_accuracy(made):
    summary = Summary.of(made.zoo(networks=200).populations)
    found = embed(summary, "cnn")
    assert found.points.shape == (200, 2)
    assert not found.sketched
    assert correlation(found, summary) > 0.9
    assert found.explained[0] > 3 * found.explained[1]


def test_is_that_of_the_standardised_weights(made):
    population = made.population(made.cnn(), networks=40)
    spec = population.spec
    # in another unit per tensor the same picture
    scale = np.concatenate([np.full(t.numel, 10.0**at) for at, t in enumerate(spec.tensors.values())])
    scaled = replace(population, weights=(population.weights * scale).astype(np.float32))
    one, other = (embed(Summary.of({"cnn": member}), "cnn") for member in (population, scaled))
    signs = np.sign((one.points * other.points).sum(0))
    np.testing.assert_allclose(other.points * signs, one.points, atol=1e-2)


def test_a_sketch_finds_it_too_in_bounded_blocks(made, monkeypatch):
    monkeypatch.setattr(_embedding, "WHOLE", 1000)
    monkeypatch.setattr(_embedding, "BLOCK", 5000)
    sizes, read = [], Population.read
    monkeypatch.setattr(Population, "read", lambda self, rows: sizes.append(len(rows)) or read(self, rows))
    summary = Summary.of(made.zoo(made.mlp(), networks=150).populations)
    found = embed(summary, "cnn")
    assert found.sketched
    assert max(sizes) == 5000 // 1210
    assert sum(sizes) == 2 * 150
    assert correlation(found, summary) > 0.9


def test_a_sketch_keeps_distances_on_average():
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(30, 5000))
    sketch = sketch_of(5000, 0)
    assert sketch.nnz == 5000
    assert set(np.unique(sketch.data)) == {-1.0, 1.0}
    short = weights @ sketch
    first, second = np.triu_indices(30, 1)
    ratio = ((short[first] - short[second]) ** 2).sum(1) / ((weights[first] - weights[second]) ** 2).sum(1)
    assert ratio.mean() == pytest.approx(1.0, abs=0.02)
    assert ratio.std() < 0.06


def test_at_most_so_many_networks_and_none_that_failed(made, monkeypatch):
    monkeypatch.setattr(_embedding, "NETWORKS", 20)
    population = made.population(made.cnn(), networks=50, diverged=range(10))
    population.weights[12 * 4 + 3, 5] = np.inf
    summary = Summary.of({"cnn": population})
    found = embed(summary, "cnn", seed=1)
    assert 18 <= len(found.networks) <= 20
    assert not set(found.networks) & {*range(10), 12}
    assert np.isfinite(found.points).all()
    monkeypatch.setattr(_embedding, "NETWORKS", 2000)
    np.testing.assert_array_equal(embed(summary, "cnn").networks, [at for at in range(10, 50) if at != 12])


def test_nothing_to_see(made):
    few = Summary.of({"cnn": made.population(made.cnn(), networks=2)})
    assert embed(few, "cnn") is None
    alike = made.population(made.cnn(), networks=9)
    alike = replace(alike, weights=np.ones_like(alike.weights))
    assert embedded(Summary.of({"cnn": alike})) == {}


def test_the_largest_populations(made):
    sizes = [4, 9, 5, 8, 6, 7, 10, 3]
    members = {f"cnn-{at}": made.population(made.cnn(), networks=size) for at, size in enumerate(sizes)}
    assert list(embedded(Summary.of(members))) == ["cnn-1", "cnn-2", "cnn-3", "cnn-4", "cnn-5", "cnn-6"]


# -- associations --------------------------------------------------------------------------------------------


def test_rho_is_scipys(made):
    from scipy.stats import spearmanr

    summary = Summary.of(made.zoo(networks=80).populations)
    found = associations(summary)
    for name in ("dropout", "learning_rate", "batch_size"):
        values = summary.hyperparameters[name].values
        expected = spearmanr(values, summary.metrics["test_loss"]).statistic
        assert found[name]["test_loss"].value == pytest.approx(expected)
        assert found[name]["test_loss"].ranked
    assert found["learning_rate"]["test_accuracy"].value > 0.99
    assert "epoch" not in found["dropout"]  # it is the same for all
    assert not found["optimizer"]["test_loss"].ranked


def test_share_that_names_explain():
    names = ("a", "b")
    codes = np.repeat([0.0, 1.0], 50)
    noise = np.random.default_rng(0).normal(size=100)
    assert associate(Variable("x", codes, names), codes * 10 + noise).value == pytest.approx(0.75, abs=0.01)
    assert associate(Variable("x", codes, names), noise).value < 0.05
    assert associate(Variable("x", codes), np.full(100, 3.0)) is None
    assert associate(Variable("x", np.array([0, 1, np.nan])), np.arange(3.0)) is None
