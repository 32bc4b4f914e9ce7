"""Pictures of zoos of classifiers: accuracies, learning curves, hyperparameters, first-layer filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from weightspace.nets import build
from weightspace.zoo._zoo import Population
from weightspace.zoo.pictures._panels import (
    cut,
    draw_against,
    draw_distribution,
    draw_empty,
    draw_lines,
    panels,
)
from weightspace.zoo.pictures._style import (
    colour_map,
    new_figure,
    numbered,
    scaled,
)
from weightspace.zoo.pictures._summary import Summary, Variable

WIDTH = 14.0  # inches
COLUMNS = 4
LINES = 120  # learning curves that are drawn
GRID = 60  # points of the median curve at most
TILES = 16  # filters of each network
FILTERS = 8  # networks whose filters are drawn
PER_ROW = 8

Curve = tuple[np.ndarray, np.ndarray]


def classifier_figure(summary: Summary, title: str, *, count: int | None = None, seed: int = 0) -> Any:
    """All pictures of a zoo of classifiers below one another.

    Args:
        summary: of populations with ``test_accuracy``.
        title: put before the numbers of networks.
        count: networks whose filters are drawn.
        seed: of the networks whose curves are drawn.
    """
    scattered = scatter_count(summary)
    filters = filter_rows(summary, count or FILTERS)
    heights = [3.4, scatter_height(scattered), filter_height(len(filters))]
    drawn = [height for height in heights if height]
    figure = new_figure(WIDTH, sum(drawn) + 0.5)
    parts = iter(figure.subfigures(len(drawn), 1, height_ratios=drawn, squeeze=False)[:, 0])
    draw_accuracies(next(parts), summary, seed=seed)
    if scattered:
        draw_hyperparameters(next(parts), summary, "test_accuracy", seed=seed)
    if len(filters):
        draw_filters(next(parts), summary, filters)
    figure.suptitle(headline(summary, title))
    return figure


def headline(summary: Summary, title: str) -> str:
    """``"zoo: 500 networks (3 diverged, red), median test accuracy 0.71"``."""
    diverged = int(summary.diverged.sum())
    accuracy = summary.metrics["test_accuracy"]
    median = np.median(accuracy[np.isfinite(accuracy)]) if np.isfinite(accuracy).any() else math.nan
    several = f" in {len(summary.populations)} populations" if len(summary.populations) > 1 else ""
    said = f" ({diverged:,} diverged, red)" if diverged else ""
    return f"{title}: {len(summary):,} networks{several}{said}, median test accuracy {median:.3f}"


# -- accuracies and learning curves --------------------------------------------------------------------------


def draw_accuracies(part: Any, summary: Summary, *, seed: int = 0) -> None:
    """The histogram of final accuracies, and the curves that led to them; without such, histograms of other metrics."""
    metrics = [name for name in ("test_accuracy", "test_loss") if name in summary.metrics]
    if not _has_curves(summary):
        draw_distributions(part, [Variable(name, summary.metrics[name]) for name in _finals(summary)])
        return
    axes = part.subplots(1, 1 + len(metrics), squeeze=False, width_ratios=[1.0] + [1.15] * len(metrics))[0]
    draw_distribution(axes[0], Variable("final test accuracy", summary.metrics["test_accuracy"]))
    chosen = _some_networks(summary, LINES, seed)
    for ax, metric in zip(axes[1:], metrics, strict=True):
        draw_learning_curves(ax, summary, metric, chosen)
    _colour_bar(part, axes[-1], summary.metrics["test_accuracy"])


def _finals(summary: Summary) -> list[str]:
    """Metrics to show of networks of which one checkpoint is known."""
    shown = ("test_accuracy", "train_accuracy", "test_loss", "generalisation_gap")
    return [name for name in shown if name in summary.metrics]


def _has_curves(summary: Summary) -> bool:
    return any(len(time) > 1 for time, _ in summary.trajectories("test_accuracy"))


def _some_networks(summary: Summary, count: int, seed: int) -> np.ndarray:
    finite = np.flatnonzero(np.isfinite(summary.metrics["test_accuracy"]))
    chosen = np.random.default_rng(seed).choice(finite, min(count, len(finite)), replace=False)
    return np.sort(chosen)


def draw_learning_curves(axes: Any, summary: Summary, metric: str, chosen: np.ndarray) -> None:
    """A metric against time for some networks, coloured by final accuracy, and the median over all."""
    curves = summary.trajectories(metric)
    colours = colour_map()(_norm(summary.metrics["test_accuracy"])(summary.metrics["test_accuracy"][chosen]))
    draw_lines(axes, [curves[at] for at in chosen], colours, median_curve(curves))
    axes.set(xlabel=summary.time, ylabel=metric)
    axes.set_title(f"{len(chosen):,} of {len(summary):,} networks", fontsize=8, loc="right")
    values = np.concatenate([values for _, values in curves])
    finite = values[np.isfinite(values)]
    scaled(axes.yaxis, "log" if metric.endswith("loss") and (finite > 0).all() else "linear", finite)


def _norm(accuracy: np.ndarray) -> Any:
    from matplotlib.colors import Normalize

    finite = accuracy[np.isfinite(accuracy)]
    low, high = np.quantile(finite, [0.02, 0.98]) if len(finite) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1e-6, clip=True)


def _colour_bar(part: Any, axes: Any, accuracy: np.ndarray) -> None:
    from matplotlib.cm import ScalarMappable

    bar = part.colorbar(ScalarMappable(_norm(accuracy), colour_map()), ax=axes, pad=0.02, aspect=30)
    bar.set_label("final test accuracy")
    bar.outline.set_visible(False)


def median_curve(curves: Sequence[Curve]) -> Curve:
    """The median over networks at every time at which one was saved, each network interpolated within its own times.

    Times at which fewer than half of the networks were trained are left out: the rest is not comparable.

    Example:
        >>> time = np.array([0.0, 1.0, 2.0])
        >>> median_curve([(time, time), (time, 3 * time), (time[::2], 2 * time[::2])])
        (array([0., 1., 2.]), array([0., 2., 4.]))
    """
    known = [curve for curve in curves if np.isfinite(curve[1]).any()]
    if not known:
        return np.empty(0), np.empty(0)
    times = np.unique(np.concatenate([time for time, _ in known]))
    if len(times) > GRID:
        times = np.unique(np.quantile(times, np.linspace(0, 1, GRID)))
    values = np.stack([np.interp(times, *_finite(curve), left=np.nan, right=np.nan) for curve in known])
    enough = np.isfinite(values).sum(0) * 2 >= len(known)
    return times[enough], np.nanmedian(values[:, enough], axis=0)


def _finite(curve: Curve) -> Curve:
    keep = np.isfinite(curve[1])
    return curve[0][keep], curve[1][keep]


# -- hyperparameters -----------------------------------------------------------------------------------------


def scatter_count(summary: Summary) -> int:
    """Number of panels that :func:`draw_hyperparameters` fills."""
    return len(summary.variables)


def scatter_height(count: int) -> float:
    """Their height in inches."""
    return 2.6 * -(-count // COLUMNS)


def draw_hyperparameters(part: Any, summary: Summary, score: str, *, seed: int = 0) -> None:
    """A score at the last checkpoint against each variable: sizes, hyperparameters, labels."""
    scores, variables = summary.metrics[score], summary.variables
    limits = _limits(scores)
    axes = panels(part, len(variables), COLUMNS)
    for at, (ax, variable) in enumerate(zip(axes, variables, strict=True)):
        draw_against(ax, variable, scores, summary.diverged, score, seed)
        ax.set_ylim(limits)
        numbered(ax.yaxis)
        if at % COLUMNS:
            ax.set_ylabel("")


def _limits(scores: np.ndarray) -> tuple[float, float]:
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05
    return float(low - margin), float(high + margin)


# -- filters -------------------------------------------------------------------------------------------------


def filter_rows(summary: Summary, count: int) -> np.ndarray:
    """Networks whose first layer can be seen, evenly from the worst to the best: positions in the summary."""
    drawable = np.array([filter_shape(population) is not None for population in summary.populations.values()])
    scores = summary.metrics["test_accuracy"]
    known = np.flatnonzero(drawable[summary.population] & np.isfinite(scores))
    ranked = known[np.argsort(scores[known], kind="stable")]
    places = np.unique(np.round(np.linspace(0, len(ranked) - 1, min(count, len(ranked)))).astype(np.int64))
    return ranked[places]


def filter_height(count: int) -> float:
    """Height in inches of so many networks' filters."""
    return 2.0 * -(-count // PER_ROW) + 0.4 if count else 0.0


def filter_shape(population: Population) -> tuple[str, tuple[int, ...]] | None:
    """The tensor of the first layer and the shape (filters, channels, height, width) in which it is seen.

    The kernels of the first convolution; the rows of the first linear layer of a network that flattens images. None
    for all others.
    """
    tensors = population.spec.tensors
    for name, tensor in tensors.items():
        if len(tensor.shape) == 4 and tensor.kind == "parameter":
            return name, tensor.shape
    if population.architecture is None or population.architecture.get("kind") != "mlp":
        return None
    shape = build(population.architecture).input_shape
    first = next(name for name, tensor in tensors.items() if len(tensor.shape) == 2)
    if len(shape) not in (2, 3):
        return None
    return first, (tensors[first].shape[0], *((1,) * (3 - len(shape))), *shape)


def first_filters(summary: Summary, network: int) -> np.ndarray:
    """The first filters of one network, (filters, channels, height, width)."""
    population = list(summary.populations.values())[summary.population[network]]
    found = filter_shape(population)
    assert found is not None
    name, shape = found
    weights = population.weights_of([int(summary.row[network])])[name][0]
    return weights.reshape(shape)[:TILES].numpy()


def mosaic(filters: np.ndarray) -> np.ndarray:
    """Filters side by side, a transparent line between them: (height, width, 4) in [0, 1].

    Weights of zero are white for one channel (blue below, red above) and grey for three, which are shown as colours;
    of any other number of channels the mean is shown. Each network has its own scale.
    """
    import matplotlib as mpl

    colours = filters.shape[1] == 3
    values = filters if colours else filters.mean(1, keepdims=True)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    unit = np.nan_to_num(0.5 + 0.5 * values / largest, nan=0.5, posinf=1.0, neginf=0.0)
    painted = np.moveaxis(unit, 1, -1) if colours else mpl.colormaps["RdBu_r"](unit[:, 0])[..., :3]
    factor = max(1, 24 // max(painted.shape[1:3]))  # sharp pixels however the picture is scaled
    painted = painted.repeat(factor, 1).repeat(factor, 2)
    height, width = painted.shape[1:3]
    gap = max(1, round(min(height, width) / 7))
    columns = math.ceil(math.sqrt(len(painted)))
    board = np.zeros((columns * (height + gap), columns * (width + gap), 4))
    for at, tile in enumerate(painted):
        top, left = at // columns * (height + gap), at % columns * (width + gap)
        board[top : top + height, left : left + width, :3] = tile
        board[top : top + height, left : left + width, 3] = 1.0
    return board


def draw_filters(part: Any, summary: Summary, networks: np.ndarray) -> None:
    """First-layer filters of some networks, from the worst to the best."""
    names = list(summary.populations)
    for ax, network in zip(panels(part, len(networks), PER_ROW), networks, strict=True):
        board = mosaic(first_filters(summary, int(network)))
        ax.imshow(board, interpolation="nearest")
        ax.set(anchor="N", xlim=(-0.08 * board.shape[1], 1.02 * board.shape[1]))
        ax.set_axis_off()
        accuracy = f"{summary.metrics['test_accuracy'][network]:.3f}"
        name = names[summary.population[network]]
        ax.set_title(accuracy if len(names) == 1 else f"{accuracy}\n{cut(name, 16)}", fontsize=8)
    part.suptitle(
        "first-layer filters, from the worst network to the best (test accuracy above)", fontsize=10
    )


# -- anything else -------------------------------------------------------------------------------------------


def distributions_height(count: int) -> float:
    """Height in inches of so many histograms."""
    return 2.4 * -(-count // COLUMNS)


def draw_distributions(part: Any, variables: Sequence[Variable]) -> None:
    """How every variable is distributed over the networks."""
    for at, (ax, variable) in enumerate(zip(panels(part, len(variables), COLUMNS), variables, strict=True)):
        if np.isfinite(variable.values).any():
            draw_distribution(ax, variable, of="" if at % COLUMNS else "networks")
        else:
            draw_empty(ax, f"{variable.name}: no finite value")
