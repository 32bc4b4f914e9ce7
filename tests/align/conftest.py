"""Small networks that were trained from different seeds, for matchers that run them."""

from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from weightspace.spec import Weights, WeightSpec


@dataclass
class Trained:
    """Networks of one architecture, trained on the same digits from different seeds, and the digits."""

    module: nn.Module
    spec: WeightSpec
    networks: list[Weights]
    data: list
    test: list

    def loss(self, weights, data=None):
        """The mean over batches; a module with statistics takes those of the batch."""
        values = []
        for inputs, targets in self.data if data is None else data:
            copied = {name: w.clone() for name, w in weights.items()}
            with torch.no_grad():
                values.append(F.cross_entropy(functional_call(self.module, copied, (inputs,)), targets))
        return torch.stack(values).mean().item()

    def between(self, first, second, share=0.5):
        return {name: torch.lerp(first[name], second[name], share) for name in self.spec.tensors}

    def barrier(self, first, second, data=None):
        """The largest excess of the loss on the straight path over that between its ends."""
        shares = [number / 6 for number in range(7)]
        losses = [self.loss(self.between(first, second, share), data) for share in shares]
        return max(
            loss - (1 - share) * losses[0] - share * losses[-1]
            for share, loss in zip(shares, losses, strict=True)
        )


def _digits():
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(digits.images, dtype=torch.float32).flatten(1)[order] / 16
    targets = torch.tensor(digits.target)[order]
    batches = [(inputs[at : at + 100], targets[at : at + 100]) for at in range(0, 1000, 100)]
    return batches, [(inputs[1000:], targets[1000:])]


def _network(width, norm):
    norms = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(
        nn.Linear(64, width), *norms, nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def _train(module, data, seed, epochs=20):
    torch.manual_seed(seed)
    for layer in module:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(epochs):
        for at in torch.randperm(len(data)).tolist():
            inputs, targets = data[at]
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), targets).backward()
            optimizer.step()


def _trained(width, count, norm=False):
    data, test = _digits()
    with torch.random.fork_rng(devices=[]):
        module = _network(width, norm)
        spec = WeightSpec.trace(_network(width, norm).eval(), data[0][0])
        networks = []
        for seed in range(count):
            _train(module, data, seed)
            state = module.state_dict()
            networks.append({name: state[name].clone() for name in spec.tensors})
    return Trained(module.train(norm), spec, networks, data, test)


@pytest.fixture(scope="session")
def trained():
    """Five perceptrons 64-24-24-10."""
    return _trained(24, 5)


@pytest.fixture(scope="session")
def trained_with_norm():
    """Two of them with batch norm, which runs on the statistics of the batch."""
    return _trained(24, 2, norm=True)
