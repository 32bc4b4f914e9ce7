"""Distributions in recipes: what they draw, that shards do not matter, how they are written, and mistakes."""

import copy
import hashlib
import json
import pickle
from typing import Annotated, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from scipy.stats import chisquare, kstest

from weightspace.datagen._distributions import FORMS, Distribution, keyed_uniform

DRAWS = 10_000


class Training(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: Distribution[float] = Field(Distribution.constant(5e-4), gt=0, le=1)
    decay: Distribution[Annotated[float, Field(ge=0, lt=1)]] = Distribution.constant(0.0)
    batch: Distribution[int] = Field(Distribution.constant(64), ge=1)
    activation: Distribution[Literal["relu", "tanh"]] = Distribution.constant("relu")
    hidden: Distribution[tuple[int, ...]] = Distribution.constant((32, 32))
    target: Distribution[PositiveFloat | None] = Distribution.constant(40.0)
    residual: Distribution[bool] = Distribution.constant(False)


def kolmogorov_smirnov(values: np.ndarray, low: float, high: float) -> float:
    return kstest(values, "uniform", args=(low, high - low)).pvalue


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("ends", [(-2.0, 5.0), (0.0, 1e-6), (1e300, 1.7e308)])
def test_uniform_values_fill_their_range_evenly(ends, seed):
    values = Distribution("uniform", ends).sample("x", seed, DRAWS)
    assert values.dtype == np.float64
    assert ends[0] <= values.min()
    assert values.max() <= ends[1]
    assert kolmogorov_smirnov(values / ends[1], ends[0] / ends[1], 1.0) > 0.01


@pytest.mark.parametrize("seed", [0, 3])
def test_log_uniform_values_have_uniform_logarithms(seed):
    values = Distribution("log_uniform", (1e-5, 1e-1)).sample("learning_rate", seed, DRAWS)
    assert 1e-5 <= values.min() < 1.01e-5
    assert 0.099 < values.max() <= 1e-1
    assert kolmogorov_smirnov(np.log10(values), -5, -1) > 0.01


def test_integers_include_both_ends_and_are_equally_frequent():
    values = Distribution("integer", (-1, 5)).sample("depth", 0, DRAWS)
    assert values.dtype == np.int64
    found, counts = np.unique(values, return_counts=True)
    assert found.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert chisquare(counts).pvalue > 0.01


def test_large_integers_stay_within_their_ends():
    top = 2**52 - 1
    values = Distribution("integer", (0, top)).sample("x", 0, DRAWS)
    assert values.min() >= 0
    assert values.max() <= top
    assert kolmogorov_smirnov(values / top, 0, 1) > 0.01


def test_choices_are_equally_frequent_and_repeated_ones_weigh_more():
    values = Distribution("choice", ("relu", "tanh", "sine")).sample("activation", 0, DRAWS)
    names, counts = np.unique(values, return_counts=True)
    assert names.tolist() == ["relu", "sine", "tanh"]
    assert chisquare(counts).pvalue > 0.01
    twice = Distribution("choice", (1, 1, 2)).sample("x", 0, DRAWS)
    assert chisquare(np.bincount(twice)[1:], [DRAWS * 2 / 3, DRAWS / 3]).pvalue > 0.01


@pytest.mark.parametrize(
    ("values", "dtype"),
    [((1, 2), np.int64), ((1, 2.5), np.float64), ((True, False), np.bool_), ((None, 2.0), object)],
)
def test_samples_have_the_type_of_the_values(values, dtype):
    drawn = Distribution("choice", values).sample("x", 0, 50)
    assert drawn.dtype == dtype
    assert set(drawn.tolist()) == set(values)


def test_structured_choices_are_drawn_whole_and_by_place():
    shapes = Distribution("choice", ((16, 16), (32,), (8, 8)))
    drawn, places = shapes.sample("hidden", 0, 100), shapes.places("hidden", 0, 100)
    assert drawn.shape == (100,)
    assert [shapes.values[place] for place in places] == drawn.tolist()
    assert set(drawn.tolist()) == set(shapes.values)
    with pytest.raises(ValueError, match="depth: expected a constant or a choice, found integer"):
        Distribution("integer", (1, 2)).places("depth", 0, 3)


def test_constants_are_the_same_for_every_network():
    assert Distribution.constant(0.5).sample("x", 0, 3).tolist() == [0.5, 0.5, 0.5]
    assert Distribution.constant("relu").sample("x", 0, 2).tolist() == ["relu", "relu"]
    assert Distribution.constant(2).sample("x", 0, 0).shape == (0,)


DISTRIBUTIONS = (
    Distribution("uniform", (0.0, 1.0)),
    Distribution("log_uniform", (1e-4, 1e-1)),
    Distribution("integer", (0, 1000)),
    Distribution("choice", tuple(range(1000))),
)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda each: each.kind)
@given(st.lists(st.integers(1, 37), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_shards_and_the_number_of_networks_change_nothing(distribution, lengths, random):
    whole = distribution.sample("learning_rate", 7, 1000)
    stops = np.cumsum(lengths)
    shards = [
        distribution.sample("learning_rate", 7, np.arange(stop - length, stop))
        for length, stop in zip(lengths, stops, strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(shards), whole[: stops[-1]])
    np.testing.assert_array_equal(distribution.sample("learning_rate", 7, int(stops[-1])), whole[: stops[-1]])
    some = np.array(random.sample(range(1000), 20))
    np.testing.assert_array_equal(distribution.sample("learning_rate", 7, some), whole[some])


def test_a_shard_far_into_the_stream_costs_only_itself():
    far = np.arange(2**50 + 3, 2**50 + 13)
    values = keyed_uniform("x", 1, far)
    assert len(set(values.tolist())) == 10
    np.testing.assert_array_equal(keyed_uniform("x", 1, far[4:]), values[4:])
    assert keyed_uniform("x", 1, np.empty(0, np.int64)).shape == (0,)


def test_fields_and_seeds_are_drawn_independently():
    streams = [
        keyed_uniform("a", 0, DRAWS),
        keyed_uniform("b", 0, DRAWS),
        keyed_uniform("a", 1, DRAWS),
        keyed_uniform("a", 2**63 - 1, DRAWS),
    ]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 4 / DRAWS**0.5
    lagged = np.corrcoef(streams[0][:-1], streams[0][1:])[0, 1]
    assert abs(lagged) < 4 / DRAWS**0.5


def test_what_is_drawn_is_recorded_here():
    """The values of released zoos depend on these: they may never change."""
    expected = [0.1556480726729812, 0.9616193148313621, 0.303036677496902]
    assert keyed_uniform("learning_rate", 0, 3).tolist() == expected


def test_the_first_value_is_the_first_word_of_philox_by_hand():
    stream = int.from_bytes(hashlib.sha256(b"x").digest()[:8], "little")
    word = int(np.random.Philox(key=np.array([5, stream], np.uint64)).random_raw())
    assert keyed_uniform("x", 5, 1)[0] == (word >> 11) / 2**53


WRITTEN = {
    "learning_rate": [0.1, {"choice": [0.1, 0.2]}, {"uniform": [0.1, 0.2]}, {"log_uniform": [1e-4, 1.0]}],
    "decay": [0.0, {"uniform": [0.0, 0.5]}],
    "batch": [8, {"choice": [8, 16]}, {"integer": [1, 64]}],
    "activation": ["tanh", {"choice": ["relu", "tanh"]}],
    "hidden": [[16], {"choice": [[16], [8, 8]]}],
    "target": [None, 3.0, {"choice": [None, 30.0]}, {"uniform": [30.0, 40.0]}],
    "residual": [True, {"choice": [True, False]}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRITTEN for value in WRITTEN[name]])
def test_a_dump_is_what_was_written(name, value):
    training = Training.model_validate({name: value})
    dumped = training.model_dump(mode="json")
    assert dumped[name] == value
    assert json.loads(training.model_dump_json())[name] == value
    assert Training.model_validate(dumped) == training
    assert Training.model_validate(training.model_dump()) == training
    assert Training.model_validate_json(training.model_dump_json()) == training
    assert Training.model_validate(dict(training)) == training, "distributions themselves are accepted"
    assert getattr(training, name).is_constant == (not isinstance(value, dict))


def test_defaults_are_constants():
    assert Training().learning_rate == Distribution.constant(5e-4)
    assert Training().model_dump()["learning_rate"] == 5e-4
    assert hash(Training()) == hash(Training.model_validate({}))
    assert "a value, or one of {choice" in str(Training.model_json_schema()["properties"]["batch"])


def test_distributions_print_copy_and_compare():
    rate = Distribution("log_uniform", (1e-4, 0.1))
    assert str(rate) == "log_uniform [0.0001, 0.1]"
    assert str(Distribution.constant(3)) == "3"
    assert repr(rate) == "Distribution('log_uniform', (0.0001, 0.1))"
    assert pickle.loads(pickle.dumps(rate)) == copy.deepcopy(rate) == rate
    assert rate != Distribution("uniform", (1e-4, 0.1))
    assert rate != 3
    assert rate > 0
    assert rate >= 1e-4
    assert rate < 0.2
    assert rate <= 0.1
    assert not rate > 1e-4
    assert not rate < 0.1
    with pytest.raises(AttributeError):
        rate.kind = "uniform"


MISTAKES = {
    "a constant out of range": ({"learning_rate": 0}, "learning_rate", "Input should be greater than 0"),
    "an end out of range": (
        {"learning_rate": {"uniform": [0, 1]}},
        "learning_rate",
        "Input should be greater than 0",
    ),
    "the other end out of range": (
        {"learning_rate": {"log_uniform": [0.1, 2]}},
        "learning_rate",
        "Input should be less than or equal to 1",
    ),
    "one choice out of range": (
        {"batch": {"choice": [4, 0]}},
        "batch",
        "Input should be greater than or equal to 1",
    ),
    "an end out of the type's range": (
        {"decay": {"uniform": [0, 1]}},
        "decay.uniform.1",
        "Input should be less than 1",
    ),
    "ends in the wrong order": (
        {"learning_rate": {"uniform": [0.2, 0.1]}},
        "learning_rate",
        "uniform: expected low <= high, found [0.2, 0.1]",
    ),
    "logarithm of 0": (
        {"target": {"log_uniform": [0, 1]}},
        "target.log_uniform.0",
        "Input should be greater than 0",
    ),
    "an empty choice": (
        {"batch": {"choice": []}},
        "batch",
        "choice: expected at least one value, found none",
    ),
    "one end": ({"batch": {"integer": [1]}}, "batch", "integer: expected [low, high], found 1 values"),
    "a number for ends": ({"batch": {"integer": 3}}, "batch.integer", "Input should be a valid list"),
    "a fraction": (
        {"batch": {"integer": [1, 2.5]}},
        "batch.integer.1",
        "Input should be a valid integer, got a number with a fractional part",
    ),
    "fractions for a whole number": (
        {"batch": {"uniform": [1, 2]}},
        "batch",
        "expected a value or {choice: [VALUE, ...]} or {integer: [LOW, HIGH]}, found {'uniform': [1, 2]}",
    ),
    "a range of names": (
        {"activation": {"uniform": [0, 1]}},
        "activation",
        "expected a value or {choice: [VALUE, ...]}, found {'uniform': [0, 1]}",
    ),
    "an unknown name": (
        {"activation": {"choice": ["relu", "swish"]}},
        "activation.choice.1",
        "Input should be 'relu' or 'tanh'",
    ),
    "two kinds": (
        {"decay": {"uniform": [0, 1], "choice": [0]}},
        "decay",
        "expected a value or {choice: [VALUE, ...]} or {uniform: [LOW, HIGH]} or {log_uniform: [LOW, HIGH]}, "
        "found {'uniform': [0, 1], 'choice': [0]}",
    ),
    "no kind": ({"residual": {}}, "residual", "expected a value or {choice: [VALUE, ...]}, found {}"),
    "an unknown kind": (
        {"residual": {"normal": [0, 1]}},
        "residual",
        "expected a value or {choice: [VALUE, ...]}, found {'normal': [0, 1]}",
    ),
    "an infinite end": (
        {"target": {"uniform": [1, float("inf")]}},
        "target",
        "uniform: expected finite numbers, found inf",
    ),
    "an infinite constant": ({"target": float("inf")}, "target", "expected finite numbers, found inf"),
    "whole numbers too large": (
        {"batch": {"integer": [1, 2**60]}},
        "batch",
        f"integer: expected whole numbers below 2**52, found [1, {2**60}]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_field(mistake):
    document, field, message = MISTAKES[mistake]
    with pytest.raises(ValidationError) as caught:
        Training.model_validate(document)
    problem = caught.value.errors()[0]
    assert ".".join(str(part) for part in problem["loc"]) == field
    assert problem["msg"].removeprefix("Value error, ") == message


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("normal", (0, 1), "normal: expected a kind of constant, choice, uniform, log_uniform, integer"),
        ("log_uniform", (0.0, 1.0), "log_uniform: expected ends above 0, found 0.0"),
        ("uniform", ("a", "b"), "uniform: expected numbers, found "),
        ("integer", (0, 1.5), "integer: expected whole numbers below 2"),
        ("uniform", (float("nan"), 1.0), "uniform: expected finite numbers, found nan"),
    ],
)
def test_distributions_made_in_python_are_checked_too(kind, values, message):
    with pytest.raises(ValueError, match=message):
        Distribution(kind, values)


def test_a_bare_distribution_takes_every_kind():
    class Free(BaseModel):
        value: Distribution

    for kind in FORMS:
        assert Free.model_validate({"value": {kind: [1, 2]}}).value.kind == kind
