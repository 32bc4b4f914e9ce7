"""Loss surfaces: the plane through three networks, and how networks do there."""

import io
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.align.judging import loss_surface
from weightspace.errors import ConfigError, DataError, SpecError

SQUARES = [(torch.eye(2), torch.zeros(2, 1))]  # the loss of weights (p, q) is (p^2 + q^2) / 2


def corners(*places):
    return [{"weight": torch.tensor([place])} for place in places]


TRIANGLE = corners([0.0, 0.0], [3.0, 0.0], [1.0, 2.0])


def test_the_surface_of_a_square_loss_is_the_square_of_the_distance():
    module = nn.Linear(2, 1, bias=False)
    surface = loss_surface(
        module, TRIANGLE, SQUARES, loss=F.mse_loss, resolution=7, margin=0.5, repair="none"
    )
    assert surface.positions.tolist() == [[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]
    assert (surface.x[0], surface.x[-1]) == (-1.5, 4.5)
    assert (surface.y[0], surface.y[-1]) == (-1.0, 3.0)
    expected = (surface.y[:, None] ** 2 + surface.x[None] ** 2) / 2
    torch.testing.assert_close(surface.loss, expected, rtol=1e-5, atol=1e-6)
    assert [found.loss for found in surface.scores] == pytest.approx([0.0, 4.5, 2.5])
    assert surface.accuracy is None


def test_places_are_those_of_gram_and_schmidt():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    networks = {
        name: {
            key: torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
            for key, tensor in module.state_dict().items()
        }
        for name in ("first", "second", "third")
    }
    inputs, targets = torch.randn(30, 3), torch.randint(3, (30,))
    surface = loss_surface(module, networks, [(inputs, targets)], resolution=3, margin=0.0, repair="none")
    parameters = dict(module.named_parameters())
    w1, w2, w3 = (torch.cat([w[key].flatten() for key in parameters]).double() for w in networks.values())
    u = (w2 - w1) / (w2 - w1).norm()
    v = (w3 - w1) - ((w3 - w1) @ u) * u
    v = v / v.norm()
    expected = [[0.0, 0.0], [(w2 - w1) @ u, 0.0], [(w3 - w1) @ u, (w3 - w1) @ v]]
    torch.testing.assert_close(surface.positions, torch.tensor(expected, dtype=torch.float64))
    assert surface.names == ("first", "second", "third")
    # with y = 0 and x = 0 the grid has the first network itself, statistics included
    logits = torch.func.functional_call(module.eval(), networks["first"], (inputs,))
    assert surface.loss[0, 0].item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert surface.accuracy[0, 0].item() == pytest.approx(
        (logits.argmax(-1) == targets).double().mean().item()
    )
    assert surface.scores[0].loss == pytest.approx(surface.loss[0, 0].item(), rel=1e-5)


def test_statistics_beyond_the_networks_are_estimated_again():
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    networks = []
    for place, variance in (([1.0, 0.0], 0.1), ([0.0, 2.0], 4.0), ([2.0, 2.0], 9.0)):
        network = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        network["0.weight"], network["1.running_var"] = torch.tensor([place]), torch.tensor([variance])
        networks.append(network)
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(50, 2, generator=generator), torch.zeros(50, 1))]
    given = {"loss": F.mse_loss, "resolution": 4, "margin": 1.0}
    averaged = loss_surface(module, networks, data, repair="none", **given)
    assert averaged.loss.isnan().any()
    assert any(None in row for row in json.loads(averaged.to_json())["loss"])
    again = loss_surface(module, networks, data, **given)
    torch.testing.assert_close(again.loss, torch.ones_like(again.loss), rtol=0.05, atol=0)
    averaged.draw(io.BytesIO(), format="svg")


@pytest.mark.parametrize(
    ("networks", "change", "error", "message"),
    [
        (TRIANGLE[:2], {}, ConfigError, "networks: expected three that span a plane, found 2"),
        (
            corners([0.0, 1.0], [1.0, 2.0], [3.0, 4.0]),
            {},
            SpecError,
            "networks: expected three that span a plane, found them on one line",
        ),
        (corners([0.0, 1.0], [0.0, 1.0], [3.0, 4.0]), {}, SpecError, "found them on one line"),
        (
            corners([0.0, 1.0], [math.inf, 1.0], [3.0, 4.0]),
            {},
            SpecError,
            "network B: expected finite values",
        ),
        (TRIANGLE, {"resolution": 1}, ConfigError, "resolution: expected at least 2, found 1"),
        (TRIANGLE, {"margin": -0.1}, ConfigError, "margin: expected at least 0, found -0.1"),
        (TRIANGLE, {"test": []}, DataError, "test: expected at least one batch, found none"),
    ],
)
def test_bad_input_is_refused(networks, change, error, message):
    with pytest.raises(error, match=message):
        loss_surface(nn.Linear(2, 1, bias=False), networks, SQUARES, loss=F.mse_loss, **change)
