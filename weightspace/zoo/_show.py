"""A picture of a zoo: what its networks represent, beside what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from weightspace.errors import ZooError
from weightspace.nets import MLP, build, coordinate_grid, evaluate_batch
from weightspace.zoo._files import atomic_path
from weightspace.zoo._zoo import Population, Source, Zoo


def render(population: Population, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The signals that some networks represent, (rows, *shape) float32.

    Raises:
        ZooError: the population does not say how to rebuild its networks, or they take other coordinates.
    """
    if population.architecture is None:
        raise ZooError("population: it does not say how to rebuild its networks, so none can be rendered")
    net = build(population.architecture)
    if not isinstance(net, MLP) or net.input_shape != (len(shape),) or net.out_features != 1:
        raise ZooError(
            f"population: networks map inputs of shape {list(net.input_shape)} to {net.out_features} outputs; expected "
            f"{len(shape)} coordinates to 1 value"
        )
    with torch.no_grad():
        rendered = evaluate_batch(net, population.weights_of(rows), coordinate_grid(shape))
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


def draw_zoo(
    zoo: Zoo,
    path: str | Path,
    *,
    population: str | None = None,
    count: int = 30,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draw random networks below their targets, and the histogram of PSNR, as PNG.

    Args:
        zoo: with stored source signals.
        path: of the PNG.
        population: which one; the first by default.
        count: networks to draw, at most.
        seed: of the choice.
        overwrite: replace an existing file.

    Raises:
        ZooError: the zoo stores no two-dimensional signals, or those of several sources, or its networks cannot be
            rebuilt.
        OutputError: ``path`` exists.
    """
    chosen = zoo[population if population is not None else next(iter(zoo))]
    source = source_of(zoo, chosen)
    if source is None:
        raise ZooError(f"zoo {zoo.path or ''}: stores no source signals to show beside the networks")
    if source.items.ndim != 3:
        raise ZooError(
            f"zoo {zoo.path or ''}: expected images (items, height, width), found {source.items.shape}"
        )
    # one network per item: more to see
    candidates = np.unique(chosen.source[chosen.network], return_index=True)[1]
    rows = np.sort(np.random.default_rng(seed).choice(candidates, min(count, len(candidates)), replace=False))
    figure = _figure(chosen, source, rows)
    with atomic_path(Path(path), overwrite=overwrite) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return Path(path)


def _figure(population: Population, source: Source, rows: np.ndarray):  # type: ignore[no-untyped-def]
    from matplotlib.figure import Figure

    columns = min(10, len(rows))
    blocks = -(-len(rows) // columns)
    psnr = population.metrics.get("psnr")
    figure = Figure(
        figsize=(columns + 0.6, 2 * blocks + (2.6 if psnr is not None else 0.4)), layout="constrained"
    )
    heights = [2.0 * blocks, 2.2] if psnr is not None else [2.0 * blocks]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)
    _draw_pairs(parts[0, 0], population, source, rows, blocks, columns)
    if psnr is not None:
        _draw_psnr(parts[1, 0], psnr)
    return figure


def _draw_pairs(part, population, source, rows, blocks, columns):  # type: ignore[no-untyped-def]
    network = population.network[rows]
    targets = source.get(population.source[network])
    rendered = render(population, rows, source.items.shape[1:])
    axes = part.subplots(2 * blocks, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for at in range(len(rows)):
        block, column = divmod(at, columns)
        axes[2 * block, column].imshow(targets[at], cmap="gray", vmin=0, vmax=1)
        axes[2 * block + 1, column].imshow(rendered[at], cmap="gray", vmin=0, vmax=1)
        if "psnr" in population.metrics:
            axes[2 * block + 1, column].set_title(
                f"{population.metrics['psnr'][rows[at]]:.1f} dB", fontsize=8
            )
    part.suptitle("targets, and the networks fitted to them below each")


def _draw_psnr(part, psnr):  # type: ignore[no-untyped-def]
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
