"""The data on which networks are run, and how they are run: always a copy of the module, with weights as arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from weightspace.errors import DataError, SpecError
from weightspace.spec import Weights

Batches = Iterable[tuple[Any, Tensor]]
"""Batches of inputs and targets that can be gone over again: a DataLoader, or a list. Inputs are one tensor, or a tuple
of positional arguments, or a list of them, as a DataLoader makes of tuples."""

Loss = Callable[[Any, Tensor], Tensor]
"""The mean loss of a batch, from what the module returns and the targets."""


def runner(module: nn.Module, *, training: bool = False) -> nn.Module:
    """A copy of a module in evaluation or training mode, whose own parameters take no gradients."""
    return copy.deepcopy(module).train(training).requires_grad_(False)


def call(module: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> Any:
    """What the module computes with these weights; in training mode, statistics in ``weights`` change in place."""
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return torch.func.functional_call(module, untied(module, weights), arguments)


def untied(module: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """The weights with tied ones under the first of their names alone, as ``torch.func.functional_call`` wants them.

    Example:
        >>> module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        >>> module[1].weight = module[0].weight
        >>> list(module.state_dict()), list(untied(module, module.state_dict()))
        (['0.weight', '1.weight'], ['0.weight'])
    """
    first: dict[int, str] = {}
    again = set()
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        if name in weights and first.setdefault(id(tensor), name) != name:
            again.add(name)
    return {name: tensor for name, tensor in weights.items() if name not in again}


def batches(data: Batches, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Once over the data, on a device."""
    for inputs, targets in data:
        several = isinstance(inputs, tuple | list)
        moved = tuple(part.to(device) for part in inputs) if several else inputs.to(device)
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
        SpecError: a network without some of the module's tensors, or with others.
        DataError: there is no batch, it is no pair of inputs and targets, the data can be gone over only once, or
            the module or the loss refuse it.
    """
    _check_names(module, weights)
    if isinstance(data, Iterator):
        raise DataError(
            f"{what}: expected batches that can be gone over again, such as a DataLoader or a list"
        )
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"{what}: expected at least one batch, found none")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(f"{what}: expected pairs of inputs and targets, found {_text(first)}")
    leaves = [*(first[0] if isinstance(first[0], tuple | list) else first[:1]), first[1]]
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise DataError(
            f"{what}: expected inputs that are a tensor or a tuple of tensors, and targets that are a tensor, "
            f"found {_text(first)}"
        )
    device = next(iter(weights.values())).device
    inputs, targets = next(batches([(first[0], first[1])], device))
    try:
        with torch.no_grad():
            outputs = call(runner(module).to(device), weights, inputs)
    except Exception as error:  # whatever the user's module raises
        raise DataError(f"{what}: the module cannot be called with {_text(inputs)}: {_line(error)}") from None
    if loss is None:
        return
    try:
        found = loss(outputs, targets)
    except Exception as error:
        raise DataError(
            f"{what}: no loss of outputs {_text(outputs)} and targets {_text(targets)}: {_line(error)}"
        ) from None
    if not isinstance(found, Tensor) or found.ndim:
        raise DataError(f"loss: expected a scalar tensor, the mean of a batch, found {_text(found)}")


def _check_names(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """``torch.func.functional_call`` would take the module's own tensor for one that is missing, without a word."""
    tensors = dict(
        chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    )
    for name in weights:
        if name not in tensors:
            raise SpecError(f"network: {name!r} is no tensor of the module")
    given = {id(tensors[name]) for name in weights}
    for name, parameter in module.named_parameters():
        if id(parameter) not in given:
            raise SpecError(f"network: parameter {name!r} of the module is missing")


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value)) or "nothing"
    return type(value).__name__


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
