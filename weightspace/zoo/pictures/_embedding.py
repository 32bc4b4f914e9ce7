"""Weights of many networks as points in the plane."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from weightspace.figures import GREY
from weightspace.zoo._zoo import Population
from weightspace.zoo.pictures._panels import draw_table_of_colours, panels
from weightspace.zoo.pictures._style import BAD, CLASSES, colour_map, grid
from weightspace.zoo.pictures._summary import Summary, Variable

NETWORKS = 2000  # in one picture
BLOCK = 1 << 22  # weights that are held at once, 16 MB
WHOLE = 1 << 24  # weights of which the components are computed without sketching
SKETCH = 1024  # features of the sketch
PICTURES = 6  # populations, the largest ones, each with its own picture
COLUMNS = 3
FEWEST = 3  # networks


@dataclass(frozen=True)
class Embedding:
    """Networks in the plane.

    Args:
        points: the first two principal components, in units of their common standard deviation.
        networks: their positions in the summary.
        explained: share of the variance that each component explains.
        sketched: whether a random projection came first.
    """

    points: Float[np.ndarray, "networks 2"]
    networks: np.ndarray
    explained: Float[np.ndarray, " 2"]
    sketched: bool


def embed(summary: Summary, name: str, *, seed: int = 0) -> Embedding | None:
    """The last checkpoints of a population in the plane: principal components of its standardised weights.

    Every tensor is brought to mean 0 and variance 1 over its entries and the networks, so that none outweighs the
    others by its scale. Large populations are sketched first: every weight is added, with a random sign, to one of
    1024 sums, which keeps distances on average; memory is bounded by one block of rows.

    Args:
        summary: that holds the population.
        name: of the population.
        seed: of the choice of networks, of the sketch and of the components.

    Returns:
        None for fewer than three networks that have not diverged, or where they do not differ.

    Reference:
        Charikar et al. 2002, "Finding frequent items in data streams" (the sketch).
    """
    population = summary.populations[name]
    at = list(summary.populations).index(name)
    networks = np.flatnonzero((summary.population == at) & ~summary.diverged)
    if len(networks) > NETWORKS:
        networks = np.sort(np.random.default_rng(seed).choice(networks, NETWORKS, replace=False))
    finite, mean, scale = _statistics(population, summary.row[networks])
    networks = networks[finite]
    sketched = len(networks) * population.spec.num_parameters > WHOLE
    if len(networks) < FEWEST:
        return None
    blocks = _features(population, summary.row[networks], mean, scale, seed if sketched else None)
    features = np.concatenate(list(blocks))
    return _components(features, networks, sketched, seed)


def _components(features: np.ndarray, networks: np.ndarray, sketched: bool, seed: int) -> Embedding | None:
    from sklearn.decomposition import PCA

    if not float(features.var(0).sum()) > 0 or features.shape[1] < 2:
        return None
    model = PCA(2, svd_solver="randomized", random_state=seed)
    points = model.fit_transform(features)
    return Embedding(
        (points / points.std()).astype(np.float64),
        networks,
        np.asarray(model.explained_variance_ratio_, np.float64),
        sketched,
    )


def _blocks(population: Population, rows: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, BLOCK // max(population.spec.num_parameters, 1))
    for start in range(0, len(rows), step):
        yield population.read(rows[start : start + step]).numpy()


def _statistics(population: Population, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows are finite, and over these mean and inverse standard deviation of each parameter's tensor."""
    sizes = np.array([tensor.numel for tensor in population.spec.tensors.values()])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    finite, first, second = [], np.zeros(len(sizes)), np.zeros(len(sizes))
    for block in _blocks(population, rows):
        finite.append(np.isfinite(block).all(1))
        kept = block[finite[-1]].astype(np.float64)
        first += np.add.reduceat(kept.sum(0), starts)
        second += np.add.reduceat((kept**2).sum(0), starts)
    keep = np.concatenate([np.empty(0, bool), *finite])
    count = np.maximum(sizes * keep.sum(), 1)
    mean = first / count
    deviation = np.sqrt(np.maximum(second / count - mean**2, 0.0))
    inverse = np.where(deviation > 0, 1 / np.where(deviation > 0, deviation, 1.0), 0.0)
    return keep, np.repeat(mean, sizes).astype(np.float32), np.repeat(inverse, sizes).astype(np.float32)


