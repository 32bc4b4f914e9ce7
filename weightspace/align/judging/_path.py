"""Networks between networks: affine combinations of weights, and how well they do on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.align._activations import check_runs, single
from weightspace.align._data import Batches, Loss, batches, call, runner
from weightspace.align._repair import layer_statistics, repair, reset_batch_norm
from weightspace.errors import DataError, SpecError
from weightspace.spec import Weights

Repair = Literal["none", "batch-norm", "repair"]
"""What is done to a network between others: nothing, statistics of BatchNorm estimated again, or REPAIR."""

_HALF = (torch.float16, torch.bfloat16)

Restore = Callable[[Weights, Sequence[float]], Weights]


@dataclass(frozen=True)
class Score:
    """How well one network does on data.

    Args:
        loss: mean over the samples.
        accuracy: share of targets that are the largest output, in [0, 1], but for those below 0, which stand for
            places without a class; None where targets are no classes.
    """

    loss: float
    accuracy: float | None = None


def check_networks(networks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse networks that are not of one kind, by the names that messages call them.

    Raises:
        SpecError: tensors that one has and another has not, shapes that differ, or values that are not finite.
    """
    (first, reference), *_ = networks.items()
    for label, network in networks.items():
        for name in [*reference, *network]:
            if name not in network or name not in reference:
                lacking, having = (label, first) if name in reference else (first, label)
                raise SpecError(f"network {lacking}: tensor {name!r} of network {having} is missing")
            if network[name].shape != reference[name].shape:
                raise SpecError(
                    f"network {label}: {name!r} should have shape {list(reference[name].shape)} as in network "
                    f"{first}, found {list(network[name].shape)}"
                )
        _check_finite(label, network)
    if not reference:
        raise SpecError(f"network {first}: expected at least one tensor, found none")


def _check_finite(label: str, network: Mapping[str, Tensor]) -> None:
    for name, tensor in network.items():
        if not bool(tensor.isfinite().all()):
            raise SpecError(f"network {label}: expected finite values, found some in {name!r} that are not")


def check_suits(
    module: nn.Module,
    networks: Sequence[Mapping[str, Tensor]],
    data: Batches,
    loss: Loss | None = None,
    what: str = "data",
) -> None:
    """Run each network on the first batch, in float32 where it is of half precision: all, as their dtypes may differ.

    Raises:
        SpecError: networks that are none of the module.
        DataError: data that the module or the loss refuse.
    """
    for network in networks:
        check_runs(module, network, data, loss, what)


def combine(networks: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> Weights:
    """``sum_i coefficients[i] * networks[i]`` where the coefficients sum to 1, tensor by tensor.

    Computed from the first network onwards, so that what all share (constants) is kept to the last bit. Half
    precision is computed in float32. Integers and booleans (counters, masks) are those of the first network.
    """
    combined = {}
    for name, first in networks[0].items():
        if not (first.is_floating_point() or first.is_complex()):
            combined[name] = first.detach().clone()
            continue
        wide = torch.promote_types(first.dtype, torch.float32)
        start = first.detach().to(wide)
        total = start.clone()
        for network, coefficient in zip(networks[1:], coefficients[1:], strict=True):
            total.add_(network[name].detach().to(wide) - start, alpha=coefficient)
        combined[name] = total.to(first.dtype)
    return combined


def restorer(
    module: nn.Module, networks: Sequence[Mapping[str, Tensor]], data: Batches, how: Repair
) -> Restore:
    """What is done to every combination of ``networks``, given its coefficients; endpoints are measured once."""
    if how == "none":
        return lambda merged, coefficients: merged
    if how == "batch-norm":
        return lambda merged, coefficients: reset_batch_norm(module, merged, data)
    statistics = tuple(layer_statistics(module, network, data) for network in networks)
    return lambda merged, coefficients: repair(
        module, merged, tuple(networks), data, coefficients=tuple(coefficients), statistics=statistics
    )


def on_device(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module in evaluation mode, on the device of the weights; float32 if they are of half precision."""
    copied = runner(module).to(next(iter(weights.values())).device)
    return copied.float() if any(tensor.dtype in _HALF for tensor in weights.values()) else copied


def outputs_of(module: nn.Module, weights: Mapping[str, Tensor], inputs: Any) -> Any:
    """What the module computes, in float32 where it would be half precision; give it from :func:`on_device`."""
    return call(module, single(dict(weights)), single(inputs))


def score(
    module: nn.Module, weights: Mapping[str, Tensor], data: Batches, loss: Loss, *, axis: int | None
) -> Score:
    """Loss, and accuracy if there are classes along an axis of the outputs. ``module`` is from :func:`on_device`."""
    device = next(iter(weights.values())).device
    total, correct, classified = torch.zeros((3,), dtype=torch.float64, device=device)
    samples = 0
    weights = single(dict(weights))
    with torch.no_grad():
        for inputs, targets in batches(data, device):
            count = len(targets) if targets.ndim else 1
            if not count:  # the mean of nothing is not a number
                continue
            outputs = outputs_of(module, weights, inputs)
            total += loss(outputs, targets).double() * count
            samples += count
            if axis is not None:
                correct += (outputs.argmax(axis) == targets).sum()
                classified += (targets >= 0).sum()
    if not samples:
        raise DataError("data: expected at least one sample, found none")
    return Score(float(total) / samples, None if axis is None else float(correct / classified.clamp_min(1)))


def class_axis(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    data: Batches,
    loss: Loss | None = None,
    wanted: bool | None = None,
    what: str = "data",
) -> int | None:
    """The axis of outputs on which classes lie, counted from the last one; None where targets are no classes.

    Args:
        module: that computes the outputs.
        weights: one network, that suits the data.
        data: of which the first batch is looked at.
        loss: that is computed, if any.
        wanted: whether targets are classes, if it is known.
        what: what a message calls the data.

    Raises:
        DataError: classes are wanted, and targets are none.
    """
    if wanted is False:
        return None
    device = next(iter(weights.values())).device
    inputs, targets = next(batches(data, device))
    with torch.no_grad():
        outputs = outputs_of(on_device(module, weights), weights, inputs)
    found = axis_of_classes(outputs, targets, loss)
    if wanted and found is None:
        raise DataError(
            f"{what}: accuracy needs targets that are classes, an integer for each vector of outputs, found "
            f"{str(targets.dtype).removeprefix('torch.')}{list(targets.shape)}"
        )
    return found


def axis_of_classes(outputs: Any, targets: Tensor, loss: Loss | None = None) -> int | None:
    """The axis of outputs of which integer targets name a place each, if there is one.

    It is the last one, or the second, as PyTorch's losses have it; the loss decides where both have the right length.

    Example:
        >>> targets = torch.zeros(2, 5, dtype=torch.long)
        >>> axis_of_classes(torch.zeros(2, 5, 3), targets), axis_of_classes(torch.zeros(2, 3, 5), targets)
        (-1, -2)
    """
    whole = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not (whole and isinstance(outputs, Tensor) and outputs.ndim):
        return None
    second = min(1 - outputs.ndim, -1)
    ours = loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)
    for axis in (second, -1) if ours else (-1, second):
        shape = list(outputs.shape)
        del shape[axis]
        if shape == list(targets.shape) and outputs.shape[axis] > 1:  # one number is no choice
            return axis
    return None
