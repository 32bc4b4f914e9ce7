"""The fast action on flattened networks is the action."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import SpecError
from weightspace.spec import WeightSpec, act_flat
from weightspace.testing import mixed_spec, random_spec, sine_specs, tiny_specs

NAMED = {
    "siren": WeightSpec.mlp([2, 8, 5, 1], activation="sine", w0=30.0),
    "relu": WeightSpec.mlp([3, 4, 4, 2], activation="relu"),
    "mixed": mixed_spec(),
    **{f"tiny{at}": spec for at, spec in enumerate(tiny_specs().values())},
    **{f"sine{at}": spec for at, spec in enumerate(sine_specs().values())},
}


def agree(spec, symmetries=None, networks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    element = spec.random_element((networks,), symmetries=symmetries, generator=generator)
    flat = torch.randn(networks, spec.num_parameters, generator=generator)
    before = flat.clone()
    expected = spec.flatten(spec.act(element, spec.unflatten(flat)))
    torch.testing.assert_close(act_flat(spec, element, flat), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMED)
def test_it_is_the_action(name):
    agree(NAMED[name])


@pytest.mark.parametrize("kind", ["permutation", "sign", "phase", "positive"])
@pytest.mark.parametrize("name", ["siren", "relu"])
def test_each_kind_alone(name, kind):
    if kind in NAMED[name].symmetries:
        agree(NAMED[name], [kind])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_it_is_the_action_on_random_specs(seed):
    agree(random_spec(seed), seed=seed)


def test_permutations_and_signs_are_exact():
    spec = NAMED["siren"]
    element = spec.random_element((4,), symmetries=["permutation", "sign"])
    flat = torch.randn(4, spec.num_parameters)
    torch.testing.assert_close(
        act_flat(spec, element, flat), spec.flatten(spec.act(element, spec.unflatten(flat))), rtol=0, atol=0
    )


def test_nothing_to_do_gives_a_copy():
    flat = torch.randn(2, NAMED["siren"].num_parameters)
    found = act_flat(NAMED["siren"], {}, flat)
    assert torch.equal(found, flat)
    assert found.data_ptr() != flat.data_ptr()


def test_other_types_keep_theirs():
    spec = NAMED["relu"]
    element = spec.random_element((2,), dtype=torch.float64)
    flat = torch.randn(2, spec.num_parameters, dtype=torch.float64)
    found = act_flat(spec, element, flat)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, spec.flatten(spec.act(element, spec.unflatten(flat))))


def test_by_hand():
    spec = WeightSpec.mlp([1, 2, 1], activation="relu")
    flat = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])  # W0, b0, W1, b1
    scale = next(iter(spec.scalings))
    element = {"hidden0": torch.tensor([[1, 0]]), scale: torch.tensor([[2.0, 1.0]])}
    assert act_flat(spec, element, flat).tolist() == [[4.0, 1.0, 8.0, 3.0, 3.0, 5.0, 7.0]]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"hidden0": torch.tensor([[0, 9]] * 2)}, "should be a permutation of 0 to 1"),
        ({"hidden0": torch.tensor([[0, -1]] * 2)}, "should be a permutation of 0 to 1"),
        ({"hidden0": torch.tensor([[0, 1], [1, 1]])}, "found 1 more than once in row"),
        ({"hidden0": torch.tensor([[0.0, 1.0]] * 2)}, "should hold whole numbers"),
        ({"sign(hidden0)": torch.tensor([[1.0, 0.5]] * 2)}, "should hold 1 and -1, found 0.5"),
        ({"sign(hidden0)": torch.tensor([[1.0, math.nan]] * 2)}, "should hold 1 and -1, found nan"),
        ({"hidden0": torch.tensor([[0, 1]])}, r"'hidden0' should have shape \[2, 2\], found \[1, 2\]"),
        ({"other": torch.tensor([[0, 1]] * 2)}, "'other' is neither a group nor a scaling of this spec"),
    ],
)
def test_what_is_no_element_is_refused(element, message):
    spec = WeightSpec.mlp([1, 2, 1], activation="tanh")
    with pytest.raises(SpecError, match=message):
        act_flat(spec, element, torch.zeros(2, spec.num_parameters))


@pytest.mark.parametrize(
    ("activation", "name", "values", "message"),
    [
        ("relu", "positive(hidden0)", [1.0, 0.0], "should hold finite factors above 0, found 0.0"),
        ("relu", "positive(hidden0)", [1.0, math.inf], "should hold finite factors above 0, found inf"),
        ("sine", "phase(hidden0)", [1.0, 0.3], "should hold whole numbers"),
    ],
)
def test_scalings_that_keep_no_function_are_refused(activation, name, values, message):
    spec = WeightSpec.mlp([1, 2, 1], activation=activation)
    assert name in spec.scalings
    with pytest.raises(SpecError, match=message):
        act_flat(spec, {name: torch.tensor([values] * 3)}, torch.zeros(3, spec.num_parameters))


@pytest.mark.parametrize("of", ["networks", "element"])
def test_gradients_flow_as_through_the_action(of):
    spec = NAMED["relu"]
    element = spec.random_element((2,))
    flat = torch.randn(2, spec.num_parameters)
    through = flat if of == "networks" else element["positive(hidden0)"]
    through.requires_grad_()
    coefficients = torch.randn_like(flat)
    (found,) = torch.autograd.grad((act_flat(spec, element, flat) * coefficients).sum(), through)
    moved = spec.flatten(spec.act(element, spec.unflatten(flat)))
    (expected,) = torch.autograd.grad((moved * coefficients).sum(), through)
    assert found.abs().sum() > 0
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(act_flat(spec, element, flat), act_flat(spec, element, flat.detach()))
