"""Figures of barriers, surfaces and singular vectors: colours and markers that also serve the colour-blind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightspace.errors import ConfigError
from weightspace.figures import GREY, INK, STYLE
from weightspace.spec import FIGURE_FORMATS

if TYPE_CHECKING:
    from weightspace.align.judging._barrier import BarrierReport, Curve
    from weightspace.align.judging._singular_vectors import MatrixReport, SingularVectorReport
    from weightspace.align.judging._surface import LossSurface

BEFORE, AFTER = "#D55E00", "#0072B2"
# Okabe and Ito's colours, told apart in all kinds of colour vision, the first for what comes first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#6B4C9A", "#1a1b1d")
MARKERS = "osD^vPX"  # another number than of the colours, so that pairs repeat late

# Equal reports give equal bytes.
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
PATH_LABEL = "λ  (0: network A, 1: network B)"


@contextmanager
def saved(output: str | Path | BufferedIOBase, format: str | None, title: str | None) -> Iterator[Any]:
    """An empty figure that is saved when the block ends.

    Raises:
        ConfigError: another format than PNG, PDF and SVG.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if format is None:
        format = Path(output).suffix[1:].lower() if isinstance(output, str | Path) else "png"
    if format not in FIGURE_FORMATS:
        raise ConfigError(f"draw: expected the format {', '.join(FIGURE_FORMATS)}, found {format!r}")
    with mpl.rc_context({**STYLE, "pdf.fonttype": 42}):
        figure = Figure(layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
        yield figure
        if title:
            figure.suptitle(title)
        target: Any = output
        figure.savefig(target, format=format, dpi=160, metadata=METADATA[format])


# -- barriers ----------------------------------------------------------------------------------------------


def barrier_figure(figure: Any, reports: Mapping[str, BarrierReport]) -> None:
    """Loss on the left, accuracy on the right where all reports have it; the legend below."""
    with_accuracy = all(report.curve.accuracy is not None for report in reports.values())
    panels = figure.subplots(1, 2 if with_accuracy else 1, squeeze=False)[0]
    rows = -(-(len(reports) + 3) // (2 * len(panels)))
    figure.set_size_inches(8.6 if with_accuracy else 5.0, 3.6 + 0.2 * rows)
    for axes, kind in zip(panels, ("loss", "accuracy"), strict=False):
        for number, report in enumerate(reports.values()):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            if report.test is not None:
                _path(axes, report.train, kind, colour, marker=None)
            _path(axes, report.curve, kind, colour, marker)
        if len(reports) == 1:
            _mark_barrier(axes, next(iter(reports.values())).curve, kind)
        axes.set(xlabel=PATH_LABEL, ylabel="loss" if kind == "loss" else "accuracy (%)", xlim=(-0.03, 1.03))
        _grid(axes)
    _barrier_legend(figure, reports, 2 * len(panels))


def _path(axes: Any, curve: Curve, kind: str, colour: str, marker: str | None) -> None:
    """One curve; that of the data which decide has markers and the line between its ends."""
    values = _values(curve, kind)
    if marker is None:
        axes.plot(curve.lambdas, values, color=colour, linewidth=1.2, linestyle=(0, (4, 2)), alpha=0.75)
        return
    axes.plot(curve.lambdas, values, color=colour, linewidth=1.6, marker=marker, markersize=3.4)
    axes.plot([0, 1], [values[0], values[-1]], color=GREY, linewidth=1.0, linestyle=":", zorder=1)


def _values(curve: Curve, kind: str) -> np.ndarray:
    if kind == "loss":
        return np.array(curve.loss)
    assert curve.accuracy is not None
    return 100 * np.array(curve.accuracy)


def _mark_barrier(axes: Any, curve: Curve, kind: str) -> None:
    """An arrow from the line to the curve where they are farthest apart, with its length."""
    at, height = curve.loss_peak if kind == "loss" else curve.accuracy_dip
    if not 0 < height < float("inf"):
        return
    values = _values(curve, kind)
    line = (1 - at) * values[0] + at * values[-1]
    top = values[curve.lambdas.index(at)]
    axes.annotate(
        "", (at, top), (at, line), arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    )
    size = f"{height:.3g}" if kind == "loss" else f"{100 * height:.3g} points"
    axes.set_title(f"{kind} barrier {size} at λ = {at:.2g}")


def _barrier_legend(figure: Any, reports: Mapping[str, BarrierReport], columns: int) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D(
            [],
            [],
            color=COLOURS[n % len(COLOURS)],
            marker=MARKERS[n % len(MARKERS)],
            markersize=4,
            label=name,
        )
        for n, name in enumerate(reports)
        if name
    ]
    both = any(report.test is not None for report in reports.values())
    colour = GREY if entries else COLOURS[0]
    entries.append(Line2D([], [], color=colour, label="test data" if both else "training data"))
    if both:
        entries.append(Line2D([], [], color=colour, linestyle=(0, (4, 2)), alpha=0.75, label="training data"))
    entries.append(Line2D([], [], color=GREY, linestyle=":", label="line between the ends"))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(columns, len(entries)))


