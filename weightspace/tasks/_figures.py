"""Figures of a run: learning curves, confusion matrices, scatter plots, histograms, and images before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def draw_regression(found: np.ndarray, true: np.ndarray, path: Path, title: str) -> None:
    """Predicted against true values on the left, their ranks on the right; a perfect model is on the diagonal."""
    from matplotlib.figure import Figure
    from scipy.stats import rankdata

    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    parts = figure.subplots(1, 2)
    size = float(np.clip(4000 / max(len(true), 1), 3, 16))
    for axes, (x, y), what in zip(
        parts, ((true, found), (rankdata(true), rankdata(found))), ("value", "rank"), strict=True
    ):
        axes.scatter(x, y, s=size, alpha=0.5, linewidths=0)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        margin = 0.04 * (high - low or 1.0)
        axes.axline((low, low), slope=1, color="black", linewidth=0.8)
        axes.set(xlabel=f"true {what}", ylabel=f"predicted {what}", aspect="equal")
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_edits(rows: Mapping[str, np.ndarray], path: Path, title: str, *, columns: int = 10) -> None:
    """One named row of images each, (images, channels, height, width), of which the first few are drawn."""
    from matplotlib.figure import Figure

    count = min(columns, *(len(images) for images in rows.values()))
    figure = Figure(figsize=(count + 0.8, len(rows) + 0.5), layout="constrained")
    parts = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(parts, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=False):
            shown = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1).clip(0, 1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def draw_similarities(values: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """One histogram for each kind of pair, of the cosines between their embeddings, each with an area of 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    known = {name: cosines for name, cosines in values.items() if len(cosines)}
    low = min((float(cosines.min()) for cosines in known.values()), default=-1.0)
    for name, cosines in known.items():
        axes.hist(
            cosines, bins=np.linspace(min(low, 0.99), 1.0, 60).tolist(), density=True, alpha=0.6, label=name
        )
    axes.set(xlabel="cosine of two embeddings", ylabel="density", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
