"""Figures of a run: learning curves and confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_confusion(counts: np.ndarray, path: Path, title: str) -> None:
    """Rows are true classes, columns predictions; shading by share of the row."""
    from matplotlib.figure import Figure

    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.0, 0.45 * len(counts) + 1.5)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        if counts[row, column]:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(
                column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=8
            )
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticks(range(len(counts)))
    axes.set_yticks(range(len(counts)))
    figure.savefig(path, dpi=120)


def draw_learning_curve(history: Sequence[dict[str, float]], monitor: str, path: Path, title: str) -> None:
    """Losses on the left, the validation score on the right, over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in (("train_loss", "-"), ("val_loss", "--")):
        points = [(row["epoch"] + 1, row[name]) for row in history if name in row]
        if points:
            left.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    for name in (f"train_{monitor}", f"val_{monitor}"):
        points = [(row["epoch"] + 1, row[name]) for row in history if name in row]
        if points:
            right.plot(
                *zip(*points, strict=True),
                "--" if name.startswith("val") else "-",
                label=name.replace("_", " "),
            )
    right.set(xlabel="epoch", ylabel=monitor)
    right.legend()
    right.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
