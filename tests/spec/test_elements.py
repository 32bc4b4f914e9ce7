"""The group: its action on weights, and its own structure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import SpecError
from weightspace.nets import MLP
from weightspace.spec import SYMMETRIES, WeightSpec
from weightspace.testing import mixed_spec, random_weights, tiny_specs

SPECS = {**tiny_specs(), "mixed": mixed_spec()}
DOUBLE = torch.float64
some_spec = st.sampled_from(sorted(SPECS))
seeds = st.integers(0, 2**31)


def draw(spec, seed, batch=()):
    generator = torch.Generator().manual_seed(seed)
    element = spec.random_element(batch, generator=generator)
    return {name: v.double() if v.is_floating_point() else v for name, v in element.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def test_the_convention_by_hand():
    """Unit p[i] moves to place i; a sine unit's phase step adds pi / w0 and flips what it sends on."""
    spec = WeightSpec.mlp([1, 3, 1], activation="sine", w0=2.0)
    weights = {
        "layers.0.weight": torch.tensor([[1.0], [2.0], [3.0]]),
        "layers.0.bias": torch.tensor([10.0, 20.0, 30.0]),
        "layers.1.weight": torch.tensor([[100.0, 200.0, 300.0]]),
        "layers.1.bias": torch.tensor([7.0]),
    }
    element = {
        "hidden0": torch.tensor([2, 0, 1]),
        "sign(hidden0)": torch.tensor([1.0, -1.0, 1.0]),
        "phase(hidden0)": torch.tensor([0, 0, 1]),
    }
    moved = spec.act(element, weights)
    assert moved["layers.0.weight"].flatten().tolist() == [3.0, -1.0, 2.0]
    assert moved["layers.0.bias"].tolist() == pytest.approx([30.0, -10.0, 20.0 + torch.pi / 2])
    assert moved["layers.1.weight"].flatten().tolist() == [300.0, -100.0, -200.0]
    assert moved["layers.1.bias"].tolist() == [7.0]
    assert weights["layers.0.bias"].tolist() == [10.0, 20.0, 30.0], "the caller's weights are left alone"


def test_nested_permutations_follow_their_destination():
    """new[iH, i] = old[pH[iH], p[iH, i]], checked against explicit loops."""
    spec = mixed_spec()
    weights = random_weights(spec)
    element = spec.random_element(generator=torch.Generator().manual_seed(3))
    old = weights["query"].view(3, 2, 4)
    new = spec.act(element, weights)["query"].view(3, 2, 4)
    heads, features, stream = element["heads"], element["features"], element["stream"]
    for h in range(3):
        for f in range(2):
            for s in range(4):
                assert new[h, f, s] == old[heads[h], features[h, f], stream[s]]


def test_the_fixed_rows_of_a_fused_tensor_stay():
    spec = mixed_spec()
    weights = random_weights(spec)
    element = {"heads": torch.tensor([2, 0, 1])}
    moved = spec.act(element, weights)["fused"]
    assert torch.equal(moved[6:], weights["fused"][6:])
    assert torch.equal(moved[:2], weights["fused"][4:6])


@settings(max_examples=40, deadline=None)
@given(some_spec, seeds)
def test_composition_is_one_action_after_the_other(name, seed):
    spec = SPECS[name]
    weights = random_weights(spec, (2,), seed, DOUBLE)
    first, second = draw(spec, seed, (2,)), draw(spec, seed + 1, (2,))
    assert_same(spec.act(spec.compose(second, first), weights), spec.act(second, spec.act(first, weights)))


@settings(max_examples=40, deadline=None)
@given(some_spec, seeds)
def test_the_inverse_undoes(name, seed):
    spec = SPECS[name]
    weights = random_weights(spec, (2,), seed, DOUBLE)
    element = draw(spec, seed, (2,))
    assert_same(spec.act(spec.invert(element), spec.act(element, weights)), weights)


@settings(max_examples=30, deadline=None)
@given(some_spec, seeds, st.sets(st.sampled_from(SYMMETRIES)))
def test_partial_elements_compose_and_invert(name, seed, kinds):
    """A name that is missing from an element is the identity, in every operation."""
    spec = SPECS[name]
    weights = random_weights(spec, (), seed, DOUBLE)
    whole = draw(spec, seed)
    kept = [n for n, k in _kinds(spec).items() if k in kinds]
    partial = {n: whole[n] for n in kept}
    assert_same(spec.act(spec.invert(partial), spec.act(partial, weights)), weights)
    composed = spec.act(spec.compose(whole, partial), weights)
    assert_same(composed, spec.act(whole, spec.act(partial, weights)))
    assert_same(spec.act({**spec.identity(), **partial}, weights), spec.act(partial, weights))


