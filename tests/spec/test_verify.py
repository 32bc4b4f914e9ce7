"""Verification sees what it should, and says when it sees nothing."""

import pytest
import torch
from torch import nn

from weightspace import WeightSpec
from weightspace.errors import SpecError, SpecWarning
from weightspace.spec import verify


class After(nn.Module):
    """A perceptron whose output goes through a function."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(3, 8), nn.Linear(8, 5), function

    def forward(self, x):
        return self.function(self.second(self.first(x).relu()))


SPEC = WeightSpec.mlp([3, 8, 5], activation="relu", layers=["first", "second"])
INPUTS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [lambda y: y.argmax(-1), lambda y: y > 0, lambda y: torch.complex(y, y), lambda y: {"a": y, "b": [y]}],
    ids=["indices", "mask", "complex", "nested"],
)
def test_outputs_of_every_kind_are_compared(function):
    report = verify(SPEC, After(function), INPUTS).raise_if_wrong()
    assert report.illegal_change > 0.1


@pytest.mark.parametrize("function", [lambda y: y * 0.0, lambda y: y / 0.0 - y / 0.0], ids=["zero", "nan"])
def test_a_check_that_could_see_nothing_is_no_proof(function):
    report = verify(SPEC, After(function), INPUTS)
    assert report.is_vacuous
    with pytest.raises(SpecError, match="nothing was verified: what is no symmetry changes the output by 0e"):
        report.raise_if_wrong()


def test_a_spec_without_groups_is_no_failure():
    spec = WeightSpec.trace(nn.Linear(3, 2), INPUTS)
    report = verify(spec, nn.Linear(3, 2), INPUTS).raise_if_wrong()
    assert report.illegal_change is None
    assert not report.is_vacuous


def test_a_wrong_claim_is_named():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))
    spec = WeightSpec.mlp([3, 8, 5], activation="relu", layers=["0", "2"])
    report = verify(spec, net, INPUTS)
    assert report.by_symmetry["permutation(hidden0)"] < 1e-12
    with pytest.raises(SpecError, match=r"output changes under positive\(hidden0\)"):
        report.raise_if_wrong()


def test_bad_arguments_are_named():
    with pytest.raises(SpecError, match="draws: expected at least 1, found 0"):
        verify(SPEC, After(torch.relu), INPUTS, draws=0)
    with pytest.raises(SpecError, match="cannot be exported with these inputs"):
        verify(SPEC, After(torch.relu), torch.zeros(2, 4))
    with pytest.raises(SpecError, match=r"the module has no tensor 'first\.weight'"):
        verify(SPEC, nn.Linear(3, 5), INPUTS)


def test_tracing_says_when_nothing_could_be_verified():
    with pytest.warns(SpecWarning, match="nothing was verified: the output of After hardly changes"):
        spec = WeightSpec.trace(After(lambda y: y * 0.0), INPUTS)
    assert spec.provenance.verified_change is None


def test_tracing_is_verified_with_inputs_that_vary():
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    spec = WeightSpec.trace(net, torch.zeros(5, 3))
    assert spec.provenance.verified_change < 1e-12
