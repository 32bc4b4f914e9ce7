"""Losses and gradients of many classifiers of one architecture: in PyTorch anywhere, in compiled code on a CPU."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from weightspace.datagen._classifier_kernel import ClassifierKernel
from weightspace.nets import Network, dropout_state, evaluate_batch, forward_and_statistics
from weightspace.spec import WeightSpec

_CPU_BYTES = 2**25  # of feature maps that a group of networks may fill on a CPU
_CUDA_BYTES = 2**33
_ITEMS = 512  # that are evaluated at once


@dataclass(frozen=True)
class Gradients:
    """What one step needs.

    Attributes:
        loss: (networks,) mean cross entropy of each batch.
        gradients: (networks, parameters) of it; 0 for running statistics.
        weights: (networks, parameters) as given, with the running statistics that the batch has moved.
    """

    loss: Float32[Tensor, " networks"]
    gradients: Float32[Tensor, "networks parameters"]
    weights: Float32[Tensor, "networks parameters"]


class Engine(ABC):
    """Computes for whole populations; weights are flat, in the order of ``net.state_dict()``.

    A network's numbers never depend on the other networks' values.
    """

    device: torch.device = torch.device("cpu")
    is_statistic: Bool[Tensor, " parameters"] | None = None
    """Which of the weights are running statistics, if there are any: no optimizer may move or decay them."""

    @abstractmethod
    def gradients(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, "networks batch"],
        labels: Int64[np.ndarray, "networks batch"],
        keys: Int64[Tensor, " networks"] | None = None,
        rates: Float32[Tensor, " networks"] | None = None,
    ) -> Gradients:
        """The gradients of each network's mean cross entropy on its own batch.

        Args:
            weights: of all networks.
            rows: which items are in each network's batch.
            labels: what they are.
            keys: of dropout (see ``nets.random_keys``); None for none.
            rates: of dropout.
        """

    @abstractmethod
    def evaluate(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, " items"],
        labels: Int64[np.ndarray, "networks items"],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean cross entropy and accuracy of each network on the same items, (networks,) float32 each."""


def choose_engine(
    net: Network, spec: WeightSpec, inputs: Shaped[np.ndarray, "items ..."], device: str
) -> Engine:
    """Compiled code for what it can do on a CPU, else PyTorch."""
    if device == "cpu" and inputs.dtype == np.float32 and ClassifierKernel.supports(net):
        return KernelEngine(net, inputs)
    return TorchEngine(net, spec, inputs, device)


class KernelEngine(Engine):
    """Compiled code, one network per thread with all that it needs in cache.

    Args:
        net: the architecture.
        inputs: (items, *input_shape) float32.
    """

    def __init__(self, net: Network, inputs: Float32[np.ndarray, "items ..."]) -> None:
        self.kernel = ClassifierKernel(net, inputs)

    def gradients(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, "networks batch"],
        labels: Int64[np.ndarray, "networks batch"],
        keys: Int64[Tensor, " networks"] | None = None,
        rates: Float32[Tensor, " networks"] | None = None,
    ) -> Gradients:
        loss, gradients = self.kernel.gradients(
            weights.numpy(),
            rows,
            labels,
            None if keys is None else keys.numpy(),
            None if rates is None else rates.numpy(),
        )
        return Gradients(torch.from_numpy(loss), torch.from_numpy(gradients), weights)

    def evaluate(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, " items"],
        labels: Int64[np.ndarray, "networks items"],
    ) -> tuple[np.ndarray, np.ndarray]:
        common = bool((labels == labels[:1]).all())
        return self.kernel.evaluate(weights.numpy(), rows, labels[0] if common else labels)


