"""What the matchers that train have in common: losses with gradients, on a copy of the module, from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weightspace.align._data import Batches, Loss, batches, call, check_data, runner
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.spec import Weights, WeightSpec


@contextmanager
def training(seed: int, device: torch.device) -> Iterator[None]:
    """Gradients, full precision and random numbers from a seed, whatever the caller's are; theirs stay as they were.

    Loaders that shuffle draw from PyTorch's own generators: without a seed of theirs no two runs would agree.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), torch.enable_grad():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class Losses:
    """The loss of any network of a weight space, on data; layers with statistics take those of the batch.

    Everything else runs as it does when a network is evaluated: dropout does nothing.

    Args:
        module: a copy, with the layers that hold statistics in training mode.
        data: batches.
        loss: of outputs and targets.
        statistics: the names of the weights that a call may overwrite.
        aliases: other names of tied weights, which follow the first.
        device: where the weights are.
    """

    module: nn.Module
    data: Batches
    loss: Loss
    statistics: frozenset[str]
    aliases: frozenset[str]
    device: torch.device

    @classmethod
    def of(
        cls, spec: WeightSpec, module: nn.Module, weights: Mapping[str, Tensor], data: Batches, loss: Loss
    ) -> Losses:
        """Check that the module takes the data, and copy it.

        Raises:
            DataError: it does not.
        """
        check_data(module, weights, data, loss)
        device = next(iter(weights.values())).device
        copied = runner(module).to(device)
        names = frozenset(name for name, tensor in spec.tensors.items() if tensor.kind == "statistic")
        for name in names:
            copied.get_submodule(name.rpartition(".")[0]).training = True
        aliases = frozenset(alias for tensor in spec.tensors.values() for alias in tensor.aliases)
        return cls(copied, data, loss, names, aliases, device)

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Once over the data, without batches of a single item where statistics are taken: there are none of one.

        Raises:
            DataError: nothing is left.
        """
        found = False
        for inputs, targets in batches(self.data, self.device):
            if not self.statistics or len(targets) > 1:
                found = True
                yield inputs, targets
        if not found:
            raise DataError("data: expected batches of several items, of which statistics can be taken")

    def of_batch(self, weights: Mapping[str, Tensor], inputs: Any, targets: Tensor) -> Float[Tensor, ""]:
        """The mean loss of a network on one batch, with gradients for its parameters."""
        kept = {
            name: tensor.detach().clone() if name in self.statistics else tensor
            for name, tensor in weights.items()
            if name not in self.aliases
        }
        value: Tensor = self.loss(call(self.module, kept, inputs), targets)
        return value

    @torch.no_grad()
    def mean(self, weights: Mapping[str, Tensor]) -> float:
        """The mean loss of a network over all items."""
        total, items = 0.0, 0
        for inputs, targets in self.batches():
            total += self.of_batch(weights, inputs, targets).item() * len(targets)
            items += len(targets)
        return total / items


def between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float, like: Mapping[str, Tensor]
) -> Weights:
    """The network ``(1 - share) start + share end``; what either lacks, and the types, are those of ``like``."""
    return {
        name: torch.lerp(*_alike(start[name], end[name]), share).to(tensor.dtype)
        if name in start and name in end
        else tensor
        for name, tensor in like.items()
    }


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.to(dtype), second.to(dtype)


def check_pair(spec: WeightSpec, reference: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse networks that are not whole, not finite, or more than one where one is expected.

    Raises:
        SpecError: the first such network, and its tensor.
    """
    for role, network in (("reference", reference), ("weights", weights)):
        try:
            batch = spec.batch_shape(network)
        except SpecError as error:
            raise SpecError(f"{role}: {str(error).removeprefix('weights: ')}") from None
        if batch:
            raise SpecError(f"{role}: expected a single network, found batch shape {list(batch)}")
        for name, tensor in spec.tensors.items():
            if tensor.kind == "parameter" or role == "weights":
                _check_tensor(role, name, network)


def _check_tensor(role: str, name: str, network: Mapping[str, Tensor]) -> None:
    if name not in network:
        raise SpecError(f"{role}: tensor {name!r} is missing")
    if not bool(network[name].isfinite().all()):
        raise SpecError(f"{role}: expected finite values, but tensor {name!r} has others")


def check_options(*, seed: int, **positive: float | int) -> None:
    """Refuse a negative seed, and what is not above zero.

    Raises:
        ConfigError: the first such option.
    """
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, found {seed}")
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name}: expected more than 0, found {value}")
