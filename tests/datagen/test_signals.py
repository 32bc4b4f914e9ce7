"""What a source returns: shapes and types, labels by name, parts of a data set."""

import numpy as np
import pytest

from weightspace.datagen.sources import Signals
from weightspace.errors import DataError

BYTES = np.arange(5 * 4 * 6, dtype=np.uint8).reshape(5, 4, 6)
LABELS = np.array([0, 2, 1, 2, 0])


def test_grey_images_are_what_they_were():
    signals = Signals(BYTES, LABELS)
    assert (signals.grid, signals.channels, signals.vocabulary, signals.official) == (
        (4, 6),
        None,
        None,
        None,
    )
    assert (len(signals), signals.classes) == (5, 3)
    np.testing.assert_array_equal(signals.values(np.array([4, 1])), BYTES[[4, 1]].astype(np.float32) / 255)


def test_channels_are_no_axis_of_the_grid():
    assert Signals(BYTES, LABELS, channels=6).grid == (4,)
    table = Signals(np.zeros((5, 7), np.float32), LABELS, channels=7)
    assert table.grid == ()


def test_floats_stand_for_themselves():
    items = np.linspace(-3, 300, 10, dtype=np.float32).reshape(5, 2)
    values = Signals(items, LABELS).values(np.array([0, 4]))
    np.testing.assert_array_equal(values, items[[0, 4]])
    assert values.dtype == np.float32


def test_tokens_have_no_values():
    signals = Signals(np.arange(10).reshape(5, 2), LABELS, vocabulary=10)
    with pytest.raises(DataError, match="signals: tokens have no values; a network embeds them"):
        signals.values(np.array([0]))


def test_labels_by_name():
    phase = np.ones(5, np.float32)
    signals = Signals(BYTES, LABELS, attributes={"phase": phase}, class_names=("a", "b", "c", "d"))
    assert list(signals.named_labels) == ["label", "phase"]
    assert signals.classes == 4
    target = Signals(BYTES, phase)
    assert (target.classes, list(target.named_labels)) == (None, ["label"])
    none = Signals(BYTES, np.empty((5, 0), np.int64), attributes={"phase": phase})
    assert (none.classes, list(none.named_labels)) == (None, ["phase"])


def test_a_subset_takes_all_that_belongs_to_its_items_and_grows_with_the_count():
    count = 200
    items = np.arange(count, dtype=np.float32)[:, None]
    labels, official = np.arange(count), (np.arange(count) % 3).astype(np.uint8)
    whole = Signals(items, labels, official, channels=1, attributes={"again": np.arange(count)})
    assert whole.subset(None, "here") is whole
    few, more = whole.subset(20, "here"), whole.subset(120, "here")
    for part in (few, more):
        np.testing.assert_array_equal(part.items[:, 0], part.labels)
        np.testing.assert_array_equal(part.labels, np.sort(part.labels))
        np.testing.assert_array_equal(part.attributes["again"], part.labels)
        np.testing.assert_array_equal(part.official, part.labels % 3)
    assert set(few.labels) < set(more.labels)
    assert np.median(more.labels) > 50, "a random part, not the beginning"
    assert whole.subset(200, "here").labels.tolist() == labels.tolist()
    with pytest.raises(DataError, match="here: count: the data set has 200 items, found 201"):
        whole.subset(201, "here")


MISTAKES = {
    "no items": (
        {"items": np.empty((0, 3), np.uint8)},
        r"expected items \(items, ...\), found shape \[0, 3\]",
    ),
    "one axis": ({"items": np.zeros(5, np.uint8)}, r"expected items \(items, ...\), found shape \[5\]"),
    "channels": ({"channels": 3}, "expected 3 channels on the last axis, found 6"),
    "type": ({"items": BYTES.astype(np.float64)}, "expected items of uint8 or float32, found float64"),
    "tokens of bytes": (
        {"vocabulary": 300},
        "expected tokens of int64 from 0 to 299, found uint8 from 0 to 119",
    ),
    "tokens beyond": (
        {"items": np.arange(10).reshape(5, 2), "vocabulary": 9},
        "expected tokens of int64 from 0 to 8, found int64 from 0 to 9",
    ),
    "labels": ({"labels": LABELS[:4]}, r"expected labels of shape \(5,\), as many as items, found \(4,\)"),
    "label type": ({"labels": LABELS.astype(np.int32)}, "expected label of int64 or float32, found int32"),
    "official": (
        {"official": np.zeros(6, np.uint8)},
        r"expected official of shape \(5,\), as many as items, found \(6,\)",
    ),
    "attribute": (
        {"attributes": {"phase": np.zeros((5, 2), np.float32)}},
        r"expected phase of shape \(5,\), as many as items, found \(5, 2\)",
    ),
    "attribute type": ({"attributes": {"a": np.zeros(5)}}, "expected a of int64 or float32, found float64"),
    "NaN": (
        {"labels": np.array([0, 1, np.nan, 3, 4], np.float32)},
        "label of item 2: expected a finite number, found nan",
    ),
    "a negative class": (
        {"labels": np.array([0, 1, -1, 0, 0])},
        "label of item 2: expected a class from 0, found -1",
    ),
    "a class without a name": (
        {"class_names": ("a", "b")},
        "label of item 1: expected a class from 0 to 1, found 2",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_arrays_that_do_not_belong_together(mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(DataError, match=f"^signals: {message}$"):
        Signals(**{"items": BYTES, "labels": LABELS, **changed})
