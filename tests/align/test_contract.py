"""What every registered matcher keeps to, on networks whose best alignment is known."""

import copy
import inspect
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from weightspace.align import MATCHERS, MatchReport, align_networks
from weightspace.errors import ConfigError, SpecError
from weightspace.testing import PLANTED, Planted, planted

# As much training as the networks here need: the files of the matchers that train test what it is good for.
OPTIONS = {"starlight": {"epochs": 2}, "straight-through": {"epochs": 1}}

every_method = pytest.mark.parametrize("method", MATCHERS)
every_network = pytest.mark.parametrize("network", PLANTED)


@dataclass
class Run:
    """A planted case, what it was before, and what a matcher made of it."""

    case: Planted
    before: Planted
    aligned: list
    report: MatchReport


@cache
def run(method, network):
    case = planted(network, 3 if MATCHERS[method].together else 2)
    before = copy.deepcopy(case)
    return Run(case, before, *align(method, case))


def align(method, case, **options):
    return align_networks(
        case.spec,
        case.networks,
        method,
        module=case.module,
        data=case.data,
        loss=F.cross_entropy,
        **{**OPTIONS.get(method, {}), **options},
    )


def directly(method, case, networks, **options):
    """The registered function itself, on a pair where it is one of pairs."""
    found = MATCHERS[method]
    given = {"module": case.module, "data": case.data, "loss": F.cross_entropy}
    needed = {name: value for name, value in given.items() if name in found.needs}
    arguments = [networks] if found.together else networks
    return found.function(case.spec, *arguments, **needed, **options)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype


def row(element, number):
    return {name: value[number] for name, value in element.items()}


@every_network
@every_method
def test_planted_permutations_are_recovered_under_noise(method, network):
    """Every unit of every network comes to where the first network's unit of the same origin is."""
    found = run(method, network)
    spec = found.case.spec
    origins = [
        spec.compose(row(found.report.element, number), element)
        for number, element in enumerate(found.case.elements)
    ]
    for origin in origins[1:]:
        assert_equal(origin, origins[0])
    if not MATCHERS[method].together:
        assert_equal(origins[0], found.case.elements[0])


@every_network
@every_method
def test_networks_compute_what_they_computed(method, network):
    found = run(method, network)
    (inputs, _), *_ = found.case.data
    for before, after in zip(found.case.networks, found.aligned, strict=True):
        with torch.no_grad():
            expected, outputs = (functional_call(found.case.module, w, (inputs,)) for w in (before, after))
        assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max()


@every_network
@every_method
def test_the_element_gives_the_aligned_weights_bit_for_bit(method, network):
    found = run(method, network)
    for number, (before, after) in enumerate(zip(found.case.networks, found.aligned, strict=True)):
        assert_equal(after, found.case.spec.act(row(found.report.element, number), before))


@every_network
@every_method
def test_the_report_has_an_entry_per_network(method, network):
    found = run(method, network)
    report, spec, networks = found.report, found.case.spec, len(found.case.networks)
    assert report.method == method
    for name, value in report.element.items():
        assert value.shape == (networks, *spec.unit_shape(name))
    for values in (report.objective, report.distance_before, report.distance_after):
        assert values.shape == (networks,)
        assert values.dtype == torch.float64
    assert report.sweeps.shape == (networks,)
    assert (report.distance_after <= report.distance_before * (1 + 1e-6)).all()
    assert report.summary().startswith(f"{method} of {networks} networks")


@every_network
@every_method
def test_nothing_that_was_given_is_changed(method, network):
    found = run(method, network)
    for given, before in zip(found.case.networks, found.before.networks, strict=True):
        assert_equal(given, before)
        assert not any(tensor.requires_grad for tensor in given.values())
    assert_equal(found.case.module.state_dict(), found.before.module.state_dict())
    assert not found.case.module.training
    assert all(parameter.requires_grad for parameter in found.case.module.parameters())
    for given, before in zip(found.case.data, found.before.data, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


@every_method
def test_the_same_seed_gives_the_same_bits(method):
    """Whatever the caller's random numbers are, which stay as they were."""
    first = run(method, "cnn")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():
        aligned, report = align(method, first.case)
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(report.element, first.report.element)
    for found, expected in zip(aligned, first.aligned, strict=True):
        assert_equal(found, expected)
    if report.center is not None:
        assert_equal(report.center, first.report.center)


@every_method
def test_networks_that_do_not_fit_are_refused_in_one_sentence(method):
    case = planted("mlp", 2)
    good, bad = case.networks
    nan = {**bad, "2.weight": bad["2.weight"].clone().index_fill_(0, torch.tensor(3), float("nan"))}
    wide = {**bad, "2.weight": torch.zeros(13, 16)}
    missing = {name: tensor for name, tensor in bad.items() if name != "2.bias"}
    for wrong, message in (
        (nan, r"expected finite values, .*tensor '2\.weight'"),
        (wide, r"'2\.weight' should end in shape \[12, 16\], found \[13, 16\]"),
        (missing, r"'2\.bias' is missing"),
    ):
        with pytest.raises(SpecError, match=message) as raised:
            directly(method, case, [good, wrong])
        assert "\n" not in str(raised.value)
        with pytest.raises(SpecError, match=f"network 1: .*{message}"):
            align(method, replace(case, networks=[good, wrong]))


@every_method
def test_options_that_do_not_exist_are_refused(method):
    case = planted("mlp", 2)
    with pytest.raises(ConfigError, match=f"{method}: widht: no such option; expected one of "):
        align(method, case, widht=3)
    with pytest.raises(ConfigError, match="seed: expected at least 0, found -1"):
        align(method, case, seed=-1)


@every_method
def test_it_is_documented_where_it_is_from(method):
    found = MATCHERS[method]
    documented = inspect.getdoc(found.function)
    assert found.effect.endswith(".")
    assert found.paper.startswith("arXiv:")
    assert found.paper in documented
    for name in found.options:
        assert f"    {name}: " in documented, name