# -- surfaces ----------------------------------------------------------------------------------------------


def surface_figure(figure: Any, surface: LossSurface) -> None:
    """Contours of loss, and of accuracy where there is one, with the three networks as labelled dots."""
    grids = {"loss": surface.loss.numpy()}
    if surface.accuracy is not None:
        grids["accuracy (%)"] = 100 * surface.accuracy.numpy()
    width, height = (float(axis[-1] - axis[0]) for axis in (surface.x, surface.y))
    tall = min(max(4.0 * height / width, 2.6), 6.0)
    figure.set_size_inches(5.0 * len(grids), tall + 0.9)
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (label, values) in zip(panels, grids.items(), strict=True):
        _contours(figure, axes, surface, label, values)
        _three_networks(axes, surface)
        axes.set_aspect("equal")
        axes.set(
            xlabel=f"L2 distance from {surface.names[0]} towards {surface.names[1]}",
            title=f"{label} on {surface.measured_on} data",
        )
    panels[0].set_ylabel(f"L2 distance towards {surface.names[2]}")


def _contours(figure: Any, axes: Any, surface: LossSurface, label: str, values: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm

    finite = values[np.isfinite(values)]
    if not finite.size or finite.min() == finite.max():  # contours need a difference
        finite = (
            np.array([0.0, 1.0]) if not finite.size else finite[0] + np.array([0.0, 1e-6 + abs(finite[0])])
        )
    loss = label == "loss"
    beyond: Any = "max" if loss else "neither"
    levels = _levels(
        float(finite.min()), float(np.quantile(finite, 0.98)) if loss else float(finite.max()), loss
    )
    # dark is where networks do well, in both panels
    filled = axes.contourf(
        surface.x.numpy(),
        surface.y.numpy(),
        np.ma.masked_invalid(values),
        levels=levels,
        cmap="viridis" if loss else "viridis_r",
        norm=BoundaryNorm(levels, 256, extend=beyond),  # each level takes as many colours as any other
        extend=beyond,
    )
    bar = figure.colorbar(filled, ax=axes, ticks=levels[::2], shrink=0.85)
    bar.ax.set_yticklabels([f"{level:.3g}" for level in levels[::2]])


def _levels(low: float, high: float, loss: bool) -> np.ndarray:
    """Between the lowest and the highest value; those of a loss are dense where it is low."""
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    if not loss:
        return np.linspace(low, high, 13)
    return low + (high - low) * (np.geomspace(1, 60, 13) - 1) / 59


def _three_networks(axes: Any, surface: LossSurface) -> None:
    from matplotlib.patheffects import withStroke

    positions = surface.positions.numpy()
    centre = positions.mean(axis=0)
    for name, place in zip(surface.names, positions, strict=True):
        axes.plot(*place, marker="o", markersize=7, color="white", markeredgecolor=INK, markeredgewidth=1.2)
        above = place[1] >= centre[1]
        axes.annotate(
            name,
            place,
            (0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            color="white",
            fontweight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground=INK)],
        )


# -- singular vectors --------------------------------------------------------------------------------------


def singular_figure(figure: Any, report: SingularVectorReport, chosen: MatrixReport) -> None:
    """Above singular values and overlaps of one matrix, below R and L2 distance of all of them."""
    names = list(report.matrices)
    below = 0.9 + 0.26 * len(names)
    figure.set_size_inches(9.4, 4.6 + below)
    (values, overlaps), (similarity, distance) = figure.subplots(2, 2, height_ratios=[3.0, below])
    _singular_values(values, chosen)
    _overlaps(overlaps, chosen)
    _similarities(similarity, report)
    _distances(distance, report)
    _matching_legend(figure, report)


def _singular_values(axes: Any, chosen: MatrixReport) -> None:
    ranks = np.arange(1, len(chosen.values_a) + 1)
    marked = _spread(len(ranks), 24)
    axes.plot(ranks, chosen.values_a, color=GREY, linewidth=1.5, label="A")
    axes.plot(ranks, chosen.values_b, color=BEFORE, linewidth=1.5, label="B before matching")
    axes.plot(
        ranks[marked],
        chosen.values_aligned[marked],
        color=AFTER,
        linestyle="none",
        marker="o",
        markersize=4.5,
        fillstyle="none",
        label="B after matching",
    )
    axes.set(
        ylabel="singular value",
        title=f"{chosen.name}: singular values\n(largest change by matching: {chosen.value_change:.1g} relative)",
        ylim=(0, None),
    )
    _by_rank(axes)


