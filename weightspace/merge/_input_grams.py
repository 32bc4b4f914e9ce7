"""What enters the linear layers and convolutions of a network: the Gram matrices of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._activations import check_runs, single
from weightspace.align._data import Batches, batches, call, runner, untied
from weightspace.spec import Weights

Rows = Float[Tensor, "rows inputs"]


def input_grams(module: nn.Module, weights: Mapping[str, Tensor], data: Batches) -> Weights:
    """``X^T X`` for the inputs ``X`` of each linear layer, one row per sample and position.

    Convolutions of images and sequences are linear layers on patches; those with several groups are left out, as
    are layers whose weight is computed (parametrisations). A layer that is called several times, or that shares its
    weight with another, has one matrix for all its inputs.

    Args:
        module: runs in evaluation mode, in float32 where weights are of half precision, and stays as it is.
        weights: a network of the module, under its ``state_dict`` names.
        data: batches of inputs and targets; the targets are not used.

    Returns:
        Under the name of each layer's weight a matrix in float64, whose order is that of the weight's axes behind
        the first. A layer that was never called has none.

    Raises:
        DataError: data that the module refuses.
        SpecError: a network without some of the module's tensors, or with others.

    Example:
        >>> module = nn.Linear(2, 3)
        >>> inputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> input_grams(module, module.state_dict(), [(inputs, torch.zeros(2))])["weight"]
        tensor([[10.,  2.],
                [ 2.,  4.]], dtype=torch.float64)
    """
    weights = untied(module, weights)
    check_runs(module, weights, data)
    device = next(iter(weights.values())).device
    network, wide = runner(module).to(device), single(weights)
    totals: Weights = {}
    with torch.no_grad(), _hooked(network, totals):
        for inputs, _ in batches(data, device):
            call(network, wide, single(inputs))
    return {name: totals[name] for name in weights if name in totals}


@contextmanager
def _hooked(network: nn.Module, totals: Weights) -> Iterator[None]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    handles = []
    for layer in network.modules():
        name = names.get(id(getattr(layer, "weight", None)))
        rows = _rows_of(layer)
        if name is not None and rows is not None:
            handles.append(layer.register_forward_pre_hook(_adding(name, rows, totals), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(
    name: str, rows: Callable[[Tensor], Iterator[Rows]], totals: Weights
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for part in rows(arguments[0] if arguments else named["input"]):
            wide = part.double()
            gram = wide.mT @ wide
            totals[name] = totals[name] + gram if name in totals else gram

    return hook


def _rows_of(layer: nn.Module) -> Callable[[Tensor], Iterator[Rows]] | None:
    """How the input of a layer is split into the rows that its weight multiplies; None for other layers."""
    if isinstance(layer, nn.Linear):
        return lambda inputs: iter([inputs.reshape(-1, inputs.shape[-1])])
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1:
        return lambda inputs: _patches(layer, inputs)
    return None


def _patches(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Iterator[Rows]:
    """Sample by sample, as patches are many times what they are cut from."""
    rank = len(layer.kernel_size)
    images = inputs if inputs.ndim == rank + 2 else inputs[None]
    padded = F.pad(
        images, _padding(layer), "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    )
    if rank == 1:
        padded = padded[..., None, :]
    kernel, dilation, stride = (
        (1, *sizes)[-2:] for sizes in (layer.kernel_size, layer.dilation, layer.stride)
    )
    for image in padded:
        columns = F.unfold(image[None], kernel, dilation=dilation, stride=stride)
        yield columns[0].mT


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """As ``F.pad`` takes it: before and after, from the last axis to the first."""
    found = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            found += [total // 2, total - total // 2]
        else:
            found += [0 if isinstance(layer.padding, str) else layer.padding[axis]] * 2
    return found
