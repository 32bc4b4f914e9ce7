"""Pictures of INRs: what the networks represent, beside what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from weightspace.errors import ZooError
from weightspace.nets import MLP, build, coordinate_grid, evaluate_batch
from weightspace.spec import Weights
from weightspace.zoo._zoo import Population, Source, Zoo
from weightspace.zoo.pictures._style import ACCENT, MAIN, grid
from weightspace.zoo.pictures._summary import last_rows

SIDE, CURVE = 64, 200  # of signals where the zoo stores none


def render(population: Population, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The signals that some networks represent, (rows, *shape) float32.

    Args:
        population: of INRs.
        rows: which checkpoints.
        shape: of one signal: ``(height, width)`` for grey images, ``(height, width, 3)`` for colours,
            ``(samples,)`` for curves.

    Raises:
        ZooError: the population does not say how to rebuild its networks, or they take other coordinates.
    """
    return render_weights(population, population.weights_of(rows), shape)


def render_weights(population: Population, weights: Weights, shape: tuple[int, ...]) -> np.ndarray:
    """The signals that networks of a population represent with other weights, (batch, *shape) float32.

    Args:
        population: which says what its networks are.
        weights: with one batch axis.
        shape: of one signal, as for :func:`render`.

    Raises:
        ZooError: as :func:`render` does.
    """
    if population.architecture is None:
        raise ZooError("population: it does not say how to rebuild its networks, so none can be rendered")
    net = build(population.architecture)
    dims = net.input_shape[0]
    coordinates = isinstance(net, MLP) and len(net.input_shape) == 1 and dims <= len(shape)
    if not coordinates or len(shape) > dims + 1 or math.prod(shape[dims:]) != net.out_features:
        channels = f", or {len(shape) - 1} to {shape[-1]}" if len(shape) > 1 else ""
        raise ZooError(
            f"population: networks map inputs of shape {list(net.input_shape)} to {net.out_features} outputs; expected "
            f"{len(shape)} coordinates to 1 value{channels}"
        )
    with torch.no_grad():
        rendered = evaluate_batch(net, weights, coordinate_grid(shape[:dims]))
    return rendered.reshape(-1, *shape).numpy()


def source_of(zoo: Zoo, population: Population) -> Source | None:
    """The stored signals that the networks of a population represent; None if the zoo stores none.

    Of several sources it is the one that the population's protocol names under ``source``, or the one of the recipe
    that made the zoo.

    Raises:
        ZooError: there are several, and neither names one of them.
    """
    if len(zoo.sources) <= 1:
        return next(iter(zoo.sources.values()), None)
    made_from = (zoo.recipe or {}).get("source")
    for name in (
        population.protocol.get("source"),
        made_from.get("kind") if isinstance(made_from, dict) else None,
    ):
        if isinstance(name, str) and name in zoo.sources:
            return zoo.sources[name]
    raise ZooError(
        f"zoo {zoo.path or ''}: stores signals of several sources, {', '.join(zoo.sources)}; the population's protocol "
        "should name its own under 'source'"
    )


def is_inr(zoo: Zoo, population: Population) -> bool:
    """Whether a population is one of INRs: it has a PSNR, or maps coordinates in a zoo that stores signals."""
    if "psnr" in population.metrics or "test_accuracy" in population.metrics:
        return "test_accuracy" not in population.metrics
    architecture = population.architecture or {}
    return (
        bool(zoo.sources)
        and architecture.get("kind") == "mlp"
        and "input_shape" not in architecture["arguments"]
    )


def drawn_source(zoo: Zoo, population: Population) -> Source:
    """The signals to show beside the networks.

    Raises:
        ZooError: none are stored, or they are neither images nor curves.
    """
    source = source_of(zoo, population)
    if source is None:
        raise ZooError(f"zoo {zoo.path or ''}: stores no source signals to show beside the networks")
    shape = source.items.shape
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3)):
        raise ZooError(
            f"zoo {zoo.path or ''}: expected curves (items, samples) or images (items, height, width) or "
            f"(items, height, width, 3), found {shape}"
        )
    return source


def drawn_shape(zoo: Zoo, population: Population) -> tuple[int, ...]:
    """The shape of one signal to draw: that of the stored ones, or one that shows enough of networks without such.

    Raises:
        ZooError: the population's networks are no INRs of curves or images, or the stored signals are neither.
    """
    dims, outputs = _coordinates(zoo, population)
    if source_of(zoo, population) is not None:
        return drawn_source(zoo, population).items.shape[1:]
    return (*[CURVE if dims == 1 else SIDE] * dims, *[outputs] * (outputs > 1))


def _coordinates(zoo: Zoo, population: Population) -> tuple[int, int]:
    """How many coordinates networks take, and how many values they give."""
    if population.architecture is None:
        raise ZooError("population: it does not say how to rebuild its networks, so none can be rendered")
    kind, arguments = population.architecture["kind"], population.architecture["arguments"]
    classifies = "test_accuracy" in population.metrics or "input_shape" in arguments
    ends = (arguments["widths"][0], arguments["widths"][-1]) if kind == "mlp" else None
    if classifies or ends not in ((1, 1), (2, 1), (2, 3)):
        found = f"an MLP from {ends[0]} to {ends[1]} values" if ends else f"a network of kind {kind}"
        raise ZooError(
            f"zoo {zoo.path or ''}: expected INRs of curves or images, which represent a signal, found "
            f"{'classifiers' if classifies else found}"
        )
    return ends


