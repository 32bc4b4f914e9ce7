"""The activations of the networks, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["sine", "relu", "tanh", "gaussian", "leaky_relu", "gelu", "silu", "sigmoid"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
SCALED = ("sine", "gaussian")
"""Activations that a frequency factor ``w0`` multiplies the argument of; for the others it is 1."""


def _gaussian(x: Tensor) -> Tensor:
    return torch.exp(-(x * x))


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": torch.sin,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gaussian": _gaussian,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


def activate(name: str, z: Float[Tensor, "*shape"], w0: float = 1.0) -> Float[Tensor, "*shape"]:
    """``activation(w0 z)``.

    Example:
        >>> activate("gaussian", torch.tensor([0.0, 0.5]), w0=2.0)
        tensor([1.0000, 0.3679])
    """
    return _FUNCTIONS[name](z if w0 == 1.0 else w0 * z)


def frequency(activation: str, w0: float) -> float:
    """``w0`` where the activation uses it, else 1."""
    return float(w0) if activation in SCALED else 1.0
