"""Figures of the alignment study."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _alignment_tables import METHODS, NETWORKS

Row = Mapping[str, Any]

# of Okabe and Ito, which people with any colour vision tell apart; markers differ as well
LOOKS = {
    "naive": ("#555555", "o"),
    "weight-matching": ("#0072B2", "s"),
    "activation-matching": ("#E69F00", "^"),
    "straight-through": ("#009E73", "D"),
    "sinkhorn": ("#CC79A7", "v"),
    "merge-many": ("#E69F00", "^"),
    "c2m3": ("#009E73", "D"),
}
STATISTICS = {
    "none": ("averaged", "#555555", "o"),
    "batch-norm": ("estimated again", "#E69F00", "^"),
    "repair": ("REPAIR", "#0072B2", "s"),
}
BETWEEN = {
    "regular to regular": ("#555555", "o"),
    "star to source": ("#0072B2", "s"),
    "star to held-out": ("#E69F00", "^"),
}
DASHES = {"none": "-", "repair": "--"}
STYLE: dict[str, Any] = {
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """One figure for each part that has rows."""
    import matplotlib as mpl

    figures: dict[str, Callable[[Sequence[Row]], Any]] = {
        "barriers": _barriers,
        "resnets": _resnets,
        "many": _many,
        "star": _star,
    }
    with mpl.rc_context(STYLE):
        for part, make in figures.items():
            mine = [row for row in rows if row["part"] == part]
            if mine:
                path = folder / f"alignment_study_{part}.png"
                make(mine).savefig(path, dpi=110, metadata={"Software": None})


def _panels(rows: int, columns: int, height: float = 3.2, **shared: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * columns + 2.0, height * rows + 0.6), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _barriers(rows: Sequence[Row]) -> Any:
    data = _values(rows, "data")
    figure, panels = _panels(2, len(data), sharex=True, sharey="row")
    for column, name in enumerate(data):
        for line, (key, factor) in enumerate((("test_accuracy_barrier", 100.0), ("train_loss_barrier", 1.0))):
            axes = panels[line][column]
            for method, how in _values(rows, "method", "repair"):
                colour, marker = LOOKS[method]
                mine = _where(rows, data=name, method=method, repair=how)
                look = {"color": colour, "marker": marker, "linestyle": DASHES[how]}
                _line(axes, mine, "width", key, factor, label=_label(method, how), **look)
            _widths(axes, _values(rows, "width"))
        panels[0][column].set_title(name)
        panels[1][column].set_xlabel("width")
    panels[0][0].set_ylabel("drop of test accuracy in points")
    panels[1][0].set_ylabel("barrier of the training loss")
    for line, threshold in enumerate((0.1, 0.01)):
        for axes in panels[line]:
            _symlog(axes, threshold)
        _from_zero(panels[line])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Barriers between two MLPs, by their width")
    return figure


def _resnets(rows: Sequence[Row]) -> Any:
    networks, methods = _values(rows, "network"), _values(rows, "method")
    figure, panels = _panels(len(networks), len(methods), 2.9, sharex=True, sharey=True)
    for line, network in enumerate(networks):
        for column, method in enumerate(methods):
            axes = panels[line][column]
            for how, (label, colour, marker) in STATISTICS.items():
                mine = _where(rows, network=network, method=method, repair=how)
                if mine:
                    look = {"label": label, "color": colour, "marker": marker}
                    if how == "batch-norm":  # what REPAIR comes to where BatchNorm follows every convolution
                        look |= {"markersize": 10, "markerfacecolor": "none"}
                    _line(axes, mine, "width", "test_accuracy_barrier", 100.0, **look)
            _widths(axes, _values(rows, "width"), "x")
            _symlog(axes, 1.0)
            axes.set_title(f"{NETWORKS[network]}: {METHODS[method]}")
    _from_zero(panels.flat)
    for axes in panels[-1]:
        axes.set_xlabel("width")
    figure.supylabel("drop of test accuracy in points", fontsize=10)
    handles = dict(
        reversed(pair) for axes in panels.flat for pair in zip(*axes.get_legend_handles_labels(), strict=True)
    )
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", title="statistics between")
    return figure


def _many(rows: Sequence[Row]) -> Any:
    shown = [
        pair
        for pair in _values(rows, "data", "width")
        if len(_values(_where(rows, **_named(pair)), "models")) > 2
    ]
    shown = shown or _values(rows, "data", "width")
    columns = min(3, len(shown))
    figure, panels = _panels(-(-len(shown) // columns), columns, 3.0, sharex=True, sharey=True)
    for axes, pair in zip(panels.flat, shown, strict=False):
        for method in _values(rows, "method"):
            for how, key in (("none", "merged_accuracy"), ("repair", "repaired_accuracy")):
                mine = [
                    {**row, "lost": row["ends_accuracy"] - row[key]}
                    for row in _where(rows, method=method, **_named(pair))
                ]
                colour, marker = LOOKS[method]
                look = {"color": colour, "marker": marker, "linestyle": DASHES[how]}
                _line(axes, mine, "models", "lost", 100.0, label=_label(method, how), **look)
        axes.set(
            title=f"{pair[0]}, width {pair[1]:,}", xticks=_values(rows, "models"), xlabel="models merged"
        )
        axes.axhline(0.0, color="k", linewidth=0.8)
        axes.grid(alpha=0.3)
        _symlog(axes, 1.0)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy lost, in points")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle("Several MLPs merged into one, against the mean of the models")
    return figure


def _star(rows: Sequence[Row]) -> Any:
    figure, panels = _panels(1, 2)
    for axes, key, factor, label in (
        (panels[0][0], "train_loss_barrier", 1.0, "barrier of the training loss"),
        (panels[0][1], "test_accuracy_barrier", 100.0, "drop of test accuracy in points"),
    ):
        for between, (colour, marker) in BETWEEN.items():
            mine = _where(rows, between=between)
            _line(axes, mine, "width", key, factor, label=between, color=colour, marker=marker)
        _widths(axes, _values(rows, "width"))
        _from_zero([axes])
        axes.set(xlabel="width", ylabel=label)
    panels[0][0].legend()
    data = rows[0]["data"]
    figure.suptitle(f"Star models of MLPs on {data}: barriers after weight matching")
    return figure


# -- parts of figures --------------------------------------------------------------------------------------


def _values(rows: Sequence[Row], *names: str) -> list[Any]:
    """What occurs, in order."""
    if len(names) == 1:
        return list(dict.fromkeys(row[names[0]] for row in rows))
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def _where(rows: Sequence[Row], **facts: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in facts.items())]


def _named(pair: tuple[str, int]) -> dict[str, Any]:
    return {"data": pair[0], "width": pair[1]}


def _label(method: str, how: str) -> str:
    return METHODS[method] + (" + REPAIR" if how == "repair" else "")


def _line(axes: Any, rows: Sequence[Row], x: str, y: str, factor: float, **look: Any) -> None:
    """A line through what is known, by growing ``x``."""
    points = sorted((row[x], factor * row[y]) for row in rows if row[y] is not None)
    axes.plot([p for p, _ in points], [p for _, p in points], **{"markersize": 5, "linewidth": 1.5} | look)


def _widths(axes: Any, widths: Sequence[int], prefix: str = "") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [f"{prefix}{width:,}" for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _from_zero(panels: Iterable[Any]) -> None:
    """The same heights for all, from 0 to a little above the highest point."""
    shown = list(panels)
    top = max(
        (float(max(line.get_ydata(), default=0.0)) for axes in shown for line in axes.lines), default=0.0
    )
    for axes in shown:
        axes.set_ylim(0.0, 1.2 * top or 1.0)


def _symlog(axes: Any, threshold: float) -> None:
    """Linear up to the threshold, logarithmic beyond it, with plain numbers."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("symlog", linthresh=threshold, linscale=0.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
