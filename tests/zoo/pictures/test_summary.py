"""Populations as one table: last checkpoints, names of codes, scales of axes."""

from dataclasses import replace

import numpy as np
import pytest

from weightspace.zoo.pictures._summary import Summary, Variable, short


def test_last_checkpoints_whatever_the_order_of_rows(made):
    population = made.population(made.cnn(), networks=7)
    order = np.random.default_rng(0).permutation(population.rows)
    shuffled = replace(
        population,
        weights=population.weights[order],
        network=population.network[order],
        step=population.step[order],
        metrics={name: values[order] for name, values in population.metrics.items()},
    )
    one, other = Summary.of({"cnn": population}), Summary.of({"cnn": shuffled})
    np.testing.assert_array_equal(one.row, np.arange(3, 28, 4))
    np.testing.assert_array_equal(other.metrics["test_accuracy"], population.metrics["test_accuracy"][3::4])
    np.testing.assert_array_equal(shuffled.step[other.row], np.full(7, 1000))
    for (time, values), (same_time, same) in zip(
        one.trajectories("test_loss"), other.trajectories("test_loss"), strict=True
    ):
        np.testing.assert_array_equal(time, made.epochs)
        np.testing.assert_array_equal(same_time, time)
        np.testing.assert_array_equal(same, values)


def test_networks_with_other_numbers_of_checkpoints(made):
    population = made.population(made.cnn(), networks=3)
    keep = np.array([0, 4, 5, 8, 9, 10, 11])
    cut = replace(
        population,
        weights=population.weights[keep],
        network=population.network[keep],
        step=population.step[keep],
        metrics={name: values[keep] for name, values in population.metrics.items()},
    )
    summary = Summary.of({"cnn": cut})
    np.testing.assert_array_equal(summary.row, [0, 2, 6])
    assert [len(time) for time, _ in summary.trajectories("test_accuracy")] == [1, 2, 4]


def test_populations_are_joined_by_name(made):
    one = made.population(made.cnn(), networks=3, choices={"optimizer": ["sgd", "adam", "rmsprop"]})
    two = made.population(
        made.mlp(),
        networks=2,
        hyperparameters={"optimizer": np.array([1, 0])},
        choices={"optimizer": ["sgd", "adamw"]},
    )
    two = replace(two, metrics={**two.metrics, "val_loss": np.arange(8, dtype=np.float32)})
    summary = Summary.of({"cnn": one, "mlp": two})
    optimizer = summary.hyperparameters["optimizer"]
    assert [optimizer.called(value) for value in optimizer.values] == [
        "sgd",
        "adam",
        "rmsprop",
        "adamw",
        "sgd",
    ]
    np.testing.assert_array_equal(summary.metrics["val_loss"], [np.nan, np.nan, np.nan, 3, 7])
    assert np.isnan(summary.hyperparameters["learning_rate"].values[3:]).all()
    assert [summary.sizes.called(value) for value in summary.sizes.values] == ["cnn (203)"] * 3 + [
        "mlp (1,210)"
    ] * 2


def test_codes_that_have_no_name_are_left_out(made):
    odd = made.population(
        made.cnn(),
        networks=3,
        hyperparameters={"optimizer": np.array([0, 7, -1])},
        choices={"optimizer": ["sgd"]},
    )
    values = Summary.of({"cnn": odd}).hyperparameters["optimizer"].values
    np.testing.assert_array_equal(values, [0, np.nan, np.nan])


@pytest.mark.parametrize("choices", [None, ["sgd"], {"optimizer": "sgd"}, {"optimizer": 3}])
def test_foreign_protocols_do_no_harm(made, choices):
    population = made.population(made.cnn(), networks=3)
    strange = replace(population, protocol={"choices": choices})
    optimizer = Summary.of({"cnn": strange}).hyperparameters["optimizer"]
    assert [optimizer.called(value) for value in optimizer.distinct] == ["0", "1", "2"]


def test_who_has_diverged(made):
    population = made.population(made.cnn(), networks=6, diverged=[2])
    population.metrics["test_accuracy"][5 * 4 + 3] = np.nan
    population.metrics["test_accuracy"][0] = np.nan  # not at the end
    np.testing.assert_array_equal(np.flatnonzero(Summary.of({"cnn": population}).diverged), [2, 5])


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (np.geomspace(1e-4, 1e-1, 60), "log"),
        (np.linspace(1e-4, 1e-1, 60), "linear"),  # its ends say nothing of how it is spread
        (np.geomspace(1, 29, 60), "linear"),
        (np.geomspace(1, 31, 60), "log"),
        (np.r_[0.0, np.geomspace(1e-6, 1e-2, 60)], "symlog"),
        (np.r_[-1.0, np.geomspace(1e-6, 1e-2, 60)], "linear"),
        (np.array([1e-4, 1e-3, 1e-2, np.nan]), "values"),
    ],
)
def test_axes_follow_the_values(values, scale):
    assert Variable("x", values).scale == scale


def test_a_seed_is_no_variable(made):
    numbered = made.population(made.cnn(), networks=40)
    assert "seed" not in {variable.name for variable in Summary.of({"cnn": numbered}).varying}
    few = replace(numbered, hyperparameters={"seed": np.arange(40) % 3})
    assert [variable.name for variable in Summary.of({"cnn": few}).varying] == ["seed"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(4970, "4,970"), (1e-5, "1e-5"), (0.001, "0.001"), (0.12345, "0.123"), (np.nan, "-"), (0, "0")],
)
def test_short_numbers(value, text):
    assert short(value) == text
