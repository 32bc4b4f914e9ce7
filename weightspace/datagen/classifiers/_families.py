"""Families of networks: how the architectures of a population are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt

from weightspace.configuration import Registry
from weightspace.datagen._distributions import Distribution
from weightspace.datagen._recipe import STRICT
from weightspace.errors import RecipeError

_Value = TypeVar("_Value")

Hidden = tuple[PositiveInt, ...]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Activation = Literal["relu", "tanh", "leaky_relu", "gelu", "silu", "sigmoid"]


@dataclass(frozen=True)
class Task:
    """What a network reads and gives.

    Args:
        input_shape: of one input: (channels, height, width), (features,), (length,) of tokens or (length, features).
        classes: number of classes.
        vocabulary: number of kinds of tokens, for tokens.
    """

    input_shape: tuple[int, ...]
    classes: int
    vocabulary: int | None = None


class Draw:
    """Draws the fields of one architecture: each value depends on the seed, the field and the number alone.

    Args:
        seed: of the recipe.
        number: of the architecture.
        drawn: values of all numbers by field, shared by the draws of a population; a field is drawn for all at once.
        numbers: how many architectures there are.
    """

    def __init__(self, seed: int, number: int, drawn: dict[str, np.ndarray], numbers: int) -> None:
        self.seed, self.number, self.drawn, self.numbers = seed, number, drawn, numbers

    def __call__(self, field: str, distribution: Distribution[_Value]) -> _Value:
        """The value of a field."""
        if distribution.is_constant:
            return distribution.values[0]
        # what is drawn from, too: the same field may have other values in other layers
        key = f"{field} {distribution}"
        if key not in self.drawn:
            self.drawn[key] = distribution.sample(f"network.{field}", self.seed, self.numbers)
        value = self.drawn[key][self.number]
        return value.item() if isinstance(value, np.generic) else value

    def per_layer(
        self, field: str, distribution: Distribution[_Value], layers: int, *, each: bool
    ) -> list[_Value]:
        """The values of a field for all layers: one for all, or, with ``each``, one drawn for each."""
        if not each:
            return [self(field, distribution)] * layers
        return [self(f"{field}[{layer}]", distribution) for layer in range(layers)]


class Family(BaseModel):
    """Base of the fields under ``network:``; :meth:`architecture` draws one of the family's architectures."""

    model_config = STRICT
    kind: ClassVar[str]

    def architecture(self, draw: Draw, task: Task) -> dict[str, Any]:
        """The arguments from which ``nets.build`` makes a network of this kind.

        Raises:
            RecipeError: the family does not read such inputs.
        """
        raise AssertionError(f"{type(self).__name__} draws nothing")


FAMILIES: Registry[type[Family]] = Registry("family", "kind")
"""The networks that ``network: {kind: ...}`` names; ``@FAMILIES.register("kind")`` adds one."""


@FAMILIES.register("mlp")
class MLPFamily(Family):
    """Multilayer perceptrons of sampled depth and widths."""

    hidden: Distribution[Hidden] = Field(
        Distribution.constant((32, 32)),
        description="units per hidden layer; {choice: [[32], [64, 32]]} draws",
    )
    activation: Distribution[Activation] = Field(
        Distribution.constant("relu"), description="of hidden layers"
    )

    def architecture(self, draw: Draw, task: Task) -> dict[str, Any]:
        """Hidden layers between the flattened input and the classes."""
        _refuse_tokens(self, task)
        widths = [math.prod(task.input_shape), *draw("hidden", self.hidden), task.classes]
        found: dict[str, Any] = {"widths": widths, "activation": draw("activation", self.activation)}
        if len(task.input_shape) > 1:
            found["input_shape"] = list(task.input_shape)
        return found


