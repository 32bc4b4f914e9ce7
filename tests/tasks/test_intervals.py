"""Confidence intervals: against resamples that are written out, and whether they hold the truth as often as they say."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from weightspace.tasks import Regression, RegressionOptions, _bootstrap
from weightspace.tasks._bootstrap import bootstrap_intervals

NAMES = ("r2", "kendall_tau", "mean_absolute_error")


def planted(units, each, seed=0, noise=0.5, ties=False):
    """Predictions whose errors are shared by the rows of a unit, in no order."""
    generator = np.random.default_rng(seed)
    unit = generator.permutation(np.repeat(np.arange(units), each))
    true = generator.normal(size=units)[unit] + 0.1 * generator.normal(size=len(unit))
    found = true + noise * generator.normal(size=units)[unit]
    return (found.round(1), true.round(1), unit) if ties else (found, true, unit)


def written_out(found, true, unit, resamples, seed=0):
    """The scores of the same resamples, each with all of its rows."""
    units = np.unique(unit)
    counts = np.random.default_rng(seed).multinomial(
        len(units), np.full(len(units), 1 / len(units)), size=resamples
    )
    scores = []
    for drawn in counts:
        rows = np.concatenate(
            [np.flatnonzero(unit == u) for u, count in zip(units, drawn, strict=True) for _ in range(count)]
        )
        f, t = found[rows], true[rows]
        r2 = 1 - ((f - t) ** 2).sum() / ((t - t.mean()) ** 2).sum()
        scores.append((r2, kendalltau(f, t).statistic, np.abs(f - t).mean()))
    return {
        name: tuple(np.quantile(values, [0.025, 0.975]))
        for name, values in zip(NAMES, zip(*scores, strict=True), strict=True)
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("units", "each"), [(12, 5), (40, 1)])
def test_as_if_resamples_were_written_out(units, each, ties, monkeypatch):
    monkeypatch.setattr(_bootstrap, "PAIRS", 100)  # several blocks
    monkeypatch.setattr(_bootstrap, "CELLS", 500)
    found, true, unit = planted(units, each, ties=ties)
    expected = written_out(found, true, unit, 60)
    intervals = bootstrap_intervals(found, true, unit, resamples=60)
    assert set(intervals) == set(NAMES)
    for name in NAMES:
        assert intervals[name] == pytest.approx(expected[name], rel=1e-9), name
        assert intervals[name][0] < intervals[name][1]


def test_of_many_units_the_first_order_of_tau_is_enough(monkeypatch):
    found, true, unit = planted(600, 2)
    exact = bootstrap_intervals(found, true, unit)
    monkeypatch.setattr(_bootstrap, "EXACT_UNITS", 10)
    first_order = bootstrap_intervals(found, true, unit)
    width = exact["kendall_tau"][1] - exact["kendall_tau"][0]
    assert first_order["kendall_tau"] == pytest.approx(exact["kendall_tau"], abs=0.05 * width)
    assert first_order["r2"] == exact["r2"]


def test_checkpoints_of_a_network_are_no_evidence_of_their_own():
    """Ten equal rows per network leave the interval as wide as it was; rows by themselves would narrow it threefold."""
    found, true, unit = planted(60, 1)
    alone = bootstrap_intervals(found, true, unit)
    repeated = [np.repeat(values, 10) for values in (found, true, unit)]
    for name in ("r2", "mean_absolute_error"):
        assert bootstrap_intervals(*repeated)[name] == pytest.approx(alone[name], rel=1e-9)
    low, high = bootstrap_intervals(repeated[0], repeated[1], np.arange(600))["mean_absolute_error"]
    before = alone["mean_absolute_error"]
    assert high - low < 0.45 * (before[1] - before[0])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """The mean absolute error of a normal error is known; 100 networks of 3 checkpoints each, 200 times over."""
    truth, held = 0.5 * np.sqrt(2 / np.pi), 0
    for seed in range(200):
        low, high = bootstrap_intervals(*planted(100, 3, seed=seed), resamples=200)["mean_absolute_error"]
        held += low <= truth <= high
    assert 0.88 < held / 200 < 0.99


def test_seeds_and_too_few_networks():
    data = planted(20, 2)
    assert bootstrap_intervals(*data) == bootstrap_intervals(*data)
    assert bootstrap_intervals(*data) != bootstrap_intervals(*data, seed=1)
    assert np.isnan(list(bootstrap_intervals(np.ones(4), np.arange(4.0), np.zeros(4)).values())).all()
    equal = bootstrap_intervals(np.zeros(9), np.arange(9.0), np.arange(9))
    assert np.isnan(equal["kendall_tau"]).all(), "equal predictions have no tau"
    assert np.isfinite(equal["r2"]).all()


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_intervals_of_the_task_are_in_the_units_of_its_scores(loss):
    found, true, unit = (torch.from_numpy(values) for values in planted(50, 2))
    task = Regression(3.0, 2.0) if loss == "mse" else Regression(0.0, 1.0, RegressionOptions(loss="bce"))
    targets = true.float() if loss == "mse" else true.sigmoid().float()
    scores = task.scores(found[:, None].float(), targets)
    intervals = task.intervals(found[:, None].float(), targets, unit.numpy())
    for name in NAMES:
        low, high = intervals[name]
        assert low < scores[name] < high
