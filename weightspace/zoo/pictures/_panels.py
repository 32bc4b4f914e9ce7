"""Single panels: how values are distributed, and a score against one variable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from weightspace.figures import GREY
from weightspace.zoo.pictures._style import ACCENT, BAD, MAIN, grid, numbered, scaled
from weightspace.zoo.pictures._summary import FEW, Variable, short

MOST_BARS = 30
MOST_STRIP = 150  # points beside each box
MOST_POINTS = 4000
BINS, PER_BIN = 12, 25  # of a running median
LONG = 38  # characters that fit below a panel side by side


def panels(part: Any, count: int, columns: int) -> list[Any]:
    """Axes in rows of ``columns``; places that are not needed stay empty."""
    columns = min(columns, max(count, 1))
    rows = -(-count // columns)
    axes = list(part.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return axes[:count]


def draw_distribution(axes: Any, variable: Variable, of: str = "networks") -> None:
    """How many networks have which value: bars for few values, a histogram with its median for numbers."""
    values = variable.values[np.isfinite(variable.values)]
    axes.set(xlabel=cut(variable.name, 40), ylabel=of)
    grid(axes)
    if _has_bars(variable):
        counts = [int((values == value).sum()) for value in variable.distinct]
        axes.bar(range(len(counts)), counts, width=0.7, color=MAIN)
        numbered(axes.yaxis, integer=True)
        _label_values(axes, variable)
        return
    if not len(values):
        return
    edges = _edges(variable.scale, values)
    axes.hist(values, bins=edges, color=MAIN, edgecolor=MAIN, linewidth=0.3)
    numbered(axes.yaxis, integer=True)
    scaled(axes.xaxis, variable.scale, variable.distinct)
    axes.axvline(float(np.median(values)), color=ACCENT, linewidth=1.4)
    axes.set_title(f"median {short(float(np.median(values)))}", fontsize=8, color=ACCENT, loc="right")


def _edges(scale: str, values: np.ndarray) -> Any:
    bins = int(np.clip(1.5 * np.sqrt(len(values)), 8, 40))
    if scale == "log":
        return np.geomspace(values.min(), values.max(), bins + 1)
    if scale == "symlog":
        positive = values[values > 0]
        return np.r_[0.0, np.geomspace(positive.min(), positive.max(), bins)]
    return bins


def _has_bars(variable: Variable) -> bool:
    """Whether bars tell more than a histogram: names, classes, few values that several networks share."""
    distinct = variable.distinct
    if not 0 < len(distinct) <= MOST_BARS:
        return False
    discrete = len(distinct) <= FEW or bool((distinct == np.round(distinct)).all())
    return bool(variable.choices) or (discrete and 2 * len(distinct) <= len(variable.values))


def _label_values(axes: Any, variable: Variable) -> None:
    texts = [cut(variable.called(value)) for value in variable.distinct]
    slanted: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    fits = len(texts) * (1 + max(len(text) for text in texts)) <= LONG
    axes.set_xticks(np.arange(len(texts)), texts, **({} if fits else slanted))
    axes.set_xlim(-0.6, len(texts) - 0.4)


def cut(name: str, longest: int = 18) -> str:
    """A name that fits below a panel."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def draw_against(
    axes: Any, variable: Variable, scores: np.ndarray, diverged: np.ndarray, score: str, seed: int = 0
) -> None:
    """A score against one variable: a box and points for each of few values, else points and their running median."""
    keep = np.isfinite(variable.values) & np.isfinite(scores)
    values, scores, diverged = variable.values[keep], scores[keep], diverged[keep]
    axes.set(xlabel=cut(variable.name, 40), ylabel=score)
    grid(axes)
    generator = np.random.default_rng(seed)
    if variable.scale == "values":
        _draw_boxes(axes, variable, values, scores, diverged, generator)
        return
    shown = _some(np.arange(len(values)), MOST_POINTS, generator)
    _points(axes, values[shown], scores[shown], diverged[shown])
    scaled(axes.xaxis, variable.scale, variable.distinct)
    middle, median = running_median(values, scores)
    if len(middle):
        axes.plot(middle, median, color=ACCENT, linewidth=2.0, zorder=4)


def running_median(x: np.ndarray, y: np.ndarray, bins: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Medians of x and y in bins of equally many points, by default up to twelve of 25; none for fewer than two bins.

    Example:
        >>> running_median(np.arange(8.0), np.arange(8.0) ** 2, bins=2)
        (array([1.5, 5.5]), array([ 2.5, 30.5]))
    """
    bins = min(len(x) // PER_BIN, BINS) if bins is None else bins
    if bins < 2:
        return np.empty(0), np.empty(0)
    parts = np.array_split(np.argsort(x, kind="stable"), bins)
    return np.array([np.median(x[part]) for part in parts]), np.array([np.median(y[part]) for part in parts])


def _draw_boxes(
    axes: Any,
    variable: Variable,
    values: np.ndarray,
    scores: np.ndarray,
    diverged: np.ndarray,
    generator: np.random.Generator,
) -> None:
    groups = [np.flatnonzero(values == value) for value in variable.distinct]
    width = 0.34
    axes.boxplot(
        [scores[group] for group in groups],
        positions=np.arange(len(groups)) - width / 2,
        widths=width * 0.8,
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": MAIN, "edgecolor": MAIN, "alpha": 0.45},
        medianprops={"color": ACCENT, "linewidth": 2.0},
        whiskerprops={"color": MAIN},
        capprops={"color": MAIN},
    )
    for place, group in enumerate(groups):
        shown = _some(group, MOST_STRIP, generator)
        at = place + width * (0.18 + 0.8 * generator.random(len(shown)))
        _points(axes, at, scores[shown], diverged[shown])
    _label_values(axes, variable)


def _some(places: np.ndarray, most: int, generator: np.random.Generator) -> np.ndarray:
    return places if len(places) <= most else np.sort(generator.choice(places, most, replace=False))


def _points(axes: Any, x: np.ndarray, y: np.ndarray, diverged: np.ndarray) -> None:
    size, alpha = (14, 0.55) if len(x) <= 600 else (7, 0.35)
    for chosen, colour in ((~diverged, MAIN), (diverged, BAD)):
        axes.scatter(x[chosen], y[chosen], s=size, color=colour, alpha=alpha, linewidths=0, rasterized=True)


def draw_lines(
    axes: Any,
    lines: Sequence[tuple[np.ndarray, np.ndarray]],
    colours: Any,
    median: tuple[np.ndarray, np.ndarray],
) -> None:
    """Thin lines in their colours, and their median on top, rimmed so that it is seen on any ground."""
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import Normal, Stroke

    axes.add_collection(
        LineCollection(
            [np.column_stack(line) for line in lines], colors=colours, linewidths=0.8, alpha=0.6, zorder=2
        )
    )
    rim = [Stroke(linewidth=3.6, foreground="white", alpha=0.7), Normal()]
    axes.plot(*median, color=BAD, linewidth=2.2, label="median of all", zorder=4, path_effects=rim)
    axes.autoscale_view()
    numbered(axes.xaxis, integer=True)
    grid(axes)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderpad=0.2)


def draw_table_of_colours(axes: Any, names: Sequence[str], colours: Sequence[Any], title: str) -> None:
    """A legend of points, outside on the right."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=cut(name))
        for name, colour in zip(names, colours, strict=True)
    ]
    axes.legend(
        handles=marks, title=cut(title), loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.2
    )


def draw_empty(axes: Any, sentence: str) -> None:
    """A sentence in the place of a picture."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, sentence, ha="center", va="center", color=GREY, transform=axes.transAxes, wrap=True)
