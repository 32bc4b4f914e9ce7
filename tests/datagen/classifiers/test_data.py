"""What classifiers learn from: which items, in which split, and how they are prepared."""

import numpy as np
import pytest
import torch

from weightspace.datagen.classifiers import ClassifierRecipe
from weightspace.datagen.classifiers._data import classifier_data
from weightspace.datagen.sources import Digits, Sequences, Signals, Sines, Table
from weightspace.errors import RecipeError


def prepared(signals, seed=0, **options):
    recipe = ClassifierRecipe.model_validate(
        {
            "name": "test",
            "source": {"kind": "digits"},
            "data": options,
            "network": {"kind": "mlp"},
            "count": 4,
            "seed": seed,
        }
    )
    return classifier_data(recipe, recipe.data, signals)


def images(count=60, size=(5, 7), channels=3, classes=6, dtype=np.uint8, official=None, seed=0):
    """Images of which every pixel tells the item's number."""
    random = np.random.default_rng(seed)
    shape = (count, *size) if channels is None else (count, *size, channels)
    items = random.integers(0, 256, shape).astype(np.uint8)
    if dtype == np.float32:
        items = items.astype(np.float32) / 10
    return Signals(items, np.arange(count) % classes, official=official, channels=channels)


PLAIN = {"standardise": False}


def test_items_keep_their_classes_and_channels_come_first():
    signals = images()
    found = prepared(signals, **PLAIN)
    assert found.inputs.dtype == np.float32
    np.testing.assert_allclose(found.inputs, np.moveaxis(signals.items, -1, 1) / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, signals.labels)
    assert found.inputs.flags.c_contiguous
    assert (found.task.input_shape, found.task.classes, found.task.vocabulary) == ((3, 5, 7), 6, None)


def test_grey_images_have_one_channel():
    signals = images(channels=None)
    found = prepared(signals, **PLAIN)
    np.testing.assert_allclose(found.inputs, signals.items[:, None] / 255.0, rtol=1e-6)


def test_grey_is_the_mean_of_the_colours():
    signals = images()
    found = prepared(signals, grey=True, **PLAIN)
    np.testing.assert_allclose(found.inputs, signals.items.mean(-1)[:, None] / 255.0, rtol=1e-5)
    assert found.task.input_shape == (1, 5, 7)


def test_resizing():
    signals = images(dtype=np.float32)
    found = prepared(signals, size=(3, 4), **PLAIN)
    assert found.task.input_shape == (3, 3, 4)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(np.moveaxis(signals.items, -1, 1).copy()), (3, 4), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(found.inputs, expected.numpy(), rtol=1e-5)
    constant = Signals(np.full((20, 4, 4), 51, np.uint8), np.arange(20) % 2)
    np.testing.assert_allclose(prepared(constant, size=(9, 2), **PLAIN).inputs, 0.2, rtol=1e-6)
    np.testing.assert_array_equal(
        prepared(signals, size=(5, 7), **PLAIN).inputs, prepared(signals, **PLAIN).inputs
    )