def _kinds(spec):
    return {**dict.fromkeys(spec.groups, "permutation"), **{n: s.kind for n, s in spec.scalings.items()}}


def test_batches_of_elements_and_of_weights_broadcast():
    spec = SPECS["2-4-4-1 tanh"]
    weights = random_weights(spec, (5,))
    elements = spec.random_element((5,), generator=torch.Generator().manual_seed(0))
    together = spec.act(elements, weights)
    for row in range(5):
        alone = spec.act({n: v[row] for n, v in elements.items()}, {n: w[row] for n, w in weights.items()})
        for name in alone:
            assert torch.equal(together[name][row], alone[name])
    orbit = spec.act(elements, {name: w[0] for name, w in weights.items()})
    assert spec.batch_shape(orbit) == (5,)
    one = {name: value[0] for name, value in elements.items()}
    assert spec.batch_shape(spec.act(one, weights)) == (5,)


@pytest.mark.parametrize(
    ("activation", "w0"), [("sine", 30.0), ("relu", 1.0), ("tanh", 1.0), ("gaussian", 3.0)]
)
def test_networks_keep_their_function(activation, w0):
    net = MLP((2, 8, 7, 3), activation=activation, w0=w0)
    spec = WeightSpec.mlp(net.widths, activation=activation, w0=w0)
    report = spec.verify(net, torch.randn(20, 2))
    report.raise_if_wrong(1e-10)
    assert report.illegal_change > 1e-2
    assert set(report.by_symmetry) == {*(f"permutation({g})" for g in spec.groups), *spec.scalings}


def test_verify_names_the_wrong_symmetry():
    """tanh is odd and a sine spec with a wrong w0 shifts by the wrong step: verify must say which."""
    net = MLP((2, 6, 6, 1), activation="sine", w0=30.0)
    wrong = WeightSpec.mlp(net.widths, activation="sine", w0=7.0)
    report = wrong.verify(net, torch.randn(20, 2))
    with pytest.raises(SpecError, match=r"phase\(hidden0\)"):
        report.raise_if_wrong()
    assert report.by_symmetry["permutation(hidden0)"] < 1e-12
    with pytest.raises(SpecError, match=r"positive\(hidden0\)"):
        WeightSpec.mlp(net.widths, activation="relu").verify(net, torch.randn(20, 2)).raise_if_wrong()


def test_verify_leaves_the_module_alone():
    net = MLP((2, 4, 1))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    WeightSpec.mlp(net.widths, activation="sine", w0=30.0).verify(net, torch.randn(4, 2))
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert net.layers[0].weight.dtype == torch.float32


def test_action_is_differentiable():
    spec = SPECS["2-4-1 sine"]
    flat = torch.randn(3, spec.num_parameters, requires_grad=True)
    element = spec.random_element((3,), generator=torch.Generator().manual_seed(0))
    spec.flatten(spec.act(element, spec.unflatten(flat))).square().sum().backward()
    assert flat.grad is not None
    assert (flat.grad != 0).all()


def test_random_elements_are_seeded_and_restricted():
    spec = SPECS["2-4-4-1 tanh"]
    a = spec.random_element((4,), generator=torch.Generator().manual_seed(1))
    b = spec.random_element((4,), generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(spec.random_element(symmetries=["sign"])) == {"sign(hidden0)", "sign(hidden1)"}
    with pytest.raises(SpecError, match="expected some of permutation"):
        spec.random_element(symmetries=["rotation"])


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"hidden9": torch.arange(4)}, "neither a group nor a scaling"),
        ({"hidden0": torch.arange(5)}, r"should end in shape \[4\]"),
        ({"hidden0": torch.arange(4).expand(3, 4)}, "does not broadcast"),
    ],
)
def test_bad_elements_are_named(element, message):
    spec = SPECS["2-4-1 sine"]
    with pytest.raises(SpecError, match=message):
        spec.act(element, random_weights(spec, (2,)))