@FAMILIES.register("cnn")
class CNNFamily(Family):
    """Convolutional networks of sampled depth, widths, kernels, activations and residual connections."""

    layers: Distribution[PositiveInt] = Field(Distribution.constant(3), description="number of convolutions")
    channels: Distribution[PositiveInt] = Field(Distribution.constant(16), description="of a convolution")
    kernel_size: Distribution[PositiveInt] = Field(
        Distribution.constant(3), description="of a convolution, in pixels"
    )
    stride: Distribution[PositiveInt] = Field(Distribution.constant(2), description="of a convolution")
    padding: Literal["same"] | NonNegativeInt = Field(
        "same", description="pixels of zeros on each side; same for half a kernel"
    )
    activation: Distribution[Activation] = Field(Distribution.constant("relu"), description="of a layer")
    norm: Distribution[Literal["none", "batch", "layer"]] = Field(
        Distribution.constant("none"), description="after each convolution"
    )
    residual: Distribution[Literal["none", "previous", "random"]] = Field(
        Distribution.constant("none"),
        description="previous adds each layer's input to its output; random lets each layer from the third on "
        "have, with probability one half, an earlier one but the layer before",
    )
    shortcut: Literal["projection", "shared"] = Field(
        "projection", description="of residuals between different channels"
    )
    pooling: Distribution[Literal["mean", "max", "flatten"]] = Field(
        Distribution.constant("mean"), description="before the linear layer"
    )
    per_layer: bool = Field(False, description="draw channels, kernels, strides and activations per layer")

    def architecture(self, draw: Draw, task: Task) -> dict[str, Any]:
        """Convolutions, pooling and a linear layer."""
        if len(task.input_shape) != 3:
            raise RecipeError(f"network: a cnn reads images, found inputs of shape {list(task.input_shape)}")
        layers = draw("layers", self.layers)
        fields = {
            name: draw.per_layer(name, getattr(self, name), layers, each=self.per_layer)
            for name in ("channels", "kernel_size", "stride", "activation")
        }
        return {
            "input_shape": list(task.input_shape),
            "out_features": task.classes,
            **fields,
            "padding": self.padding,
            "norm": draw("norm", self.norm),
            "residual": self._residual(draw, layers),
            "shortcut": self.shortcut,
            "pooling": draw("pooling", self.pooling),
        }

    def _residual(self, draw: Draw, layers: int) -> bool | list[int]:
        kind = draw("residual", self.residual)
        if kind != "random":
            return kind == "previous"
        coins: Distribution[bool] = Distribution("choice", (False, True))
        found = [-1] * layers
        for layer in range(2, layers):
            if draw(f"residual.is[{layer}]", coins):
                found[layer] = draw(f"residual.from[{layer}]", Distribution("integer", (0, layer - 2)))
        return found


@FAMILIES.register("resnet")
class ResNetFamily(Family):
    """Small residual networks with batch or layer normalisation."""

    blocks: Distribution[Hidden] = Field(
        Distribution.constant((1, 1, 1)), description="basic blocks per stage"
    )
    channels: Distribution[PositiveInt] = Field(
        Distribution.constant(16), description="of the stem and the first stage"
    )
    width: Distribution[PositiveFloat] = Field(Distribution.constant(1.0), description="multiplies channels")
    norm: Distribution[Literal["batch", "layer"]] = Field(
        Distribution.constant("batch"), description="after each convolution"
    )
    activation: Distribution[Activation] = Field(Distribution.constant("relu"), description="of all layers")

    def architecture(self, draw: Draw, task: Task) -> dict[str, Any]:
        """A stem, stages of basic blocks, the mean over pixels and a linear layer."""
        if len(task.input_shape) != 3:
            raise RecipeError(
                f"network: a resnet reads images, found inputs of shape {list(task.input_shape)}"
            )
        fields = {name: draw(name, getattr(self, name)) for name in type(self).model_fields}
        return {"input_shape": list(task.input_shape), "out_features": task.classes, **fields}


@FAMILIES.register("rnn")
class RNNFamily(Family):
    """Recurrent networks for sequences of tokens or numbers."""

    cell: Distribution[Literal["rnn", "gru", "lstm"]] = Field(
        Distribution.constant("gru"), description="of the recurrent layers"
    )
    hidden: Distribution[PositiveInt] = Field(Distribution.constant(32), description="units of a layer")
    embedding: Distribution[PositiveInt | None] = Field(
        Distribution.constant(None), description="features per token; null for as many as hidden"
    )
    layers: Distribution[PositiveInt] = Field(Distribution.constant(1), description="recurrent layers")

    def architecture(self, draw: Draw, task: Task) -> dict[str, Any]:
        """An embedding, recurrent layers and a linear layer on the last state."""
        if len(task.input_shape) > 2 or (len(task.input_shape) == 1 and task.vocabulary is None):
            raise RecipeError(
                f"network: an rnn reads sequences, found inputs of shape {list(task.input_shape)}"
            )
        fields = {name: draw(name, getattr(self, name)) for name in type(self).model_fields}
        return {
            "in_features": task.vocabulary or task.input_shape[1],
            "out_features": task.classes,
            "sequence": "floats" if task.vocabulary is None else "tokens",
            "length": task.input_shape[0],
            **fields,
        }


def _refuse_tokens(family: Family, task: Task) -> None:
    if task.vocabulary is not None:
        raise RecipeError(
            f"network: expected numbers as inputs of an {family.kind}, found tokens; choose an rnn"
        )