@pytest.mark.parametrize("signals", [images(), images(channels=None), Table(name="wine").load(None)])
def test_training_items_have_mean_0_and_deviation_1(signals):
    found = prepared(signals)
    axes = (0, 2, 3) if found.inputs.ndim == 4 else (0,)
    seen = found.inputs[found.train].astype(np.float64)
    np.testing.assert_allclose(seen.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(seen.std(axes), 1, rtol=1e-5)
    others = found.inputs[np.r_[found.val, found.test]]
    assert np.abs(others.mean(axes)).max() > 1e-4, "all items were looked at"
    plain = prepared(signals, **PLAIN)
    mean, deviation = (
        np.array(found.preparation[name]).reshape(-1, *[1] * (found.inputs.ndim - 2))
        for name in ("mean", "standard_deviation")
    )
    np.testing.assert_allclose(found.inputs * deviation + mean, plain.inputs, atol=1e-5)


def test_a_constant_feature_is_not_divided_by_0():
    items = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    items[:, 1] = 7.0
    found = prepared(Signals(items, np.arange(30) % 2, channels=3))
    np.testing.assert_array_equal(found.inputs[:, 1], 0.0)
    assert found.task.input_shape == (3,)


def test_tokens_stay_tokens():
    signals = Sequences(count=50, digits=1).load(None)
    found = prepared(signals)
    np.testing.assert_array_equal(found.inputs, signals.items)
    assert found.inputs.dtype == np.int64
    assert (found.task.input_shape, found.task.classes, found.task.vocabulary) == ((4,), 10, 12)


def test_sampled_functions_are_sequences_of_one_feature():
    items = np.random.default_rng(0).normal(3, 2, size=(30, 8)).astype(np.float32)
    found = prepared(Signals(items, np.arange(30) % 3))
    assert found.task.input_shape == (8, 1)
    assert abs(found.inputs[found.train].mean()) < 1e-6


@pytest.mark.parametrize("count", [None, 40])
def test_the_random_split(count):
    signals = images(100)
    found = prepared(signals, count=count, val=0.2, test=0.3)
    total = count or 100
    assert [len(part) for part in (found.train, found.val, found.test)] == [
        total // 2,
        total // 5,
        3 * total // 10,
    ]
    together = np.concatenate([found.train, found.val, found.test])
    assert sorted(together) == list(range(total))
    assert not np.array_equal(found.train, np.sort(found.train))
    other = prepared(signals, seed=1, count=count, val=0.2, test=0.3)
    assert set(found.test.tolist()) != set(other.test.tolist())
    np.testing.assert_array_equal(found.train, prepared(signals, count=count, val=0.2, test=0.3).train)


def test_a_count_takes_items_at_random():
    signals = images(100, channels=None, size=(2, 2))
    found, other = prepared(signals, count=30, **PLAIN), prepared(signals, count=30, seed=1, **PLAIN)
    known = {
        tuple(item.ravel().tolist()): label for item, label in zip(signals.items, signals.labels, strict=True)
    }
    chosen = [tuple(np.round(item * 255).astype(int).ravel().tolist()) for item in found.inputs]
    assert len(set(chosen)) == 30
    assert [known[item] for item in chosen] == found.labels.tolist()
    assert not np.array_equal(found.inputs, other.inputs)


def test_a_few_items_have_all_classes_of_the_source():
    """Else the size of the networks' output would be a matter of chance."""
    signals = images(100, classes=25)
    found = prepared(signals, count=10)
    assert found.labels.max() < 24
    assert found.task.classes == 25


def test_the_official_split():
    official = (np.arange(60) >= 45).astype(np.uint8) * 2
    found = prepared(images(official=official), method="official", val=0.2)
    assert sorted(found.test) == list(range(45, 60))
    assert len(found.val) == 9
    assert sorted([*found.train, *found.val]) == list(range(45))


def test_the_first_of_a_split_are_no_selection():
    """Metrics are measured on the first so many: of items ordered by class these would be one class."""
    labels = np.repeat(np.arange(3), 50)
    items = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32)
    found = prepared(Signals(items, labels, channels=4), val=0.3, test=0.3)
    for part in (found.train, found.val, found.test):
        assert len(set(found.labels[part[:15]].tolist())) == 3


@pytest.mark.parametrize(
    ("signals", "options", "message"),
    [
        (Table(name="diabetes"), {}, "source: expected classes to learn, 'digits' has numbers as labels"),
        (Sines(count=20), {}, "source: expected classes to learn, 'digits' has numbers as labels"),
        (Digits(size=8), {"count": 1798}, "data.count: the source has 1797 items, found 1798"),
        (Digits(size=8), {"method": "official"}, "data.method: the source 'digits' has no official split"),
        (Digits(size=8), {"val": 0.5, "test": 0.5}, "data: val and test leave nothing to train on"),
        (Digits(size=8), {"count": 3, "val": 0.0, "test": 0.1}, "data: no items left in the test split of 3"),
        (
            Digits(size=8),
            {"count": 1, "val": 0.0, "test": 0.9},
            "data: no items left in the train split of 1",
        ),
        (Table(), {"size": (8, 8)}, r"data.size: expected images, found items of shape \[4\]"),
        (Table(), {"grey": True}, r"data.grey: expected images, found items of shape \[4\]"),
        (Sequences(count=20), {"grey": True}, r"data.grey: expected images, found items of shape \[6\]"),
    ],
)
def test_errors(signals, options, message):
    with pytest.raises(RecipeError, match=f"^recipe test: {message}"):
        prepared(signals.load(None), **options)


def test_items_without_labels():
    signals = Signals(np.zeros((20, 4, 4), np.uint8), np.empty((20, 0), np.int64))
    with pytest.raises(RecipeError, match="expected classes to learn, 'digits' has no labels"):
        prepared(signals)
