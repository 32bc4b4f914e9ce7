"""Which axes of a tensor are outputs and inputs: what the operator that reads it does with them."""

import json
import re

import pytest
import torch
from torch import nn

from weightspace.errors import SpecError
from weightspace.spec import Orientation, TensorSpec, WeightSpec


class Tokens(nn.Module):
    """A table of rows, one of positions, and a token of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(1, 4, 6))
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, index):
        first = self.first.expand(len(index), -1, -1)
        x = torch.cat([first, self.table(index) + self.positions], 1)
        return self.out(torch.relu(self.hidden(x)).mean(1))


class Products(nn.Module):
    """Weights that stand on either side of a product."""

    def __init__(self):
        super().__init__()
        shapes = {"right": (3, 5), "usual": (6, 5), "heads": (2, 6, 7), "left": (3, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        x = torch.tanh(torch.tanh(x @ self.right) @ self.usual.t())
        x = torch.einsum("blc,hcd->blhd", x, self.heads)
        return torch.einsum("ol,blhd->bohd", self.left, torch.tanh(x)).sum((2, 3))


def transposed():
    layers = [nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 3, groups=2))


def depthwise():
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    return nn.Sequential(*layers)


def weight_norm():
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.ConvTranspose1d(4, 5, 3)]
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(layers[0]),
        layers[1],
        nn.Unflatten(1, (4, 1)),
        nn.utils.parametrizations.weight_norm(layers[2]),
    )


G, V = "parametrizations.weight.original0", "parametrizations.weight.original1"
CASES = {
    "transposed": (
        transposed,
        torch.randn(2, 3, 6, 6),
        {"0.weight": (1, 0, 27), "2.weight": (0, None, 9), "4.weight": (1, 0, 36)},
    ),
    "depthwise": (depthwise, torch.randn(2, 3, 6, 6), {"2.weight": (0, None, 9)}),
    "tokens": (
        Tokens,
        torch.randint(11, (2, 4)),
        {"positions": (2, 1, 1), "first": (2, None, 1), "table.weight": (1, 0, 1)},
    ),
    "products": (Products, torch.randn(2, 4, 3), {"right": (1, 0, 3), "heads": (2, 1, 6)}),
    "weight norm": (
        weight_norm,
        torch.randn(2, 3),
        {f"0.{G}": (0, None, 1), f"3.{G}": (0, None, 1), f"3.{V}": (1, 0, 12)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_found_where_a_tensor_is_read(name):
    """All others are as usual: outputs on axis 0, inputs on axis 1."""
    build, inputs, expected = CASES[name]
    spec = WeightSpec.trace(build(), inputs)
    found = {
        name: (at.output, at.input, at.fan_in)
        for name, tensor in spec.tensors.items()
        if (at := tensor.orientation) is not None
    }
    assert found == expected
    again = WeightSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)


def test_the_usual_one_is_not_written_down():
    """Specs of MLPs, and so the digests of stored zoos, are what they were."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    traced = WeightSpec.trace(net, torch.randn(5, 2))
    document = json.loads(traced.to_json())
    assert list(document["tensors"]["0.weight"]) == ["shape", "cells", "kind", "aliases"]
    assert all(tensor.orientation is None for tensor in traced.tensors.values())
    assert traced == WeightSpec.mlp([2, 4, 3], layers=["0", "2"])
    assert TensorSpec.dense((8, 3, 5, 5), [None] * 4).units == Orientation(0, 1, 75)
    assert TensorSpec.dense((8,), [None]).units == Orientation(0, None, 1)
    assert TensorSpec.dense((), []).units == Orientation(None, None, 1)


@pytest.mark.parametrize("orientation", [(2, 0, 1), (0, 0, 1), (0, 1, 0), (-1, 0, 1)])
def test_impossible_ones_are_refused(orientation):
    cells = TensorSpec.dense((3, 4), [None, None]).cells
    tensor = TensorSpec((3, 4), cells, orientation=Orientation(*orientation))
    message = (
        "tensor 'w': expected an orientation with two axes of [3, 4] and a fan_in of at least 1, found Orient"
    )
    with pytest.raises(SpecError, match=re.escape(message)):
        WeightSpec.build([], {"w": tensor})


def test_what_units_apply_along_their_own_axis():
    """A softmax over units is their activation; one over positions is not."""
    for layer, name in ((nn.Softmax(-1), "softmax"), (nn.LogSigmoid(), "log_sigmoid")):
        net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 2))
        assert WeightSpec.trace(net, torch.randn(5, 3)).groups["hidden0"].activation == name
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2))
    assert WeightSpec.trace(net, torch.randn(5, 6, 3)).groups["hidden0"].activation is None