def _features(
    population: Population, rows: np.ndarray, mean: np.ndarray, scale: np.ndarray, seed: int | None
) -> Iterator[np.ndarray]:
    sketch = None if seed is None else sketch_of(len(mean), seed)
    for block in _blocks(population, rows):
        standard = (block - mean) * scale
        yield standard if sketch is None else np.asarray(sketch.T @ standard.T).T


def sketch_of(parameters: int, seed: int) -> Any:
    """A sparse matrix (parameters, 1024) with one random sign in each row."""
    from scipy.sparse import csr_matrix

    generator = np.random.default_rng([seed, parameters])
    signs = generator.choice(np.array([-1.0, 1.0], np.float32), parameters)
    columns = generator.integers(0, SKETCH, parameters)
    return csr_matrix((signs, columns, np.arange(parameters + 1)), shape=(parameters, SKETCH))


def embedded(summary: Summary, *, seed: int = 0) -> dict[str, Embedding]:
    """The embeddings of the largest populations."""
    counts = np.bincount(summary.population, minlength=len(summary.populations))
    names = list(summary.populations)
    largest = sorted(np.argsort(-counts, kind="stable")[:PICTURES])
    found = {names[at]: embed(summary, names[at], seed=seed) for at in largest}
    return {name: embedding for name, embedding in found.items() if embedding is not None}


def colouring(summary: Summary) -> Variable | None:
    """What tells networks apart: accuracy, or else the first label, or else another score."""
    if summary.score == "test_accuracy":
        return Variable("final test accuracy", summary.metrics["test_accuracy"])
    labels = [label for label in summary.labels.values() if len(label.distinct) > 1]
    if labels:
        return labels[0]
    return None if summary.score is None else Variable(summary.score, summary.metrics[summary.score])


def embedding_height(count: int) -> float:
    """Height in inches of so many pictures."""
    return 4.6 if count == 1 else 3.9 * -(-count // COLUMNS)


def draw_embeddings(part: Any, summary: Summary, embeddings: Mapping[str, Embedding]) -> None:
    """The networks of each population in the plane, coloured by accuracy or label."""
    variable = colouring(summary)
    axes = panels(part, len(embeddings), COLUMNS)
    for ax, (name, embedding) in zip(axes, embeddings.items(), strict=True):
        _draw_points(part, ax, embedding, variable, last=ax is axes[-1])
        first, second = 100 * embedding.explained
        ax.set(xlabel=f"component 1 ({first:.1f} %)", ylabel=f"component 2 ({second:.1f} %)", title=name)
        ax.set(xticks=[], yticks=[])
        grid(ax, "both")


def _draw_points(part: Any, axes: Any, embedding: Embedding, variable: Variable | None, last: bool) -> None:
    x, y = embedding.points.T
    how: dict[str, Any] = {"s": 16 if len(x) <= 600 else 8, "alpha": 0.8, "linewidths": 0, "rasterized": True}
    if variable is None or not len(variable.distinct):
        axes.scatter(x, y, color=GREY, **how)
        return
    values = variable.values[embedding.networks]
    known = np.isfinite(values)
    axes.scatter(x[~known], y[~known], color=BAD, **how)
    if (variable.choices or _whole(variable.distinct)) and len(variable.distinct) <= len(CLASSES):
        places = np.searchsorted(variable.distinct, values[known])
        axes.scatter(x[known], y[known], c=[CLASSES[place] for place in places], **how)
        if last:
            names = [variable.called(value) for value in variable.distinct]
            draw_table_of_colours(axes, names, CLASSES[: len(names)], variable.name)
        return
    low, high = np.quantile(variable.values[np.isfinite(variable.values)], [0.02, 0.98])
    drawn = axes.scatter(x[known], y[known], c=values[known], cmap=colour_map(), vmin=low, vmax=high, **how)
    bar = part.colorbar(drawn, ax=axes, pad=0.02, aspect=30)
    bar.set_label(variable.name)
    bar.solids.set_alpha(1.0)
    bar.outline.set_visible(False)


def _whole(values: np.ndarray) -> bool:
    return bool((values == np.round(values)).all())
