"""Pictures of INRs: what the networks represent, beside what they should."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from weightspace.errors import ZooError
from weightspace.nets import MLP, build, coordinate_grid, evaluate_batch
from weightspace.zoo._zoo import Population, Source, Zoo
from weightspace.zoo.pictures._style import ACCENT, MAIN, grid
from weightspace.zoo.pictures._summary import last_rows


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
        rendered = evaluate_batch(net, population.weights_of(rows), coordinate_grid(shape[:dims]))
    return rendered.view(len(rows), *shape).numpy()


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


def some_rows(population: Population, count: int, seed: int) -> np.ndarray:
    """Random rows, one network per item: more to see."""
    last = last_rows(population)
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
    low, high = min(0.0, float(targets.min())), max(1.0, float(targets.max()))
    axes = part.subplots(2 * blocks, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for at in range(len(rows)):
        block, column = divmod(at, columns)
        for line, image in enumerate((targets[at], rendered[at])):
            _draw_image(axes[2 * block + line, column], image, low, high)
        if "psnr" in population.metrics:
            axes[2 * block + 1, column].set_title(_score(population, rows[at]), fontsize=8)
    part.suptitle("targets, and the networks fitted to them below each")


def _draw_image(axes: Any, image: np.ndarray, low: float, high: float) -> None:
    if image.ndim == 3 and image.shape[-1] == 3:
        axes.imshow(np.clip((image - low) / (high - low), 0.0, 1.0))
    else:
        axes.imshow(image.reshape(image.shape[:2]), cmap="gray", vmin=low, vmax=high)


def _draw_curves(
    part: Any, population: Population, source: Source, rows: np.ndarray, blocks: int, columns: int
) -> None:
    targets, rendered = _signals(population, source, rows)
    at_points = coordinate_grid(source.items.shape[1:])[:, 0].numpy()
    axes = part.subplots(blocks, columns, squeeze=False, sharex=True)
    for ax in list(axes.flat)[len(rows) :]:
        ax.set_axis_off()
    for ax, target, curve, row in zip(axes.flat, targets, rendered, rows, strict=False):
        ax.plot(at_points, target, color=MAIN, linewidth=2.6, alpha=0.55, label="target")
        ax.plot(at_points, curve, color=ACCENT, linewidth=1.1, label="network")
        ax.tick_params(labelsize=7)
        ax.set_title(_score(population, row), fontsize=8)
        grid(ax)
    part.suptitle("targets, and the networks fitted to them")
    part.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)


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