def some_rows(
    population: Population, count: int, seed: int, *, among: np.ndarray | None = None
) -> np.ndarray:
    """Random last checkpoints, of all or ``among`` some rows, one network per item: more to see."""
    last = last_rows(population)
    last = last if among is None else np.intersect1d(last, among)
    candidates = last[np.unique(population.source[population.network[last]], return_index=True)[1]]
    return np.sort(np.random.default_rng(seed).choice(candidates, min(count, len(candidates)), replace=False))


def inr_figure(population: Population, source: Source, rows: np.ndarray) -> Any:
    """Networks and their targets, and the histogram of PSNR where there is one."""
    from matplotlib.figure import Figure

    flat = source.items.ndim == 2
    columns = min(5 if flat else 10, len(rows))
    blocks = -(-len(rows) // columns)
    psnr = population.metrics.get("psnr")
    width, height = (2.6 * columns + 0.6, 1.6 * blocks) if flat else (columns + 0.6, 2.0 * blocks)
    figure = Figure(figsize=(width, height + (2.6 if psnr is not None else 0.4)), layout="constrained")
    heights = [height, 2.2] if psnr is not None else [height]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    draw = _draw_curves if flat else _draw_pairs
    draw(parts[0, 0], population, source, rows, blocks, columns)
    if psnr is not None:
        _draw_psnr(parts[1, 0], psnr[last_rows(population)])
    return figure


def _signals(population: Population, source: Source, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    targets = source.get(population.source[population.network[rows]])
    return targets, render(population, rows, source.items.shape[1:])


def _score(population: Population, row: int | np.integer) -> str:
    return f"{population.metrics['psnr'][row]:.1f} dB" if "psnr" in population.metrics else ""


def _draw_pairs(
    part: Any, population: Population, source: Source, rows: np.ndarray, blocks: int, columns: int
) -> None:
    targets, rendered = _signals(population, source, rows)
    low, high = value_range(targets)
    axes = part.subplots(2 * blocks, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for at in range(len(rows)):
        block, column = divmod(at, columns)
        for line, image in enumerate((targets[at], rendered[at])):
            draw_image(axes[2 * block + line, column], image, low, high)
        if "psnr" in population.metrics:
            axes[2 * block + 1, column].set_title(_score(population, rows[at]), fontsize=8)
    part.suptitle("targets, and the networks fitted to them below each")


def value_range(signals: np.ndarray) -> tuple[float, float]:
    """What is black and what is white."""
    return min(0.0, float(signals.min())), max(1.0, float(signals.max()))


def draw_image(axes: Any, image: np.ndarray, low: float, high: float) -> None:
    """An image, grey or in colour, whose values from ``low`` to ``high`` are black to white."""
    if image.ndim == 3 and image.shape[-1] == 3:
        axes.imshow(np.clip((image - low) / (high - low), 0.0, 1.0))
    else:
        axes.imshow(image.reshape(image.shape[:2]), cmap="gray", vmin=low, vmax=high)


def _draw_curves(
    part: Any, population: Population, source: Source, rows: np.ndarray, blocks: int, columns: int
) -> None:
    targets, rendered = _signals(population, source, rows)
    axes = part.subplots(blocks, columns, squeeze=False, sharex=True)
    for ax in list(axes.flat)[len(rows) :]:
        ax.set_axis_off()
    for ax, target, curve, row in zip(axes.flat, targets, rendered, rows, strict=False):
        draw_curves(ax, target, curve)
        ax.tick_params(labelsize=7)
        ax.set_title(_score(population, row), fontsize=8)
    part.suptitle("targets, and the networks fitted to them")
    part.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)


def draw_curves(
    axes: Any, before: np.ndarray, after: np.ndarray, labels: tuple[str, str] = ("target", "network")
) -> None:
    """Two signals of one coordinate in [-1, 1]: a broad line, and a thin one on it."""
    points = coordinate_grid(before.shape)[:, 0].numpy()
    axes.plot(points, before, color=MAIN, linewidth=2.6, alpha=0.55, label=labels[0])
    axes.plot(points, after, color=ACCENT, linewidth=1.1, label=labels[1])
    grid(axes)


def _draw_psnr(part: Any, psnr: np.ndarray) -> None:
    axes = part.subplots()
    finite = psnr[np.isfinite(psnr)]
    axes.hist(finite, bins=60, color="tab:blue")
    axes.set(xlabel="PSNR in dB", ylabel="networks")
    diverged = int(np.isnan(psnr).sum())
    axes.set_title(
        f"{len(psnr):,} networks, median {np.median(finite) if len(finite) else float('nan'):.1f} dB"
        + (f", {diverged} diverged" if diverged else ""),
        fontsize=10,
    )
