"""Metanetworks that run the networks they read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightspace.models._baselines import perceptron
from weightspace.nets import evaluate_batch
from weightspace.spec import Weights


class Probe(nn.Module):
    """Send learned inputs through the networks themselves and read what comes back.

    Invariant to every symmetry of the networks, since their function is all that it sees.

    Args:
        network: a network of the population's architecture; supplies the computation only.
        out_features: size of the output.
        probes: number of learned inputs, initialised uniformly in [-1, 1].
        hidden: units per hidden layer of the MLP that reads the outputs.
        dropout: after each hidden layer.

    Shapes:
        Weights (not normalised) with one batch axis -> (batch, out_features).

    Reference:
        Kahana et al. 2024, "Deep Linear Probe Generators for Weight Space Learning", arXiv:2410.10811, section 3
        (the baseline with free probes).
    """

    def __init__(
        self,
        network: nn.Module,
        in_features: int,
        network_out_features: int,
        out_features: int,
        *,
        probes: int = 64,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # held in a tuple: its parameters are those of no network in the zoo, and are not to be trained
        self._network = (copy.deepcopy(network).requires_grad_(False),)
        self.probes = nn.Parameter(torch.rand(probes, in_features) * 2.0 - 1.0)
        self.read = nn.Sequential(
            nn.BatchNorm1d(probes * network_out_features),
            *perceptron(probes * network_out_features, hidden, out_features, dropout=dropout),
        )

    def forward(self, weights: Weights) -> Tensor:
        """Read a batch of networks."""
        answers = evaluate_batch(self._network[0], weights, self.probes)
        out: Tensor = self.read(answers.flatten(1))
        return out
