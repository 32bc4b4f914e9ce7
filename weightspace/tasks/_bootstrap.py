"""Confidence intervals of scores of predicted numbers: what other networks of the same kind would have given."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Shaped

RESAMPLES, LEVEL = 1000, 0.95
EXACT_UNITS = 2048  # above, only what is linear in the counts of a resample: 32 MB of pairs of units at most
PAIRS, CELLS = 2**22, 2**22  # pairs of rows, and counts of rows, that are held at once

Numbers = Float[np.ndarray, "rows"]


def bootstrap_intervals(
    found: Numbers,
    true: Numbers,
    unit: Shaped[np.ndarray, "rows"],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of R2, Kendall's tau (b) and the mean absolute error.

    What is drawn with replacement are units (networks), each with all of its rows, because checkpoints of one network
    are alike. No resample is ever written out: R2 and the error are sums over units, tau a quadratic form in how often
    each unit was drawn. Time grows with the square of the number of rows (10,000 rows take about a second). Above 2048
    units the quadratic form is taken to first order, which changes intervals by one part in so many.

    Args:
        found: predictions.
        true: what was to be predicted.
        unit: which rows belong together: any values.
        resamples: how many.
        level: share of them that an interval holds.
        seed: of the draws.

    Returns:
        (low, high) of ``r2``, ``kendall_tau`` and ``mean_absolute_error``; NaN with fewer than two units.

    Reference:
        Efron 1979, "Bootstrap Methods: Another Look at the Jackknife"; of clusters: Davison and Hinkley 1997,
        "Bootstrap Methods and their Application", section 3.8.

    Example:
        >>> true = np.arange(50.0)
        >>> intervals = bootstrap_intervals(true + np.tile([-1.0, 1.0], 25), true, np.arange(50))
        >>> intervals["mean_absolute_error"]
        (1.0, 1.0)
    """
    _, number = np.unique(unit, return_inverse=True)
    order = np.argsort(number, kind="stable")
    number, found, true = number[order], found[order], true[order]
    units = int(number[-1]) + 1 if len(number) else 0
    if units < 2:
        return dict.fromkeys(("r2", "kendall_tau", "mean_absolute_error"), (float("nan"), float("nan")))
    counts = (
        np.random.default_rng(seed)
        .multinomial(units, np.full(units, 1 / units), size=resamples)
        .astype(float)
    )
    r2, error = _sums(found, true, number, counts)
    scores = {"r2": r2, "kendall_tau": _taus(found, true, number, counts), "mean_absolute_error": error}
    tails = [(1 - level) / 2, (1 + level) / 2]
    return {name: _between(values, tails) for name, values in scores.items()}


def _between(values: np.ndarray, tails: list[float]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, tails)
    return float(low), float(high)


def _sums(
    found: np.ndarray, true: np.ndarray, number: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """R2 and the mean absolute error of every resample, (resamples,) each."""
    centred, error = true - true.mean(), found - true
    columns = np.stack([np.ones_like(true), centred, centred**2, error**2, np.abs(error)], axis=1)
    rows, first, second, squares, absolute = (counts @ np.add.reduceat(columns, _starts(number), axis=0)).T
    spread = second - first**2 / rows
    with np.errstate(divide="ignore", invalid="ignore"):  # resamples whose targets are all equal have no R2
        return np.where(spread > 1e-9 * second, 1 - squares / spread, np.nan), absolute / rows


def _taus(found: np.ndarray, true: np.ndarray, number: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau (b) of every resample, (resamples,)."""
    ranks = [np.unique(values, return_inverse=True)[1].astype(np.int32) for values in (found, true)]
    pairs, totals = _concordance(ranks[0], ranks[1], number, keep=counts.shape[1] <= EXACT_UNITS)
    agreeing = ((counts @ pairs) * counts).sum(1) if pairs.size else 2 * counts @ totals - totals.sum()
    differing = [_differing(rank, number, counts) for rank in ranks]
    with np.errstate(divide="ignore", invalid="ignore"):
        taus: np.ndarray = agreeing / np.sqrt(differing[0] * differing[1])
    return taus


def _concordance(
    found: np.ndarray, true: np.ndarray, number: np.ndarray, *, keep: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows in order minus pairs out of order, between units, (units, units), and of each, (units,).

    The first is empty unless it is to be kept.
    """
    starts, units = _starts(number), int(number[-1]) + 1
    pairs, totals = np.zeros((units, units) if keep else (0, 0)), np.zeros(units)
    size = max(1, PAIRS // len(number))
    for at in range(0, len(number), size):
        rows = slice(at, at + size)
        signs = np.sign(found[rows, None] - found) * np.sign(true[rows, None] - true)
        with_units = np.add.reduceat(signs, starts, axis=1)
        np.add.at(totals, number[rows], with_units.sum(1))
        if keep:
            np.add.at(pairs, number[rows], with_units)
    return pairs, totals


def _differing(rank: np.ndarray, number: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ordered pairs of rows with different ranks in every resample, (resamples,)."""
    order = np.argsort(rank, kind="stable")
    starts, owner = _starts(rank[order]), number[order]
    found = []
    size = max(1, CELLS // len(rank))
    for at in range(0, len(counts), size):
        alike = np.add.reduceat(counts[at : at + size, owner], starts, axis=1)
        found.append(alike.sum(1) ** 2 - (alike**2).sum(1))
    return np.concatenate(found)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
