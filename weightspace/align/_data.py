"""The data on which networks are run, and how they are run: always a copy of the module, with weights as arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import DataError

Batches = Iterable[tuple[Any, Tensor]]
"""Batches of inputs and targets that can be gone over again: a DataLoader, or a list. Inputs are one tensor, or a tuple
of positional arguments."""

Loss = Callable[[Any, Tensor], Tensor]
"""The mean loss of a batch, from what the module returns and the targets."""


def runner(module: nn.Module, *, training: bool = False) -> nn.Module:
    """A copy of a module in evaluation or training mode, whose own parameters take no gradients."""
    return copy.deepcopy(module).train(training).requires_grad_(False)


def call(module: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> Any:
    """What the module computes with these weights; in training mode, statistics in ``weights`` change in place."""
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return torch.func.functional_call(module, dict(weights), arguments)


def batches(data: Batches, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Once over the data, on a device."""
    for inputs, targets in data:
        moved = tuple(part.to(device) for part in inputs) if isinstance(inputs, tuple) else inputs.to(device)
        yield moved, targets.to(device)


def check_data(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Batches,
    loss: Loss | None = None,
    what: str = "data",
) -> None:
    """Run the first batch, so that data which do not suit the module are refused before any work.

    Args:
        module: what runs.
        weights: one network.
        data: what it is given.
        loss: that is computed too, if any.
        what: what a message calls the data.

    Raises:
        DataError: there is no batch, it is no pair of inputs and targets, the data can be gone over only once, or
            the module or the loss refuse it.
    """
    if isinstance(data, Iterator):
        raise DataError(
            f"{what}: expected batches that can be gone over again, such as a DataLoader or a list"
        )
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"{what}: expected at least one batch, found none")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(f"{what}: expected pairs of inputs and targets, found {_text(first)}")
    device = next(iter(weights.values())).device
    inputs, targets = next(batches([(first[0], first[1])], device))
    try:
        with torch.no_grad():
            outputs = call(runner(module), weights, inputs)
    except Exception as error:  # whatever the user's module raises
        raise DataError(f"{what}: the module cannot be called with {_text(inputs)}: {_line(error)}") from None
    try:
        if loss is not None:
            loss(outputs, targets)
    except Exception as error:
        raise DataError(
            f"{what}: no loss of outputs {_text(outputs)} and targets {_text(targets)}: {_line(error)}"
        ) from None


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value)) or "nothing"
    return type(value).__name__


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
