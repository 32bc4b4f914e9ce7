"""Functional distance: hand-worked outputs, divergences against their definitions, many networks at once."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.align.judging import functional_distance
from weightspace.errors import DataError, SpecError
from weightspace.spec import WeightSpec

MODULE = nn.Linear(1, 2, bias=False)


def logits(first, second):
    return {"weight": torch.tensor([[first], [second]])}


ONES = [
    (torch.ones(3, 1), torch.zeros(3, dtype=torch.long)),
    (torch.ones(1, 1), torch.ones(1, dtype=torch.long)),
]


def test_hand_worked_distances():
    found = functional_distance(MODULE, logits(3.0, 0.0), logits(0.0, 4.0), ONES)
    assert found.mean_squared.item() == (9 + 16) / 2
    assert found.relative.item() == pytest.approx(5 / 3)
    assert found.disagreement.item() == 1.0
    assert found.samples == 4
    # two outcomes, with log odds 3 and -4: p - q times the difference of log odds, halved
    p, q = torch.tensor([3.0, -4.0], dtype=torch.float64).sigmoid()
    assert found.symmetric_kl.item() == pytest.approx(((p - q) * 7 / 2).item())


def test_divergences_are_those_of_the_softmax():
    torch.manual_seed(0)
    module = nn.Linear(4, 5).double()
    a, b = ({name: torch.randn_like(w) for name, w in module.state_dict().items()} for _ in range(2))
    inputs = torch.randn(20, 4, dtype=torch.float64)
    data = [(inputs[:13], torch.zeros(13, dtype=torch.long)), (inputs[13:], torch.zeros(7, dtype=torch.long))]
    found = functional_distance(module, a, b, data)
    p, q = (torch.func.functional_call(module, w, (inputs,)).softmax(-1) for w in (a, b))
    m = (p + q) / 2

    def kl(one, other):
        return F.kl_div(other.log(), one, reduction="batchmean")

    torch.testing.assert_close(found.symmetric_kl, (kl(p, q) + kl(q, p)) / 2)
    torch.testing.assert_close(found.jensen_shannon, (kl(p, m) + kl(q, m)) / 2)
    assert found.jensen_shannon <= math.log(2)
    back = functional_distance(module, b, a, data)
    torch.testing.assert_close(back.jensen_shannon, found.jensen_shannon)


def test_far_apart_softmaxes_reach_the_limit():
    found = functional_distance(MODULE, logits(2e4, 0.0), logits(0.0, 2e4), ONES)
    assert found.jensen_shannon.item() == pytest.approx(math.log(2))
    assert found.symmetric_kl.item() == pytest.approx(2e4)


def test_many_networks_are_compared_as_one_by_one():
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    spec = WeightSpec.trace(module, torch.ones(2, 3))
    a = module.state_dict()
    element = spec.random_element(
        (4,), symmetries=["permutation"], generator=torch.Generator().manual_seed(0)
    )
    moved = {name: w.expand(4, *w.shape).clone() for name, w in a.items()}
    moved |= spec.act(element, {name: moved[name] for name in spec.tensors})
    data = [(torch.randn(10, 3), torch.randint(3, (10,)))]
    same = functional_distance(module, a, moved, data)
    assert same.relative.shape == (4,)
    assert same.relative.max() < 1e-6
    assert same.disagreement.max() == 0.0
    moved["3.bias"] = moved["3.bias"] + torch.randn(4, 3)
    many = functional_distance(module, a, moved, data)
    for row in range(4):
        one = functional_distance(module, a, {name: w[row] for name, w in moved.items()}, data)
        for name in ("mean_squared", "relative", "disagreement", "symmetric_kl", "jensen_shannon"):
            torch.testing.assert_close(getattr(many, name)[row], getattr(one, name), rtol=1e-5, atol=1e-9)
    assert len(json.loads(many.to_json())["relative"]) == 4


def test_outputs_that_are_no_logits_have_no_divergence():
    zeros = logits(0.0, 0.0)
    data = [(torch.ones(3, 1), torch.zeros(3, 2))]
    found = functional_distance(MODULE, zeros, logits(1.0, 1.0), data)
    assert found.disagreement is found.jensen_shannon is None
    assert json.loads(found.to_json())["relative"] is None  # infinite
    assert functional_distance(MODULE, zeros, zeros, data).relative.item() == 0.0
    assert functional_distance(MODULE, zeros, zeros, data, classes=True).disagreement.item() == 0.0


def test_bad_input_is_refused():
    a = logits(1.0, 0.0)
    with pytest.raises(SpecError, match="network B: tensor 'weight' of network A is missing"):
        functional_distance(MODULE, a, {"bias": torch.ones(2)}, ONES)
    with pytest.raises(SpecError, match="network B: tensor 'weight' of network A is missing"):
        functional_distance(MODULE, a, {"bias": torch.ones(())}, ONES)
    with pytest.raises(SpecError, match="network B: expected finite values, found some in 'weight'"):
        functional_distance(MODULE, a, {"weight": torch.tensor([[[1.0], [2.0]], [[1.0], [math.nan]]])}, ONES)
    with pytest.raises(SpecError, match=r"network B: 'weight' should have shape \[2, 1\]"):
        functional_distance(MODULE, a, {"weight": torch.ones(3, 2, 2)}, ONES)
    stacked = {"weight": torch.ones(3, 2, 1), "bias": torch.ones(4, 2)}
    with pytest.raises(SpecError, match=r"network B: expected one number of networks .* found \[3, 4\]"):
        functional_distance(
            nn.Linear(1, 2), {"weight": torch.ones(2, 1), "bias": torch.ones(2)}, stacked, ONES
        )

    class Two(nn.Linear):
        def forward(self, x):
            return x, super().forward(x)

    with pytest.raises(DataError, match="module: expected one tensor as its output, found tuple"):
        functional_distance(Two(1, 2, bias=False), a, a, ONES)


def test_classes_on_the_second_axis_are_those_of_the_last_turned():
    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).mT

    torch.manual_seed(0)
    networks = [dict(nn.Linear(2, 3).state_dict()) for _ in range(3)]
    b = {name: torch.stack([network[name] for network in networks[1:]]) for name in networks[0]}
    data = [(torch.randn(4, 5, 2), torch.randint(3, (4, 5)))]
    last, second = (functional_distance(kind(2, 3), networks[0], b, data) for kind in (nn.Linear, Turned))
    for name in ("mean_squared", "relative", "disagreement", "symmetric_kl", "jensen_shannon"):
        assert torch.allclose(getattr(last, name), getattr(second, name)), name
