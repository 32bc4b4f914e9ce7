"""From a module to the spec of its weight space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import SpecError
from weightspace.nets import MLP, Network
from weightspace.spec import WeightSpec

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


def spec_of(module: nn.Module, example_inputs: Inputs | None = None) -> WeightSpec:
    """The spec of any module, traced; for the library's own MLPs it is written down, which is faster.

    Args:
        module: the network.
        example_inputs: what to trace it with, see :func:`weightspace.spec.trace`; not needed for the library's
            own networks, which know their inputs, and for an ``nn.Sequential`` that begins with a linear layer.

    Raises:
        SpecError: example inputs are needed, or the module cannot be traced with them.

    Example:
        >>> spec_of(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))).groups["hidden0"].activation
        'relu'
    """
    if isinstance(module, MLP):
        return WeightSpec.mlp(module.widths, activation=module.activation, w0=module.w0)
    inputs = _inputs_of(module) if example_inputs is None else example_inputs
    if inputs is None:
        raise SpecError(
            f"module: {type(module).__name__} is traced with example inputs; pass example_inputs= (or spec=)"
        )
    return WeightSpec.trace(module, inputs)


def _inputs_of(module: nn.Module) -> Tensor | None:
    """Two inputs: of a network that knows its own, or for a chain of layers that begins with a linear one."""
    if isinstance(module, Network):
        return module.example_inputs()
    if not isinstance(module, nn.Sequential):
        return None
    first = next((child for child in module if next(child.parameters(), None) is not None), None)
    return torch.zeros(2, first.in_features) if isinstance(first, nn.Linear) else None
