"""Filters of rows: against loops over rows and networks, and one sentence for whatever is not a filter."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightspace.errors import ConfigError
from weightspace.testing import tiny_zoo
from weightspace.zoo import SPLITS, rows_where

NETWORKS, CHECKPOINTS = 12, 4


def build():
    """Four checkpoints per network, in no order; the last network has one only, and some metrics are missing."""
    generator = np.random.default_rng(0)
    inr = tiny_zoo(networks=NETWORKS, views=1)["inr"]
    network = np.repeat(np.arange(NETWORKS), CHECKPOINTS)[: -CHECKPOINTS + 1].astype(np.int64)
    epoch = np.tile([0, 1, 5, 20], NETWORKS)[: len(network)]
    order = generator.permutation(len(network))
    accuracy = generator.uniform(0.1, 1.0, len(network)).astype(np.float32)
    accuracy[[3, 8]] = np.nan
    return replace(
        inr,
        weights=np.zeros((len(network), inr.spec.num_parameters), np.float32),
        network=network[order],
        step=100 * epoch[order].astype(np.int64),
        metrics={
            "epoch": epoch[order].astype(np.float32),
            "test_accuracy": accuracy,
            "diverged": generator.integers(0, 2, len(network)).astype(np.float32),
            "top 5": accuracy,
            "seed": np.arange(len(network), dtype=np.float32),
        },
        hyperparameters={
            "optimizer": np.arange(NETWORKS, dtype=np.int64) % 3,
            "learning_rate": np.repeat(np.float32([0.1, 0.01, 0.003]), 4),
            "seed": np.arange(NETWORKS, dtype=np.int64) + 7,
        },
        labels={"copy": np.arange(NETWORKS, dtype=np.int64) // 6},
        protocol={"choices": {"optimizer": ["sgd", "adam", "rmsprop"]}},
    )


POPULATION = build()


def lines():
    """The rows as a user would write them down."""
    p = POPULATION
    for row in range(p.rows):
        n = p.network[row]
        yield {
            "step": int(p.step[row]),
            "network": int(n),
            "source": int(p.source[n]),
            "split": SPLITS[p.split[n]],
            "optimizer": ["sgd", "adam", "rmsprop"][p.hyperparameters["optimizer"][n]],
            "learning_rate": p.hyperparameters["learning_rate"][n],
            "copy": int(p.labels["copy"][n]),
            "epoch": float(p.metrics["epoch"][row]),
            "accuracy": p.metrics["test_accuracy"][row],
            "diverged": bool(p.metrics["diverged"][row]),
            "row": row,
        }


ROWS = list(lines())
LAST = {n: max(r["epoch"] for r in ROWS if r["network"] == n) for n in range(NETWORKS)}
FIRST = {n: min(r["epoch"] for r in ROWS if r["network"] == n) for n in range(NETWORKS)}
BEST = {
    n: max((r["accuracy"] for r in ROWS if r["network"] == n and r["accuracy"] == r["accuracy"]), default=9)
    for n in range(NETWORKS)
}
OF_LAST = {
    n: next(r["accuracy"] for r in ROWS if r["network"] == n and r["epoch"] == LAST[n])
    for n in range(NETWORKS)
}


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        (
            "test_accuracy > 0.3 and epoch == last",
            lambda r: r["accuracy"] > 0.3 and r["epoch"] == LAST[r["network"]],
        ),
        ("step == first", lambda r: r["epoch"] == FIRST[r["network"]]),
        ("last == epoch", lambda r: r["epoch"] == LAST[r["network"]]),
        ("test_accuracy == max", lambda r: r["accuracy"] == BEST[r["network"]]),
        ("test_accuracy >= last", lambda r: r["accuracy"] >= OF_LAST[r["network"]]),
        ("epoch >= last - 15", lambda r: r["epoch"] >= LAST[r["network"]] - 15),
        ("first < epoch < last", lambda r: FIRST[r["network"]] < r["epoch"] < LAST[r["network"]]),
        ("epoch in [1, last]", lambda r: r["epoch"] in (1, LAST[r["network"]])),
        ("1 - test_accuracy <= 0.5", lambda r: 1 - r["accuracy"] <= 0.5),
        ("not test_accuracy > 0.5", lambda r: r["accuracy"] <= 0.5),
        ("test_accuracy != 0.5", lambda r: r["accuracy"] == r["accuracy"]),
        ("not (test_accuracy > 0.5 or diverged)", lambda r: r["accuracy"] <= 0.5 and not r["diverged"]),
        ("test_accuracy > 0.5 or diverged", lambda r: r["accuracy"] > 0.5 or r["diverged"]),
        ("not diverged", lambda r: not r["diverged"]),
        ("optimizer == 'adam'", lambda r: r["optimizer"] == "adam"),
        ("'adam' != optimizer", lambda r: r["optimizer"] != "adam"),
        ("optimizer in ['sgd', 'adam']", lambda r: r["optimizer"] in ("sgd", "adam")),
        ("optimizer not in ('sgd', 'adam')", lambda r: r["optimizer"] == "rmsprop"),
        ("optimizer == 2", lambda r: r["optimizer"] == "rmsprop"),
        ("learning_rate == 0.003", lambda r: r["learning_rate"] == np.float32(0.003)),
        ("learning_rate <= 0.1", lambda _: True),
        ("0.003 < learning_rate < 0.1", lambda r: r["learning_rate"] == np.float32(0.01)),
        ("split == 'train'", lambda r: r["split"] == "train"),
        ("split in ['val', 'test'] and copy", lambda r: r["split"] != "train" and r["copy"] == 1),
        ("source * 2 + step / 100 > 10", lambda r: r["source"] * 2 + r["step"] / 100 > 10),
        ("metrics.epoch == 5 and labels.copy == 0", lambda r: r["epoch"] == 5 and r["copy"] == 0),
        ("metrics['top 5'] < 0.4", lambda r: r["accuracy"] < 0.4),
        ("metrics.seed == 11", lambda r: r["row"] == 11),
        ("hyperparameters.seed == 11", lambda r: r["network"] == 4),
        ("network == 0 and view == 0 or network == 3", lambda r: r["network"] in (0, 3)),
        ("-step <= -500", lambda r: r["step"] >= 500),
        ("  epoch\n== 5", lambda r: r["epoch"] == 5),
        ("diverged == True", lambda r: r["diverged"]),
        ("2 > 1", lambda _: True),
    ],
)
def test_expressions_mean_what_they_say(expression, holds):
    expected = [row for row, line in enumerate(ROWS) if holds(line)]
    assert expected
    assert rows_where(POPULATION, expression).tolist() == expected


@given(
    st.recursive(
        st.sampled_from(["test_accuracy > 0.5", "epoch == last", "diverged", "optimizer == 'sgd'"]),
        lambda parts: st.one_of(
            parts.map(lambda part: f"not ({part})"),
            st.tuples(parts, st.sampled_from(["and", "or"]), parts).map(
                lambda p: f"({p[0]}) {p[1]} ({p[2]})"
            ),
        ),
        max_leaves=8,
    )
)
def test_where_nothing_is_missing_the_logic_is_pythons(expression):
    known = {
        "test_accuracy > 0.5": lambda r: r["accuracy"] > 0.5,
        "epoch == last": lambda r: r["epoch"] == LAST[r["network"]],
        "diverged": lambda r: r["diverged"],
        "optimizer == 'sgd'": lambda r: r["optimizer"] == "sgd",
    }
    found = set(rows_where(POPULATION, expression, required=False).tolist())
    opposite = set(rows_where(POPULATION, f"not ({expression})", required=False).tolist())
    assert not found & opposite
    for row, line in enumerate(ROWS):
        if line["accuracy"] == line["accuracy"]:
            code = expression
            for part, holds in known.items():
                code = code.replace(part, str(bool(holds(line))))
            assert (row in found) == eval(code)
            assert (row in found) != (row in opposite)


def test_a_network_without_any_value_has_no_best():
    accuracy = POPULATION.metrics["test_accuracy"].copy()
    accuracy[POPULATION.network == 2] = np.nan
    population = replace(POPULATION, metrics={**POPULATION.metrics, "test_accuracy": accuracy})
    best = rows_where(population, "test_accuracy == max")
    assert sorted(population.network[best]) == [n for n in range(NETWORKS) if n != 2]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            "accuracy > 0.3",
            "expected one of epoch, test_accuracy, diverged, top 5, seed, optimizer, learning_rate, copy, step, network, "
            "source, view, split, found 'accuracy'",
        ),
        ("metrics.loss > 1", "expected one of epoch, test_accuracy, diverged, top 5, seed, found 'loss'"),
        (
            "seed == 3",
            "metrics and hyperparameters both have 'seed', write metrics.seed or hyperparameters.seed",
        ),
        ("optimizer == 'adamw'", "expected one of sgd, adam, rmsprop, found 'adamw'"),
        ("optimizer < 'adam'", "names have no order, expected == or != and not <"),
        ("epoch == 'adam'", "compared with numbers, expected one, found \"'adam'\""),
        ("'a' == 'b'", "expected the name of a column on one side"),
        ("epoch = 3", "'epoch = 3' is no expression: "),
        ("epoch >", "'epoch >' is no expression: invalid syntax"),
        ("", "no expression"),
        ("   ", "no expression"),
        ("epoch\0", "no expression"),
        ("epoch > 1 & diverged", "expected `and` and `or` for conditions"),
        (
            "epoch == 1 or last",
            "last is the network's own value of what it is compared with, as in `epoch == last`",
        ),
        ("last == 3", "last is the network's own value of what it is compared with"),
        ("first < last", "cannot tell of what first and last are"),
        ("epoch in 3", "expected a list such as [1, 2] after `in`, found '3'"),
        ("epoch in []", "expected a list such as [1, 2] after `in`"),
        ("epoch is 3", "expected == and not `is`"),
        ("(epoch > 1) + 1 > 2", "expected a number, found 'epoch > 1'"),
        ("'adam'", "expected a condition or a number"),
        (
            "max(epoch) > 3",
            "expected names, numbers, comparisons, and, or, not, in, + - * /, found 'max(epoch)'",
        ),
        ("__import__('os').system('true')", "expected names, numbers"),
        (
            "epoch.real > 1",
            "expected one of metrics, hyperparameters, labels before the name, found 'epoch.real'",
        ),
        ("().__class__ == 1", "expected one of metrics, hyperparameters, labels before the name"),
        ("metrics[0] > 1", "expected a name in quotes between the brackets"),
        ("[r for r in step]", "expected names, numbers"),
        ("epoch ** 9 > 1", "expected names, numbers, comparisons"),
        ("1 / 0 > 1", "division by zero"),
        ("epoch > 1" + "0" * 400, "expected a number below 2**63"),
        ("not " * 5000 + "diverged", "nested too deeply"),
        (" + ".join(["epoch"] * 5000) + " > 1", "nested too deeply"),
        ("test_accuracy > 2", "'test_accuracy > 2' holds for none of 45 rows of 12 networks"),
    ],
)
def test_mistakes_are_one_sentence(expression, message):
    with pytest.raises(ConfigError, match="^where: .*" + re.escape(message)) as error:
        rows_where(POPULATION, expression)
    assert "\n" not in str(error.value)


def test_nothing_left_may_be_asked_for():
    assert rows_where(POPULATION, "epoch > 99", required=False).tolist() == []


def test_codes_without_names_are_numbers():
    bare = replace(POPULATION, protocol={})
    assert (
        rows_where(bare, "optimizer == 1").tolist() == rows_where(POPULATION, "optimizer == 'adam'").tolist()
    )
    with pytest.raises(ConfigError, match="compared with numbers, expected one"):
        rows_where(bare, "optimizer == 'adam'")
