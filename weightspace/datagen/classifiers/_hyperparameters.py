"""How networks are trained: each field a constant or a distribution, drawn into one vector per field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from weightspace.datagen._distributions import Distribution
from weightspace.datagen._recipe import STRICT
from weightspace.datagen.classifiers._families import Rate
from weightspace.datagen.classifiers._initialisers import Initialiser
from weightspace.datagen.classifiers._optimizers import Optimizer

_constant = Distribution.constant
Seed = Annotated[int, Field(ge=0, lt=2**62)]  # int64 holds it, and what is added to it


class TrainingConfig(BaseModel):
    """Hyperparameters; each may be a distribution, with one value per network."""

    model_config = STRICT

    optimizer: Distribution[Optimizer] = Field(_constant("adam"), description="with PyTorch's defaults")
    learning_rate: Distribution[PositiveFloat] = Field(_constant(1e-3), description="of the optimizer")
    schedule: Distribution[Literal["constant", "cosine"]] = Field(
        _constant("constant"),
        description="of the learning rate; cosine falls to 0 over a network's own steps",
    )
    momentum: Distribution[Rate] = Field(_constant(0.9), description="of SGD")
    weight_decay: Distribution[NonNegativeFloat] = Field(
        _constant(0.0), description="added to the gradient; for adamw apart from it"
    )
    dropout: Distribution[Rate] = Field(_constant(0.0), description="rate after every hidden layer")
    initialiser: Distribution[Initialiser] = Field(
        _constant("pytorch"), description="of weights; pytorch: its layers' defaults, biases included"
    )
    initial_scale: Distribution[PositiveFloat] = Field(
        _constant(1.0), description="multiplies the initial weights"
    )
    fraction: Distribution[PositiveFloat] = Field(
        _constant(1.0), le=1.0, description="of the training items that a network learns from"
    )
    subset: Distribution[Literal["first", "own"]] = Field(
        _constant("first"),
        description="which items a fraction is: the same first ones for all, or a network's own",
    )
    label_noise: Distribution[NonNegativeFloat] = Field(
        _constant(0.0), le=1.0, description="share of its training labels that are replaced by other classes"
    )
    batch_size: Distribution[PositiveInt] = Field(_constant(128), description="items per step")
    epochs: Distribution[PositiveInt] = Field(_constant(5), description="passes over its training items")
    seed: Distribution[Seed | None] = Field(
        _constant(None),
        description="of parameters, order, dropout and noise: networks of equal seeds share them; null for the "
        "network's number",
    )


CODED: dict[str, tuple[str, ...]] = {
    "optimizer": get_args(Optimizer),
    "schedule": ("constant", "cosine"),
    "subset": ("first", "own"),
    "initialiser": get_args(Initialiser),
}
"""Hyperparameters with names: the file holds their places in these lists."""


@dataclass(frozen=True)
class Hyperparameters:
    """One vector per field of :class:`TrainingConfig`, names as codes (``CODED``).

    Args:
        values: (networks,) int64 or float64 each.
    """

    values: Mapping[str, np.ndarray]

    def __getitem__(self, field: str) -> np.ndarray:
        return self.values[field]

    def take(self, rows: np.ndarray) -> Hyperparameters:
        """Those of some networks."""
        return Hyperparameters({field: values[rows] for field, values in self.values.items()})

    def stored(self) -> dict[str, np.ndarray]:
        """As a zoo keeps them: int64 or float32."""
        return {
            field: values if values.dtype == np.int64 else values.astype(np.float32)
            for field, values in self.values.items()
        }


def draw_hyperparameters(config: TrainingConfig, seed: int, networks: np.ndarray) -> Hyperparameters:
    """The hyperparameters of some networks; each value depends on the seed, the field and the network's number.

    Args:
        config: distributions.
        seed: of the recipe.
        networks: (networks,) int64 numbers.
    """
    found: dict[str, np.ndarray] = {}
    for field in TrainingConfig.model_fields:
        distribution: Distribution[Any] = getattr(config, field)
        values = distribution.sample(f"training.{field}", seed, networks)
        if field in CODED:
            values = np.array([CODED[field].index(value) for value in values], dtype=np.int64)
        elif field == "seed":
            own = [number if value is None else value for number, value in zip(networks, values, strict=True)]
            values = np.array(own, dtype=np.int64)
        found[field] = values.astype(np.int64 if values.dtype.kind == "i" else np.float64)
    return Hyperparameters(found)
