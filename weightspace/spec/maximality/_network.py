"""A network that can be run with many random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from weightspace.spec._types import Weights, WeightSpec
from weightspace.spec._verify import program_runner, randomised, relative_change, stored, telling_gain
from weightspace.spec.tracing import RULES, Inputs, export

REPLICATES = 3  # random networks compared at once: a ReLU that is off in one is on in another
CHECKS = 6  # further random networks on which what was found is confirmed
GAINS = (1.0, 5.0)  # at the larger one, activations reach their bounds: a ReLU6 is no ReLU
# unrolled: at one operator, too many sets of moves would have to be tried
RECURRENT = {"gru", "lstm", "rnn_tanh", "rnn_relu"}


class Network:
    """The exported graph of a module, and random weights for it.

    Raises:
        SpecError: the module cannot be exported, or the spec's tensors are not the module's.
    """

    def __init__(
        self,
        spec: WeightSpec,
        module: nn.Module,
        inputs: Inputs,
        outputs: str | Sequence[str | int] | None,
        seed: int,
    ) -> None:
        self.spec, self.inputs = spec, inputs
        self.program = export(module, inputs, outputs, set(RULES) - RECURRENT)
        self.run = program_runner(self.program, inputs)
        self._state = stored(spec, module)
        self._gain = max(1.0, telling_gain(spec, self._state, self.run, seed))
        self.generator = torch.Generator().manual_seed(seed)
        self._fresh = [self.draw(number) for number in range(CHECKS)]
        self._outputs = [self.run(weights) for weights in self._fresh]

    def draw(self, number: int) -> Weights:
        """Random weights, every other time large ones."""
        return randomised(self._state, self.generator, self._gain * GAINS[number % len(GAINS)])

    @cached_property
    def values(self) -> list[dict[str, Any]]:
        """All values of the graph, for a few random weights."""
        draws = [randomised(self._state, self.generator, self._gain) for _ in range(REPLICATES)]
        return [self.program.run(weights, self.inputs, everything=True) for weights in draws]

    def change(self, move: Callable[[Weights], Weights]) -> float:
        """Worst relative change of the outputs when random networks are changed."""
        changed = [self.run(weights | move(weights)) for weights in self._fresh]
        return max(map(relative_change, self._outputs, changed))
