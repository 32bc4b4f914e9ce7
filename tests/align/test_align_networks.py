"""One function that calls any matcher: what it hands on, what it puts together, what it refuses."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.align import MATCHERS, Matcher, align_networks, find_matcher, matcher
from weightspace.align._report import Stopwatch, finish
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import Group, TensorSpec, WeightSpec
from weightspace.testing import random_weights

SPEC = WeightSpec.mlp([2, 5, 4, 1], activation="tanh")
DATA = [(torch.zeros(1, 2), torch.zeros(1))]


@pytest.fixture
def calls(monkeypatch):
    """What a matcher named "stay" was called with."""
    calls = []

    def stay(spec, reference, weights, *, module=None, data=None, loss=None, seed=0, strength: float = 0.5):
        """Leaves everything as it is."""
        calls.append({"module": module, "data": data, "loss": loss, "seed": seed, "strength": strength})
        return finish(spec, "stay", reference, weights, spec.identity(), len(calls), Stopwatch())

    def register(**facts):
        monkeypatch.setitem(MATCHERS, "stay", Matcher("stay", stay, "none", **facts))
        return calls

    return register


def networks_of(count=3, spec=SPEC):
    return [random_weights(spec, seed=seed) for seed in range(count)]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype


def test_batched_matchers_are_called_once_with_the_result_of_one_call_per_pair(monkeypatch):
    networks = networks_of()
    together, report = align_networks(SPEC, networks)
    monkeypatch.setitem(
        MATCHERS, "weight-matching", dataclasses.replace(MATCHERS["weight-matching"], batched=False)
    )
    one_by_one, other = align_networks(SPEC, networks)
    for found, expected in zip(together, one_by_one, strict=True):
        assert_equal(found, expected)
    assert_equal(report.element, other.element)
    for name in ("objective", "distance_before", "distance_after", "sweeps"):
        torch.testing.assert_close(getattr(report, name), getattr(other, name))


def test_the_first_network_stays_and_is_in_the_report():
    networks = networks_of()
    aligned, report = align_networks(SPEC, networks, symmetries=("permutation", "sign"))
    assert_equal(aligned[0], networks[0])
    first = {name: value[0] for name, value in report.element.items()}
    identity = SPEC.identity()
    assert_equal(first, {name: identity[name] for name in first})
    assert report.sweeps[0] == 0
    assert report.distance_before[0] == report.distance_after[0] == 0
    norm = sum(tensor.double().square().sum() for tensor in networks[0].values())
    assert report.objective[0].item() == pytest.approx(norm.item())


def test_every_network_keeps_its_type():
    first, second, third = networks_of()
    half = {name: tensor.half() for name, tensor in third.items()}
    aligned, report = align_networks(SPEC, [first, second, half])
    for network, dtype in zip(aligned, (torch.float32, torch.float32, torch.float16), strict=True):
        assert {tensor.dtype for tensor in network.values()} == {dtype}
    assert_equal(aligned[2], SPEC.act({n: v[2] for n, v in report.element.items()}, half))


@pytest.mark.parametrize(
    ("needs", "optional", "handed"),
    [
        ((), (), set()),
        (("module", "data"), (), {"module", "data"}),
        (("module", "data", "loss"), (), {"module", "data", "loss"}),
        ((), ("module", "data", "loss"), {"module", "data", "loss"}),
    ],
)
def test_matchers_get_what_they_say_they_need(calls, needs, optional, handed):
    seen = calls(needs=needs, optional=optional)
    module = nn.Linear(2, 1)
    align_networks(SPEC, networks_of(2), "stay", module=module, data=DATA, seed=5)
    given = {"module": module, "data": DATA, "loss": F.cross_entropy}
    assert {name for name, value in seen[0].items() if name in given and value is not None} == handed
    assert all(seen[0][name] is given[name] for name in handed)
    assert seen[0]["seed"] == 5


def test_what_is_optional_may_be_missing(calls):
    seen = calls(optional=("module", "data"))
    align_networks(SPEC, networks_of(2), "stay")
    assert seen[0]["module"] is None


@pytest.mark.parametrize("missing", ["module", "data"])
def test_what_is_needed_may_not(calls, missing):
    seen = calls(needs=("module", "data"))
    given = {"module": nn.Linear(2, 1), "data": DATA, missing: None}
    with pytest.raises(ConfigError, match=f"stay: it needs {missing}, found none"):
        align_networks(SPEC, networks_of(2), "stay", **given)
    assert not seen


def test_texts_are_converted_to_options(calls):
    seen = calls()
    align_networks(SPEC, networks_of(2), "stay", strength="0.25")
    align_networks(SPEC, networks_of(2), "stay")
    assert [call["strength"] for call in seen] == [0.25, 0.5]
    with pytest.raises(ConfigError, match=r"stay: strength: .* number.*, found 'much'"):
        align_networks(SPEC, networks_of(2), "stay", strength="much")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="matcher 'weight-matching' is registered twice"):
        matcher("weight-matching", paper="none")(align_networks)


def test_matchers_are_found_by_name():
    assert find_matcher("weight-matching").effect.startswith("Reorder the units")
    assert find_matcher("weight-matching").options["max_sweeps"] == 100
    with pytest.raises(ConfigError, match=r"method: expected one of .*weight-matching.*, found 'nearest'"):
        align_networks(SPEC, networks_of(2), "nearest")


def constants_spec():
    tensors = {"scale": TensorSpec.dense((3,), ["units"])}
    return WeightSpec.build([Group("units", 3)], tensors, constants={"count": ()})


def wrong_networks():
    first, second = networks_of(2)
    counted = {"scale": torch.ones(3), "count": torch.tensor(1)}
    infinite = second["layers.1.weight"].clone()
    infinite[2, 3] = torch.inf
    return {
        "one alone": (SPEC, [first], "networks: expected at least two to align, found 1"),
        "none": (SPEC, [], "networks: expected at least two to align, found 0"),
        "missing": (
            SPEC,
            [first, {n: w for n, w in second.items() if n != "layers.0.bias"}],
            "networks: network 1: tensor 'layers.0.bias' is missing",
        ),
        "unknown": (
            SPEC,
            [{**first, "head": torch.ones(1)}, second],
            "networks: network 0: unknown tensor 'head'; expected layers.0.weight, ",
        ),
        "transposed": (
            SPEC,
            [first, {**second, "layers.0.weight": second["layers.0.weight"].mT}],
            r"networks: network 1: 'layers.0.weight' should end in shape \[5, 2\], found \[2, 5\]",
        ),
        "batch": (
            SPEC,
            [first, random_weights(SPEC, (3,))],
            r"networks: network 1: expected a single one, found batch shape \[3\]",
        ),
        "infinite": (
            SPEC,
            [first, {**second, "layers.1.weight": infinite}],
            "networks: network 1: expected finite values, but tensor 'layers.1.weight' has others",
        ),
        "fewer constants": (
            constants_spec(),
            [counted, {"scale": torch.ones(3)}],
            "networks: network 1: tensor 'count' is missing",
        ),
        "more constants": (
            constants_spec(),
            [{"scale": torch.ones(3)}, counted],
            "networks: network 0: tensor 'count' of network 1 is missing",
        ),
        "elsewhere": (
            SPEC,
            [first, {name: tensor.to("meta") for name, tensor in second.items()}],
            "networks: network 1: tensor 'layers.0.weight' is on meta, that of network 0 on cpu",
        ),
    }


@pytest.mark.parametrize("case", wrong_networks())
def test_networks_that_do_not_fit_are_refused(case):
    spec, networks, message = wrong_networks()[case]
    with pytest.raises((SpecError, ConfigError), match=message) as raised:
        align_networks(spec, networks)
    assert "\n" not in str(raised.value)