class TorchEngine(Engine):
    """``torch.func`` over groups of networks, on any device and for any architecture.

    Args:
        net: the architecture; its own parameters are not used.
        spec: of its weight space.
        inputs: (items, *input_shape) float32, or int64 tokens.
        device: where.
        group: networks per call; by default as many as keep the feature maps of a batch in about 32 MB on a CPU,
            8 GB on a GPU.
    """

    def __init__(
        self,
        net: Network,
        spec: WeightSpec,
        inputs: Shaped[np.ndarray, "items ..."],
        device: str = "cpu",
        group: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.spec = spec
        self.inputs = torch.from_numpy(inputs).to(self.device)
        self.training = deepcopy(net).to(self.device).train()
        self.evaluation = deepcopy(net).to(self.device).eval()
        self.statistics = [name for name, entry in spec.tensors.items() if entry.kind == "statistic"]
        if self.statistics:
            marks = {
                name: torch.full_like(tensor, name in self.statistics, dtype=torch.bool, device=self.device)
                for name, tensor in net.state_dict().items()
            }
            self.is_statistic = torch.cat([marks[name].flatten() for name in spec.tensors])
        self.group, self._features = group, _features_per_item(net)

    def gradients(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, "networks batch"],
        labels: Int64[np.ndarray, "networks batch"],
        keys: Int64[Tensor, " networks"] | None = None,
        rates: Float32[Tensor, " networks"] | None = None,
    ) -> Gradients:
        extra: dict[str, Tensor] = {}
        if keys is not None and rates is not None:
            extra = dropout_state(self.training, keys.to(self.device), rates.to(self.device))
        shared = bool((rows == rows[:1]).all())
        parts = [
            self._group_gradients(
                weights[at], rows[at], labels[at], {k: v[at] for k, v in extra.items()}, shared
            )
            for at in self._groups(len(weights), rows.shape[1])
        ]
        if len(parts) == 1:
            return parts[0]
        fields = ("loss", "gradients", "weights")
        return Gradients(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})

    def _group_gradients(
        self, weights: Tensor, rows: np.ndarray, labels: np.ndarray, extra: dict[str, Tensor], shared: bool
    ) -> Gradients:
        at = torch.from_numpy(rows[0] if shared else rows).to(self.device)
        targets = torch.from_numpy(labels).to(self.device)

        def loss_of(
            flat: Tensor, x: Tensor, y: Tensor, state: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            network = {**self.spec.unflatten(flat), **state}
            output, moved = forward_and_statistics(self.training, network, x)
            return F.cross_entropy(output, y), moved

        gradients, (loss, moved) = torch.func.vmap(
            torch.func.grad_and_value(loss_of, has_aux=True), in_dims=(0, None if shared else 0, 0, 0)
        )(weights, self.inputs[at], targets, extra)
        if self.statistics:
            weights = self.spec.flatten({**self.spec.unflatten(weights), **moved})
        return Gradients(loss.detach(), gradients.detach(), weights.detach())

    def evaluate(
        self,
        weights: Float32[Tensor, "networks parameters"],
        rows: Int64[np.ndarray, " items"],
        labels: Int64[np.ndarray, "networks items"],
    ) -> tuple[np.ndarray, np.ndarray]:
        loss = torch.zeros(len(weights), device=self.device)
        correct = torch.zeros(len(weights), device=self.device)
        for start in range(0, len(rows), _ITEMS):
            # a copy: PyTorch warns of arrays that are not writable, as those that are broadcast
            x = self.inputs[torch.from_numpy(rows[start : start + _ITEMS].copy()).to(self.device)]
            targets = torch.from_numpy(labels[:, start : start + _ITEMS].copy()).to(self.device)
            for at in self._groups(len(weights), len(x)):
                logits = self._logits(weights[at], x)
                loss[at] += F.cross_entropy(logits.mT, targets[at], reduction="none").sum(1)
                correct[at] += (logits.argmax(-1) == targets[at]).sum(1)
        count = max(len(rows), 1)
        return (loss / count).cpu().numpy(), (correct / count).cpu().numpy()

    @torch.no_grad()
    def _logits(self, weights: Tensor, x: Tensor) -> Float[Tensor, "networks items classes"]:
        return evaluate_batch(self.evaluation, self.spec.unflatten(weights), x)

    def _groups(self, networks: int, items: int) -> Iterator[slice]:
        limit = _CPU_BYTES if self.device.type == "cpu" else _CUDA_BYTES
        size = self.group or max(1, min(networks, limit // (4 * items * self._features)))
        for start in range(0, networks, size):
            yield slice(start, min(start + size, networks))


def _features_per_item(net: nn.Module) -> int:
    """Numbers that the layers of a network with parameters give for one item."""
    found: list[int] = []

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append(math.prod(output.shape[1:]))

    tried = deepcopy(net).eval()
    for module in tried.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(count)
    with torch.no_grad():
        tried(tried.example_inputs(1))  # type: ignore[operator]
    return max(1, sum(found))
