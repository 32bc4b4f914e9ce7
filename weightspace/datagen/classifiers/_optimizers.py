"""The optimizers of a population: one formula of which SGD, Adam, AdamW and RMSprop are cases.

For every network, with gradient g (weight decay added, but for AdamW), first moment m and second moment v:

    m <- a m + b g            v <- c v + (1 - c) g^2
    w <- w (1 - lr d) - lr (m / u) / (sqrt(v / s) + e)        adaptive
    w <- w - lr m                                             SGD

| optimizer | a | b | c | u | s | e |
| --- | --- | --- | --- | --- | --- | --- |
| sgd | momentum | 1 | 0 | 1 | 1 | |
| rmsprop | 0 | 1 | 0.99 | 1 | 1 | 1e-8 |
| adam, adamw | 0.9 | 0.1 | 0.999 | 1 - 0.9^t | 1 - 0.999^t | 1e-8 |

Reference:
    Kingma and Ba 2015, "Adam", arXiv:1412.6980; Loshchilov and Hutter 2019, "Decoupled Weight Decay
    Regularization", arXiv:1711.05101; Tieleman and Hinton 2012 (RMSprop); the defaults are PyTorch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from weightspace.datagen.classifiers._kernels_update import (
    COUPLED_DECAY,
    FRESH,
    KEPT,
    MEMORY,
    MOMENTUM,
    NEW,
    RATE,
    SCALE,
    update,
)

Optimizer = Literal["sgd", "adam", "rmsprop", "adamw"]
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
_SGD, _ADAM, _ADAMW = (OPTIMIZERS.index(name) for name in ("sgd", "adam", "adamw"))

_BETA1, _BETA2, _ALPHA, _EPSILON = 0.9, 0.999, 0.99, 1e-8


@dataclass
class PopulationOptimizer:
    """Updates many networks at once, each by its own optimizer.

    Args:
        codes: (networks,) places in ``OPTIMIZERS``.
        momentum: (networks,) of SGD.
        weight_decay: (networks,).
        first: (networks, parameters) first moments.
        second: (networks, parameters) second moments.
    """

    codes: Int64[np.ndarray, " networks"]
    momentum: np.ndarray
    weight_decay: np.ndarray
    first: Float32[Tensor, "networks parameters"]
    second: Float32[Tensor, "networks parameters"]

    def take(self, rows: np.ndarray) -> PopulationOptimizer:
        """That of some networks."""
        at = torch.from_numpy(rows).to(self.first.device)
        return PopulationOptimizer(
            self.codes[rows], self.momentum[rows], self.weight_decay[rows], self.first[at], self.second[at]
        )

    def step(
        self,
        weights: Float32[Tensor, "networks parameters"],
        gradients: Float32[Tensor, "networks parameters"],
        learning_rate: np.ndarray,
        time: np.ndarray,
    ) -> tuple[Float32[Tensor, "networks parameters"], Bool[np.ndarray, " networks"]]:
        """The new weights, and whether they are finite.

        Args:
            weights: before the step.
            gradients: of the loss.
            learning_rate: (networks,) of this step.
            time: (networks,) number of this step, from 1.
        """
        coefficients, adaptive = self._coefficients(learning_rate, time)
        if weights.device.type == "cpu":
            moved, finite = torch.empty_like(weights), np.empty(len(weights), bool)
            arrays = (tensor.numpy() for tensor in (weights, gradients, self.first, self.second))
            update(*arrays, coefficients, adaptive, np.float32(_EPSILON), moved.numpy(), finite)
            return moved, finite
        moved = self._updated(weights, gradients, torch.from_numpy(coefficients), torch.from_numpy(adaptive))
        return moved, moved.isfinite().all(1).cpu().numpy()

    def _coefficients(self, learning_rate: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(networks, 8) float32 in the order of ``_kernels_update``, and which networks divide by a root."""
        is_adamw, adaptive = self.codes == _ADAMW, self.codes != _SGD
        moments = is_adamw | (self.codes == _ADAM)
        found = np.empty((len(self.codes), 8))
        found[:, COUPLED_DECAY] = np.where(is_adamw, 0.0, self.weight_decay)
        found[:, MOMENTUM] = np.where(moments, _BETA1, np.where(adaptive, 0.0, self.momentum))
        found[:, NEW] = np.where(moments, 1.0 - _BETA1, 1.0)
        found[:, MEMORY] = np.where(moments, _BETA2, _ALPHA)
        found[:, FRESH] = 1.0 - found[:, MEMORY]
        found[:, RATE] = learning_rate / np.where(moments, 1.0 - _BETA1**time, 1.0)
        found[:, SCALE] = 1.0 / np.where(moments, 1.0 - _BETA2**time, 1.0)
        found[:, KEPT] = 1.0 - np.where(is_adamw, learning_rate * self.weight_decay, 0.0)
        with np.errstate(over="ignore"):  # a rate beyond float32 is one more that diverges
            return found.astype(np.float32), adaptive

    def _updated(
        self, weights: Tensor, gradients: Tensor, coefficients: Tensor, adaptive: Tensor
    ) -> Float32[Tensor, "networks parameters"]:
        """The same in PyTorch, on any device."""
        columns = coefficients.to(weights.device)[:, :, None].unbind(1)
        decay, momentum, new, memory, fresh, rate, scale, kept = columns
        gradients = gradients.addcmul(weights, decay)
        self.first.mul_(momentum).addcmul_(gradients, new)
        self.second.mul_(memory).addcmul_(gradients.square(), fresh)
        step = rate * self.first
        divided = step / ((self.second * scale).sqrt_() + _EPSILON)
        return kept * weights - torch.where(adaptive.to(weights.device)[:, None], divided, step)
