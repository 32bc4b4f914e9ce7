"""Whole populations at once: build a network from its description, evaluate many of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.nets._mlp import MLP

_KINDS: dict[str, type[MLP]] = {"mlp": MLP}


def architecture_of(module: nn.Module) -> dict[str, Any] | None:
    """The JSON description from which :func:`build` makes ``module`` again; None for a foreign module."""
    for kind, cls in _KINDS.items():
        if type(module) is cls:
            return {"kind": kind, "arguments": cls.arguments(module)}
    return None


def build(architecture: Mapping[str, Any]) -> MLP:
    """Build a network from its JSON description (with fresh parameters).

    Raises:
        ConfigError: an unknown kind, or arguments that it does not take.

    Example:
        >>> build({"kind": "mlp", "arguments": {"widths": [2, 8, 1]}}).widths
        (2, 8, 1)
    """
    kind = architecture.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"architecture: expected kind {' or '.join(_KINDS)}, found {kind!r}")
    try:
        return _KINDS[kind](**architecture["arguments"])
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"architecture: wrong arguments for kind {kind!r}: {error}") from None


def evaluate_batch(
    module: nn.Module, weights: Mapping[str, Tensor], inputs: Float[Tensor, "..."]
) -> Float[Tensor, "networks ..."]:
    """Evaluate many networks of one architecture on the same inputs.

    Args:
        module: supplies the computation; its own parameters are not used.
        weights: tensors with one leading axis of networks.
        inputs: what every network is given; gradients flow to it and to the weights.

    Shapes:
        inputs (points, in_features) -> (networks, points, out_features) for an MLP.
    """

    def one(parameters: dict[str, Tensor]) -> Tensor:
        output: Tensor = torch.func.functional_call(module, parameters, (inputs,))
        return output

    result: Tensor = torch.vmap(one)(dict(weights))
    return result


def coordinate_grid(shape: Sequence[int]) -> Float[Tensor, "points dims"]:
    """Coordinates of a signal's samples, in [-1, 1] with the ends included, row-major.

    The last column is the fastest: for an image the columns are (row, column).

    Example:
        >>> coordinate_grid((2, 2)).tolist()
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    axes = [torch.linspace(-1.0, 1.0, size) if size > 1 else torch.zeros(1) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(shape))
