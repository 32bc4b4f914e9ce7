"""Sources that need no file: tables of scikit-learn, sums of sines, arithmetic questions."""

import operator
from functools import reduce

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn import datasets

from weightspace.datagen import parse_recipe
from weightspace.datagen._distributions import Distribution
from weightspace.datagen.sources import Sequences, Sines, Table
from weightspace.errors import DataError

# -- tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "features", "classes"),
    [("iris", 4, 3), ("wine", 13, 3), ("breast_cancer", 30, 2), ("diabetes", 10, None)],
)
def test_tables_are_standardised(name, features, classes):
    signals = Table(name=name).load(None)
    table = getattr(datasets, f"load_{name}")()
    assert (signals.grid, signals.channels, signals.classes) == ((), features, classes)
    assert signals.items.dtype == np.float32
    np.testing.assert_allclose(signals.items.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(signals.items.std(0), 1, rtol=1e-5)
    for column in range(features):
        assert np.corrcoef(signals.items[:, column], table.data[:, column])[0, 1] > 0.99999
    np.testing.assert_array_equal(signals.labels, table.target)
    assert signals.labels.dtype == (np.int64 if classes else np.float32)
    assert len(signals.class_names) == (classes or 0)


def test_a_table_may_be_cut_down():
    assert len(Table(name="iris", count=30).load(None)) == 30
    with pytest.raises(DataError, match="source table iris: count: the data set has 150 items, found 151"):
        Table(name="iris", count=151).load(None)


# -- sines -------------------------------------------------------------------------------------------------


def test_one_sine_is_that_of_its_label():
    signals = Sines(count=7, samples=100).load(None)
    assert (signals.items.shape, signals.grid, signals.channels) == ((7, 100), (100,), None)
    x = np.linspace(-np.pi, np.pi, 100)
    np.testing.assert_allclose(signals.items, np.sin(signals.labels[:, None] * x), atol=2e-5)
    assert signals.items.dtype == signals.labels.dtype == np.float32
    assert signals.labels.min() >= 0.5
    assert signals.labels.max() <= 10
    np.testing.assert_array_equal(signals.attributes["frequency_1"], signals.labels)
    assert (signals.attributes["amplitude_1"] == 1).all()
    assert (signals.attributes["phase_1"] == 0).all()


def test_mixtures_are_the_sums_of_their_labels():
    source = Sines(
        count=50,
        samples=64,
        components=3,
        amplitude=Distribution("log_uniform", (0.1, 2.0)),
        phase=Distribution("uniform", (0.0, 6.0)),
        seed=4,
    )
    signals, x = source.load(None), np.linspace(-np.pi, np.pi, 64)
    named = {name: values[:, None].astype(float) for name, values in signals.attributes.items()}
    expected = sum(
        named[f"amplitude_{k}"] * np.sin(named[f"frequency_{k}"] * x + named[f"phase_{k}"]) for k in (1, 2, 3)
    )
    np.testing.assert_allclose(signals.items, expected, atol=1e-4)
    frequencies = np.stack([signals.attributes[f"frequency_{k}"] for k in (1, 2, 3)])
    amplitudes = np.stack([signals.attributes[f"amplitude_{k}"] for k in (1, 2, 3)])
    assert (np.diff(frequencies, axis=0) >= 0).all(), "components in order of frequency"
    np.testing.assert_array_equal(signals.labels, frequencies[amplitudes.argmax(0), np.arange(50)])
    assert np.abs(np.corrcoef(amplitudes) - np.eye(3)).max() < 0.6, "components are drawn independently"


def test_sines_depend_on_the_seed_and_not_on_their_number():
    many, few, other = (Sines(count=count, seed=seed).load(None) for count, seed in ((9, 1), (4, 1), (4, 2)))
    np.testing.assert_array_equal(many.items[:4], few.items)
    assert not np.array_equal(few.items, other.items)


def test_frequencies_beyond_the_samples_are_refused():
    with pytest.raises(
        ValidationError, match=r"frequency: expected less than 4\.5 periods for 10 samples, found 10"
    ):
        Sines(samples=10)
    Sines(samples=10, frequency=Distribution("uniform", (1.0, 4.0)))


def test_a_recipe_with_sines_is_recorded_as_it_was_written():
    source = {"kind": "sines", "amplitude": {"uniform": [0.5, 1.0]}, "frequency": 3}
    resolved = parse_recipe({"name": "x", "source": source, "protocol": "dws"}).resolved()
    assert resolved["source"]["amplitude"] == {"uniform": [0.5, 1.0]}
    assert resolved["source"]["frequency"] == 3.0
    assert parse_recipe(resolved).resolved() == resolved


# -- sequences ---------------------------------------------------------------------------------------------


CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.mark.parametrize(("operation", "sign"), [("sum", "+"), ("difference", "-"), ("product", "*")])
@pytest.mark.parametrize(("terms", "digits"), [(2, 2), (3, 1), (1, 4)])
def test_answers_are_those_of_python(operation, sign, terms, digits):
    source = Sequences(count=300, operation=operation, terms=terms, digits=digits, modulus=7)
    signals = source.load(None)
    assert signals.items.shape == (300, terms * (digits + 1))
    assert (signals.items.dtype, signals.vocabulary, signals.classes) == (np.int64, 12, 7)
    assert source.alphabet == f"0123456789{sign}="
    for tokens, label, answer in zip(
        signals.items, signals.labels, signals.attributes["answer"], strict=True
    ):
        text = "".join(source.alphabet[token] for token in tokens)
        assert text.endswith("=")
        numbers = text[:-1].split(sign)
        assert [len(number) for number in numbers] == [digits] * terms
        expected = reduce(CALCULATE[sign], map(int, numbers))
        assert (answer, label) == (expected, expected % 7)


def test_no_question_is_asked_twice():
    signals = Sequences(count=10_000).load(None)
    assert len(np.unique(signals.items, axis=0)) == 10_000
    with pytest.raises(
        ValidationError, match="count: 2 numbers of 2 digits make 10000 questions, found 10001"
    ):
        Sequences(count=10_001)


def test_questions_depend_on_the_seed():
    first, again, other = (Sequences(count=50, seed=seed).load(None) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.items, again.items)
    assert not np.array_equal(first.items, other.items)


def test_long_questions_do_not_overflow():
    signals = Sequences(count=20, operation="product", terms=2, digits=9).load(None)
    for tokens, answer in zip(signals.items, signals.attributes["answer"], strict=True):
        left, right = ("".join(map(str, part)) for part in (tokens[:9], tokens[10:19]))
        assert int(left) * int(right) == answer
    with pytest.raises(ValidationError, match=r"digits: expected at most 18 in a question .*, found 20"):
        Sequences(terms=2, digits=10)
