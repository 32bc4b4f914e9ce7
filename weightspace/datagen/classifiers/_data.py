"""What classifiers learn from: inputs, classes, and which items they learn from, are chosen by and tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from pydantic import Field, PositiveInt

from weightspace.datagen._recipe import STRICT, Recipe, SplitConfig
from weightspace.datagen._work import divide
from weightspace.datagen.classifiers._families import Task
from weightspace.datagen.sources import Signals
from weightspace.errors import RecipeError


class DataConfig(SplitConfig):
    """The items that networks learn from, and how they see them."""

    model_config = STRICT

    count: PositiveInt | None = Field(None, description="items to use, at random; null for all")
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height and width to which images are resized; null for their own"
    )
    grey: bool = Field(False, description="the mean of an image's colours")
    standardise: bool = Field(True, description="mean 0 and standard deviation 1 over the training items")


@dataclass(frozen=True)
class ClassifierData:
    """Inputs and classes.

    Args:
        inputs: (items, *input_shape) float32, or int64 tokens.
        labels: (items,) int64.
        task: shapes.
        train: numbers of the items to learn from, in a random order: a network that learns from a fraction of them
            takes the first ones.
        val: those of the items for validation, in a random order.
        test: those of the items for tests, in a random order.
        preparation: what was done to the source's items, as JSON.
    """

    inputs: Shaped[np.ndarray, "items *input_shape"]
    labels: Int64[np.ndarray, " items"]
    task: Task
    train: Int64[np.ndarray, " train"]
    val: Int64[np.ndarray, " val"]
    test: Int64[np.ndarray, " test"]
    preparation: dict[str, Any]


def classifier_data(recipe: Recipe, config: DataConfig, signals: Signals) -> ClassifierData:
    """Select, split and prepare the items of a source.

    Args:
        recipe: with the seed of the split; its field ``data`` is ``config``.
        config: how.
        signals: the source's items.

    Raises:
        RecipeError: no classes, too few items, a split that leaves nothing, options that do not fit the items.
    """
    place = f"recipe {recipe.name}"
    if signals.classes is None:
        raise RecipeError(
            f"{place}: source: expected classes to learn, {recipe.source.kind!r} has {_labels(signals)}"
        )
    items = np.arange(len(signals))
    if config.count is not None:
        if config.count > len(signals):
            raise RecipeError(
                f"{place}: data.count: the source has {len(signals)} items, found {config.count}"
            )
        items = np.sort(np.random.default_rng([recipe.seed, 2]).permutation(len(signals))[: config.count])
    split = divide(recipe, signals, items, "data")
    chosen = signals.take(items)
    train, val, test = (np.flatnonzero(split == part).astype(np.int64) for part in range(3))
    for name, part in {"train": train, "test": test}.items():
        if not len(part):
            raise RecipeError(f"{place}: data: no items left in the {name} split of {len(items)}")
    # in a random order: the source's may be by class, and metrics are measured on the first ones
    random = np.random.default_rng([recipe.seed, 3])
    train, val, test = (random.permutation(part) for part in (train, val, test))
    inputs, task = _inputs(place, config, chosen, signals.classes)
    preparation: dict[str, Any] = {"channels": "first", "size": config.size, "grey": config.grey}
    if config.standardise and signals.vocabulary is None:
        inputs, mean, deviation = _standardised(inputs, train)
        preparation |= {"mean": mean, "standard_deviation": deviation}
    return ClassifierData(inputs, chosen.labels, task, train, val, test, preparation)


def _labels(signals: Signals) -> str:
    return "no labels" if signals.labels.ndim != 1 else "numbers as labels"


def _inputs(place: str, config: DataConfig, signals: Signals, classes: int) -> tuple[np.ndarray, Task]:
    """What networks see, channels first, before it is standardised; classes are those of the whole source."""
    is_image = signals.vocabulary is None and len(signals.grid) == 2
    if (config.size or config.grey) and not is_image:
        field = "size" if config.size else "grey"
        raise RecipeError(
            f"{place}: data.{field}: expected images, found items of shape {list(signals.items.shape[1:])}"
        )
    if signals.vocabulary is not None:
        return signals.items, Task(signals.items.shape[1:], classes, signals.vocabulary)
    values = signals.values(np.arange(len(signals)))
    if not signals.grid:
        return values, Task(values.shape[1:], classes)
    if signals.channels is None:
        values = values[..., None]
    if is_image:
        values = _images(np.ascontiguousarray(np.moveaxis(values, -1, 1)), config)
    return values, Task(values.shape[1:], classes)


def _images(images: np.ndarray, config: DataConfig) -> np.ndarray:
    if config.grey:
        images = images.mean(1, keepdims=True)
    if config.size is None or config.size == images.shape[2:]:
        return images
    resized = [
        torch.nn.functional.interpolate(
            torch.from_numpy(images[start : start + 4096]), config.size, mode="bilinear", antialias=True
        )
        for start in range(0, len(images), 4096)
    ]
    return torch.cat(resized).numpy()


def _standardised(inputs: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, list[float], list[float]]:
    """Per channel of images (axis 1), per feature of anything else (the last axis)."""
    axis = 1 if inputs.ndim == 4 else inputs.ndim - 1
    others = tuple(other for other in range(inputs.ndim) if other != axis)
    shape = [-1 if other == axis else 1 for other in range(inputs.ndim)]
    seen = inputs[np.sort(train)]
    mean, deviation = seen.mean(others, dtype=np.float64), seen.std(others, dtype=np.float64)
    deviation = np.where(deviation > 0, deviation, 1.0)
    found = (inputs - mean.reshape(shape)) / deviation.reshape(shape)
    return found.astype(np.float32), mean.tolist(), deviation.tolist()


def noisy_labels(
    labels: Int64[np.ndarray, " items"], classes: int, share: float, seed: int, key: int
) -> Int64[np.ndarray, " items"]:
    """Labels of which a share is replaced by another class, at random.

    Args:
        labels: from 0 to classes - 1.
        classes: number of classes.
        share: of labels that are replaced, in [0, 1].
        seed: of the recipe.
        key: of the network.
    """
    random = np.random.default_rng([seed, 4, key])
    wrong = random.random(len(labels)) < share
    shift = random.integers(1, max(classes, 2), len(labels))
    return np.where(wrong, (labels + shift) % classes, labels)
