"""The data model: consistency, text, flattening."""

import json

import pytest
import torch

from weightspace.errors import SpecError
from weightspace.nets import MLP
from weightspace.spec import Cell, Dim, Exponent, Frozen, Group, Scaling, TensorSpec, WeightSpec
from weightspace.testing import mixed_spec, random_weights, tiny_specs

SPECS = {**tiny_specs(), "mixed": mixed_spec()}


@pytest.mark.parametrize("name", SPECS)
def test_json_round_trip(name):
    spec = SPECS[name]
    again = WeightSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == spec.to_json()


def test_specs_differ_when_anything_differs():
    specs = {
        WeightSpec.mlp([2, 4, 1], activation=a, w0=w)
        for a, w in [("sine", 30.0), ("sine", 1.0), ("relu", 1.0)]
    }
    assert len(specs) == 3


def test_it_prints_as_a_person_would_write_it():
    assert repr(WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)) == (
        "WeightSpec: 6 tensors, 1,185 parameters\n"
        "  hidden0: 32 units, sine, sign, phase\n"
        "  hidden1: 32 units, sine, sign, phase\n"
        "  layers.0.weight [hidden0, 2]\n"
        "  layers.0.bias   [hidden0]\n"
        "  layers.1.weight [hidden1, hidden0]\n"
        "  layers.1.bias   [hidden1]\n"
        "  layers.2.weight [hidden1]\n"
        "  layers.2.bias   []"
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_flatten_and_unflatten_are_inverse(name, batch):
    spec = SPECS[name]
    weights = random_weights(spec, batch)
    flat = spec.flatten(weights)
    assert flat.shape == (*batch, spec.num_parameters)
    again = spec.unflatten(flat)
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor)
        assert again[key].shape == (*batch, *spec.tensors[key].shape)


def test_wrong_weights_are_named():
    spec = SPECS["2-4-1 sine"]
    weights = random_weights(spec, (2,))
    with pytest.raises(SpecError, match=r"'layers\.0\.bias' should end in shape \[4\], found \[2, 5\]"):
        spec.flatten({**weights, "layers.0.bias": torch.zeros(2, 5)})
    with pytest.raises(SpecError, match=r"unknown tensor 'head\.weight'"):
        spec.flatten({**weights, "head.weight": torch.zeros(2, 5)})
    with pytest.raises(SpecError, match=r"'layers\.1\.bias' has batch shape \[3\], others \[2\]"):
        spec.batch_shape({**weights, "layers.1.bias": torch.zeros(3, 1)})
    with pytest.raises(SpecError, match="is missing"):
        spec.flatten({})
    with pytest.raises(SpecError, match="expected 17 parameters on the last axis, found 16"):
        spec.unflatten(torch.zeros(2, 16))


def spec_of(tensor, **groups):
    return WeightSpec(
        Frozen({name: Group(name, *args) for name, args in groups.items()}), Frozen({"w": tensor})
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: spec_of(TensorSpec.dense((4,), ["a"])), "unknown group 'a'"),
        (lambda: spec_of(TensorSpec.dense((4,), ["a"]), a=(3,)), "should have size 3, found 4"),
        (
            lambda: spec_of(TensorSpec((4,), (Cell((Dim(0, 1, 3, "a"),)),)), a=(3,)),
            "element 3 lies in 0 cells",
        ),
        (
            lambda: spec_of(TensorSpec((3,), (Cell((Dim(0, 1, 3, "a"),)), Cell((), 1))), a=(3,)),
            "element 1 lies in 2 cells",
        ),
        (lambda: spec_of(TensorSpec((3,), (Cell((Dim(0, 2, 3, "a"),)),)), a=(3,)), "reaches beyond"),
        (lambda: spec_of(TensorSpec.dense((3,), ["a"]), a=(3, ("b",))), "unknown group 'b'"),
        (lambda: spec_of(TensorSpec.dense((3,), ["a"]), a=(3, ("a",))), "acyclic"),
        (lambda: spec_of(TensorSpec.dense((3,), ["a"]), a=(3, ("b",)), b=(2,)), "lies within"),
        (lambda: spec_of(TensorSpec.dense((3,), ["a"]), a=(0,)), "at least 1"),
    ],
)
def test_contradictions_are_refused(build, message):
    with pytest.raises(SpecError, match=message):
        build()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": [1], "tensors": {}, "scalings": []}'])
def test_what_is_not_a_spec_is_refused(text):
    with pytest.raises(SpecError, match="not a weight-space description"):
        WeightSpec.from_json(text)


def test_tampered_json_is_validated():
    document = json.loads(SPECS["2-4-1 sine"].to_json())
    document["groups"][0]["size"] = 5
    with pytest.raises(SpecError, match="should have size 5, found 4"):
        WeightSpec.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": [2]}, "layer names"),
        ({"widths": [2, 3, 1], "layers": ["a"]}, "need 2 layer names, found 1"),
        ({"widths": [2, 3, 1], "activation": "swish2"}, "expected one of relu"),
        ({"widths": [2, 3, 1], "activation": "sine", "w0": 0.0}, "positive frequency"),
    ],
)
def test_builder_arguments_are_checked(arguments, message):
    with pytest.raises(SpecError, match=message):
        WeightSpec.mlp(**arguments)


def test_layers_of_one_unit_keep_their_scalings():
    """Nothing to permute, but a factor and its inverse; a traced spec cannot see the unit."""
    built = WeightSpec.mlp([2, 1, 1])
    assert built.random_element((3,))["hidden0"].tolist() == [[0]] * 3
    weights = random_weights(built)
    scaled = built.act({"positive(hidden0)": torch.tensor([2.0])}, weights)
    assert torch.equal(scaled["layers.0.weight"], 2 * weights["layers.0.weight"])
    assert torch.equal(scaled["layers.1.weight"], weights["layers.1.weight"] / 2)
    traced = WeightSpec.trace(MLP((2, 1, 1), activation="relu"), torch.randn(3, 2))
    assert dict(traced.groups) == dict(traced.scalings) == {}


def test_a_step_shifts_nothing_that_is_multiplied():
    tensors = {"bias": TensorSpec.dense((3,), ["a"]), "up": TensorSpec.dense((3,), ["a"])}
    place = Exponent("bias", 0, 0)
    phase = Scaling("steps", "a", "phase", (), (place,), 1.0)

    def build(*exponents):
        return WeightSpec.build(
            [Group("a", 3)], tensors, [phase, Scaling("factor", "a", "positive", exponents)]
        )

    with pytest.raises(SpecError, match="scaling 'steps': shifts by a fixed step what 'factor' multiplies"):
        build(place)
    cancelled = build(place, Exponent("bias", 0, 0, -1), Exponent("up", 0, 0))
    assert len(cancelled.scalings) == 2


def test_tied_tensors_are_flattened_once():
    tied = TensorSpec((2,), TensorSpec.dense((2,), ["a"]).cells, aliases=("same",))
    spec = WeightSpec.build([Group("a", 2)], {"w": tied})
    w = torch.tensor([1.0, 2.0])
    for stored in ({"w": w}, {"same": w}, {"w": w, "same": w}):
        assert torch.equal(spec.flatten(stored), w)
    with pytest.raises(SpecError, match="tensor 'w' is missing"):
        spec.flatten({})