def _overlaps(axes: Any, chosen: MatrixReport) -> None:
    """What the other network does along each singular direction of A, beside what A does."""
    ranks = np.arange(1, len(chosen.values_a) + 1)
    axes.plot(ranks, chosen.values_a, color=GREY, linewidth=1.5, label="A itself: sᵢ")
    for side, colour, label in ((chosen.before, BEFORE, "before"), (chosen.after, AFTER, "after")):
        overlaps = side.overlap.numpy()
        axes.plot(ranks, overlaps, color=colour, linestyle="none", marker=".", markersize=3.5, alpha=0.5)
        axes.plot(*_running_mean(overlaps), color=colour, linewidth=1.8, label=f"B {label} matching")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="overlap uᵢᵀ W vᵢ", title=f"{chosen.name}: B along the\nsingular directions of A")
    _by_rank(axes)


def _by_rank(axes: Any) -> None:
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rank i of the singular value")
    axes.legend()
    _grid(axes)


def _spread(count: int, most: int) -> np.ndarray:
    """Places among so many, evenly on a logarithmic axis."""
    return np.unique(np.geomspace(1, count, most).round().astype(int)) - 1


def _running_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks and means over windows that grow with the rank, as the first directions count for themselves."""
    at = _spread(len(values), 40)
    means = [values[max(0, i - i // 5) : i + i // 5 + 1].mean() for i in at]
    return at + 1, np.array(means)


def _similarities(axes: Any, report: SingularVectorReport) -> None:
    """R by matrix, from before to after: of the leading singular vectors, and of the most."""
    for (at, marker), offset in zip(_shown(report), (-0.14, 0.14), strict=False):
        pairs = [(each.before.joint[at], each.after.joint[at]) for each in report.matrices.values()]
        _moves(axes, pairs, offset, marker)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="R, weighted by singular value", title="closeness of singular vectors")
    _by_matrix(axes, report)


def _distances(axes: Any, report: SingularVectorReport) -> None:
    pairs = [
        (each.before.distance / (each.scale or 1.0), each.after.distance / (each.scale or 1.0))
        for each in report.matrices.values()
    ]
    _moves(axes, pairs, 0.0, "D")
    before, after = report.distance("before"), report.distance("after")
    axes.set(
        xlabel="L2 distance / √(‖A‖² + ‖B‖²)",
        xlim=(0, 1.05 * max(1.0, *(max(pair) for pair in pairs))),
        title=f"L2 distance ({before:.3g} before, {after:.3g} after)",
    )
    _by_matrix(axes, report, named=False)


def _shown(report: SingularVectorReport) -> list[tuple[int, str]]:
    """The first and the last share of energy, and their markers."""
    last = len(report.energy) - 1
    return [(0, "o"), (last, "s")] if last else [(0, "o")]


def _moves(axes: Any, pairs: Sequence[tuple[float, float]], offset: float, marker: str) -> None:
    """A row per matrix: a hollow mark before, a line, a full mark after."""
    for row, (before, after) in enumerate(pairs):
        place = row + offset
        axes.plot([before, after], [place, place], color=GREY, linewidth=1.0, zorder=1)
        axes.plot(before, place, color=BEFORE, marker=marker, markersize=5, fillstyle="none")
        axes.plot(after, place, color=AFTER, marker=marker, markersize=5)


def _by_matrix(axes: Any, report: SingularVectorReport, *, named: bool = True) -> None:
    names = list(report.matrices)
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.set_ylim(len(names) - 0.5, -0.5)
    _grid(axes, "x")


def _matching_legend(figure: Any, report: SingularVectorReport) -> None:
    """What is hollow and what is full, and the markers of the shares of energy."""
    from matplotlib.lines import Line2D

    style: Any = {"linestyle": "none", "markersize": 5}
    entries = [
        Line2D([], [], color=BEFORE, marker="D", fillstyle="none", label="before matching", **style),
        Line2D([], [], color=AFTER, marker="D", label="after matching", **style),
    ]
    for at, marker in _shown(report):
        share = report.energy[at]
        label = (
            "R of all singular vectors" if share == 1 else f"R of the leading {100 * share:.3g} % of energy"
        )
        entries.append(Line2D([], [], color=GREY, marker=marker, label=label, **style))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries))


def _grid(axes: Any, axis: str = "y") -> None:
    """Thin lines behind the data."""
    axes.grid(axis=axis, color=GREY, alpha=0.25, linewidth=0.6)
