"""The fast action on flattened networks is the action."""

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
        ({"hidden0": torch.tensor([[0, 9]] * 2)}, "holds numbers of units that its group does not have"),
        ({"hidden0": torch.tensor([[0, -1]] * 2)}, "holds numbers of units that its group does not have"),
        ({"hidden0": torch.tensor([[0, 1]])}, r"'hidden0' should have shape \[2, 2\], found \[1, 2\]"),
        ({"other": torch.tensor([[0, 1]] * 2)}, "the spec has no group or scaling 'other'"),
    ],
)
def test_what_is_no_element_is_refused(element, message):
    spec = WeightSpec.mlp([1, 2, 1], activation="tanh")
    with pytest.raises(SpecError, match=message):
        act_flat(spec, element, torch.zeros(2, spec.num_parameters))
