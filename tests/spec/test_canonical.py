"""Canonical networks: one per orbit, found exactly, and left as they are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from weightspace.errors import SpecError
from weightspace.nets import MLP
from weightspace.spec import Cell, Dim, Exponent, Group, Scaling, TensorSpec, WeightSpec, canonicalize
from weightspace.testing import mixed_spec, random_weights, sine_specs, tiny_specs

DOUBLE = torch.float64
EXACT = ("permutation", "sign")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def scaling(kind, group, *exponents, name="", **options):
    places = tuple(Exponent(*place) for place in exponents)
    return Scaling(name or f"{kind}({group})", group, kind, places, **options)


def attention_spec():
    """Heads that own features twice: q with k, signed, and v with o, scaled; a stream that all share."""
    stream, heads, keys, width = 5, 3, 2, 4

    def head_rows(group, size):
        dims = (
            Dim(0, size * stream, heads, "heads"),
            Dim(0, stream, size, group, (0,)),
            Dim(1, 1, stream, "stream"),
        )
        return TensorSpec((heads * size, stream), (Cell(dims),))

    columns = (
        Dim(0, heads * width, stream, "stream"),
        Dim(1, width, heads, "heads"),
        Dim(1, 1, width, "v", (1,)),
    )
    tensors = {
        "embed": TensorSpec.dense((7, stream), [None, "stream"]),
        "q": head_rows("qk", keys),
        "k": head_rows("qk", keys),
        "v": head_rows("v", width),
        "o": TensorSpec((stream, heads * width), (Cell(columns),)),
        "norm": TensorSpec.dense((stream,), ["stream"], kind="statistic"),
    }
    groups = (
        Group("stream", stream),
        Group("heads", heads),
        Group("qk", keys, ("heads",)),
        Group("v", width, ("heads",)),
    )
    readers = [(name, 0, 2) for name in ("q", "k", "v")]
    scalings = [
        scaling("sign", "v", ("v", 0, 1), ("o", 0, 2)),
        scaling("positive", "v", ("v", 0, 1), ("o", 0, 2, -1)),
        scaling("positive", "qk", ("q", 0, 1, 1), ("k", 0, 1, -1)),
        scaling("sign", "qk", ("q", 0, 1), ("k", 0, 1)),
        scaling("sign", "stream", *readers, ("o", 0, 0), ("embed", 0, 1)),
    ]
    return WeightSpec.build(groups, tensors, scalings, {"positions": (7,)})


def recurrent_spec():
    """tanh units that read themselves: signs on both axes of one tensor."""
    tensors = {
        "hh": TensorSpec.dense((6, 6), ["h", "h"]),
        "ih": TensorSpec.dense((6, 2), ["h", None]),
        "bias": TensorSpec.dense((6,), ["h"]),
        "out": TensorSpec.dense((3, 6), [None, "h"]),
    }
    flips = scaling("sign", "h", ("hh", 0, 0), ("hh", 0, 1), ("ih", 0, 0), ("bias", 0, 0), ("out", 0, 1))
    return WeightSpec.build([Group("h", 6)], tensors, [flips])


def gated_spec():
    """Two factors for one group, with other powers: one unit's output multiplies another's."""
    tensors = {
        "gate": TensorSpec.dense((5, 3), ["h", None]),
        "up": TensorSpec.dense((5, 3), ["h", None]),
        "mean": TensorSpec.dense((5,), ["h"], kind="statistic"),
        "var": TensorSpec.dense((5,), ["h"], kind="statistic"),
        "down": TensorSpec.dense((2, 5), [None, "h"]),
    }
    factors = [
        scaling("positive", "h", ("mean", 0, 0, 2), ("var", 0, 0, 3), ("down", 0, 1, -1), name="first"),
        scaling("positive", "h", ("up", 0, 0, 2), ("down", 0, 1, -1), ("mean", 0, 0), name="second"),
    ]
    return WeightSpec.build([Group("h", 5)], tensors, factors)


SPECS = {
    **tiny_specs(),
    "mixed": mixed_spec(),
    "attention": attention_spec(),
    "recurrent": recurrent_spec(),
    "gated": gated_spec(),
    **sine_specs(),
    "deep sine": WeightSpec.mlp([2, 6, 5, 4, 3], activation="sine", w0=4.0),
    "deep relu": WeightSpec.mlp([3, 8, 7, 6, 2], activation="relu"),
    "wide input": WeightSpec.mlp([20, 9, 1], activation="leaky_relu"),
    "gelu": WeightSpec.mlp([2, 6, 6, 1], activation="gelu"),
}
some_spec = st.sampled_from(sorted(SPECS))
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])


def networks(spec, batch=(), seed=0, dtype=torch.float32):
    """Random weights of a spec, its constants included."""
    constants = {
        name: torch.arange(math.prod(shape)).expand(*batch, *shape) for name, shape in spec.constants.items()
    }
    return {**random_weights(spec, batch, seed, dtype), **constants}


def few_values(spec, batch=(), seed=0, dtype=torch.float32):
    """Networks full of zeros and of equal units."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-2.0, -1.0, -0.0, 0.0, 0.0, 1.0], dtype=dtype)
    picked = torch.randint(len(values), (*batch, spec.num_parameters), generator=generator)
    return {**networks(spec, batch), **spec.unflatten(values[picked])}


def moved(spec, weights, seed, symmetries=None):
    generator = torch.Generator().manual_seed(seed)
    element = spec.random_element(spec.batch_shape(weights), symmetries=symmetries, generator=generator)
    double = {name: v.double() if v.is_floating_point() else v for name, v in element.items()}
    return spec.act(double, weights)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        bits = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
        assert torch.equal(found[name].contiguous().view(bits), tensor.contiguous().view(bits)), name


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


# -- by hand -----------------------------------------------------------------------------------------------


def test_a_sine_network_by_hand():
    """Signs from what enters, then biases into (-1/2, 1/2] of pi / w0 = pi / 2, then the order."""
    spec = WeightSpec.mlp([2, 3, 1], activation="sine", w0=2.0)
    half = math.pi / 2
    weights = {
        "layers.0.weight": torch.tensor([[1.0, -4.0], [3.0, 2.0], [0.0, 0.0]]),
        "layers.0.bias": torch.tensor([half - 0.25, 2 * half + 0.5, 0.125]),
        "layers.1.weight": torch.tensor([[10.0, 20.0, 30.0]]),
        "layers.1.bias": torch.tensor([7.0]),
    }
    canonical, element = spec.canonicalize(weights)
    # the unit (1, -4) becomes (-1, 4) with bias 0.25 - half: one step up makes it 0.25 and flips 10 twice
    assert canonical["layers.0.weight"].tolist() == [[-1.0, 4.0], [0.0, 0.0], [3.0, 2.0]]
    assert canonical["layers.0.bias"].tolist() == pytest.approx([0.25, 0.125, 0.5])
    assert canonical["layers.1.weight"].tolist() == [[10.0, 30.0, 20.0]]
    assert canonical["layers.1.bias"].tolist() == [7.0]
    assert element["hidden0"].tolist() == [0, 2, 1]
    assert element["sign(hidden0)"].tolist() == [-1.0, 1.0, 1.0]
    assert element["phase(hidden0)"].tolist() == [1, 0, -2]


def test_half_a_shift_is_rounded_down():
    """A bias of exactly half a shift stays; minus half a shift is the same function and becomes it."""
    spec = WeightSpec.mlp([1, 2, 1], activation="sine", w0=math.pi)  # a shift of 1
    weights = {
        "layers.0.weight": torch.tensor([[1.0], [2.0]]),
        "layers.0.bias": torch.tensor([0.5, -2.5]),
        "layers.1.weight": torch.tensor([[3.0, 4.0]]),
        "layers.1.bias": torch.tensor([0.0]),
    }
    canonical, element = canonicalize(spec, weights)
    assert canonical["layers.0.bias"].tolist() == [0.5, 0.5]
    assert canonical["layers.1.weight"].tolist() == [[3.0, -4.0]]
    assert element["phase(hidden0)"].tolist() == [0, 3]


def test_a_relu_network_by_hand():
    """Each unit is divided by the largest entry or bias that enters it; the next layer is rescaled first."""
    spec = WeightSpec.mlp([1, 2, 1, 1], activation="relu")
    weights = {
        "layers.0.weight": torch.tensor([[4.0], [-1.0]]),
        "layers.0.bias": torch.tensor([1.0, 2.0]),
        "layers.1.weight": torch.tensor([[2.0, 1.0]]),
        "layers.1.bias": torch.tensor([4.0]),
        "layers.2.weight": torch.tensor([[3.0]]),
        "layers.2.bias": torch.tensor([5.0]),
    }
    canonical, element = canonicalize(spec, weights)
    assert canonical["layers.0.weight"].flatten().tolist() == [-0.5, 1.0]
    assert canonical["layers.0.bias"].tolist() == [1.0, 0.25]
    assert canonical["layers.1.weight"].tolist() == [[0.25, 1.0]]  # (2 * 1, 4 * 2) / 8
    assert canonical["layers.1.bias"].tolist() == [0.5]
    assert canonical["layers.2.weight"].tolist() == [[24.0]]
    assert canonical["layers.2.bias"].tolist() == [5.0]
    assert element["positive(hidden0)"].tolist() == [0.5, 0.25]
    assert element["positive(hidden1)"].tolist() == [0.125]


# -- one per orbit -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(some_spec, seeds, dtypes)
def test_permutations_and_signs_are_undone_to_the_bit(name, seed, dtype):
    spec = SPECS[name]
    weights = networks(spec, (3,), seed, dtype)
    canonical, _ = spec.canonicalize(weights)
    assert_same_bits(spec.canonicalize(moved(spec, weights, seed, EXACT))[0], canonical)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SPECS)
def test_factors_and_phases_are_undone_to_rounding(name, dtype):
    """Seeds are fixed: a bias at half a shift may be rounded to either end."""
    spec = SPECS[name]
    for seed in range(8):
        weights = networks(spec, (3,), seed, dtype)
        canonical, _ = spec.canonicalize(weights)
        again, _ = spec.canonicalize(moved(spec, weights, seed))
        assert_close(again, canonical, 4 * TOLERANCE[dtype])


@settings(max_examples=60)
@given(some_spec, seeds, dtypes, st.sampled_from([networks, few_values]))
def test_canonical_networks_are_left_alone(name, seed, dtype, draw):
    """To the bit, with zeros and equal units as well; their element is the identity."""
    spec = SPECS[name]
    canonical, _ = spec.canonicalize(draw(spec, (4,), seed, dtype))
    again, element = spec.canonicalize(canonical)
    assert_same_bits(again, canonical)
    for key, value in spec.identity().items():
        assert torch.equal(element[key].to(value), value.expand_as(element[key])), key


@settings(max_examples=60)
@given(some_spec, seeds, dtypes, st.sampled_from([networks, few_values]))
def test_the_element_leads_to_the_canonical_network(name, seed, dtype, draw):
    spec = SPECS[name]
    weights = draw(spec, (2, 2), seed, dtype)
    before = {key: tensor.clone() for key, tensor in weights.items()}
    canonical, element = spec.canonicalize(weights)
    assert element.keys() == spec.identity().keys()
    assert spec.batch_shape(canonical) == (2, 2)
    assert_close(spec.act(element, weights), canonical, 4 * TOLERANCE[dtype])
    assert_same_bits(weights, before)


@settings(max_examples=40)
@given(some_spec, seeds)
def test_other_orbits_have_other_representatives(name, seed):
    """One weight is doubled, which is no symmetry of any of these specs."""
    spec = SPECS[name]
    weights = networks(spec, (), seed, DOUBLE)
    flat = spec.flatten(weights).clone()
    flat[seed % len(flat)] *= 2.0
    changed = {**weights, **spec.unflatten(flat)}
    found, expected = (spec.flatten(spec.canonicalize(w)[0]) for w in (changed, weights))
    assert not torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("draw", [networks, few_values])
@pytest.mark.parametrize("name", SPECS)
def test_each_network_is_treated_on_its_own(name, draw):
    spec = SPECS[name]
    weights = draw(spec, (2, 3), seed=5)
    together, elements = spec.canonicalize(weights)
    for row in [(0, 0), (0, 2), (1, 1)]:
        alone, element = spec.canonicalize({key: tensor[row] for key, tensor in weights.items()})
        assert_same_bits(alone, {key: tensor[row] for key, tensor in together.items()})
        assert_same_bits(element, {key: value[row] for key, value in elements.items()})


@pytest.mark.parametrize("name", SPECS)
def test_an_empty_batch_stays_empty(name):
    canonical, element = SPECS[name].canonicalize(networks(SPECS[name], (0, 2)))
    assert SPECS[name].batch_shape(canonical) == (0, 2)
    assert all(value.shape[:2] == (0, 2) for value in element.values())


@pytest.mark.parametrize("activation", ["sine", "relu", "tanh", "gaussian"])
def test_networks_keep_their_function(activation):
    net = MLP((2, 8, 7, 3), activation=activation, w0=6.0).double()
    spec = WeightSpec.mlp(net.widths, activation=activation, w0=6.0)
    weights = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    canonical, _ = spec.canonicalize(weights)
    inputs = torch.rand(50, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    assert any(not torch.equal(canonical[name], weights[name]) for name in weights)
    torch.testing.assert_close(functional_call(net, canonical, inputs), net(inputs), rtol=0, atol=1e-9)


# -- normal form -------------------------------------------------------------------------------------------


def test_what_is_normalised():
    """Largest entering magnitude 1 for ReLU; for sine, positive, and biases within half a shift."""
    relu, sine = SPECS["deep relu"], SPECS["deep sine"]
    canonical, _ = relu.canonicalize(networks(relu, (6,)))
    for layer in range(3):
        entering = torch.cat(
            [canonical[f"layers.{layer}.weight"], canonical[f"layers.{layer}.bias"][..., None]], -1
        )
        assert (entering.abs().amax(-1) == 1).all()
    canonical, _ = sine.canonicalize({name: 3 * w for name, w in networks(sine, (6,)).items()})
    for layer in range(3):
        weight, bias = canonical[f"layers.{layer}.weight"], canonical[f"layers.{layer}.bias"]
        assert (weight.amax(-1) > -weight.amin(-1)).all()
        assert (bias.abs() <= math.pi / 8 * (1 + 1e-6)).all()
    assert (canonical["layers.0.weight"][..., 0].diff(dim=-1) >= 0).all()


def test_several_factors_of_one_group():
    """Only "var" and "up" are multiplied by one alone: "var" decides the first, and then the smallest power."""
    spec = SPECS["gated"]
    canonical, _ = spec.canonicalize(networks(spec, (4,), dtype=DOUBLE))
    assert (canonical["var"].abs() == 1).all()
    assert (canonical["mean"].abs() == 1).all()
    assert (canonical["up"].abs().amax(-1) != 1).all()
    silent = {**networks(spec, (4,), dtype=DOUBLE), "mean": torch.zeros(4, 5, dtype=DOUBLE)}
    canonical, _ = spec.canonicalize(silent)
    assert (canonical["up"].abs().amax(-1) == 1).all()


def test_huge_biases_find_their_phase():
    spec = WeightSpec.mlp([1, 2, 1], activation="sine", w0=30.0)
    weights = {**networks(spec), "layers.0.bias": torch.tensor([1e9, -3e12])}
    canonical, _ = spec.canonicalize(weights)
    assert (canonical["layers.0.bias"].abs() <= math.pi / 60 * (1 + 1e-6)).all()
    assert_same_bits(spec.canonicalize(canonical)[0], canonical)


# -- equal units -------------------------------------------------------------------------------------------


def plain_spec(**shapes):
    """Tensors over groups a and b of 4 units, named by their axes; ``aa`` is 4 by 4."""
    groups = [Group(name, 4) for name in "ab"]
    return WeightSpec.build(
        groups, {name: TensorSpec.dense((4,) * len(axes), list(axes)) for name, axes in shapes.items()}
    )


def orbit(spec, weights, count=12):
    generator = torch.Generator().manual_seed(0)
    return spec.act(spec.random_element((count,), generator=generator), weights)


def assert_constant(spec, weights):
    canonical, _ = spec.canonicalize(orbit(spec, weights))
    for tensor in canonical.values():
        assert (tensor == tensor[0]).all()


def test_units_are_told_apart_by_those_that_they_meet():
    """All rows and columns of W[a, b] hold the same values; only b's bias says which is which, and then a."""
    spec = plain_spec(weight="ab", bias="b")
    weight = torch.tensor([[1.0, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 2], [4, 1, 2, 3]])
    assert_constant(spec, {"weight": weight, "bias": torch.tensor([0.0, 1.0, 1.0, 1.0])})


def test_a_unit_knows_itself():
    """Rows and columns of W[a, a] hold the same values; the diagonals differ."""
    spec = plain_spec(weight="aa")
    weight = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [3, 4, 1, 2], [2, 1, 4, 3]])
    assert len(set(weight.diagonal().tolist())) == 2
    permuted = weight[[0, 1, 3, 2]][:, [0, 1, 3, 2]]
    canonical = [spec.canonicalize({"weight": w})[0]["weight"] for w in (weight, permuted)]
    assert canonical[0].diagonal().tolist() == canonical[1].diagonal().tolist() == [3.0, 3.0, 1.0, 1.0]


def test_dead_and_doubled_units():
    """Units that are equal in all their weights may stand in any order: the network is the same."""
    spec = WeightSpec.mlp([2, 6, 5, 1], activation="tanh")
    weights = random_weights(spec, (), 3)
    weights["layers.0.weight"][:2] = weights["layers.0.weight"][2]
    weights["layers.0.bias"][:3] = 0.0
    weights["layers.1.weight"][:, :2] = weights["layers.1.weight"][:, 2:3]
    weights["layers.1.weight"][3:] = 0.0
    weights["layers.1.bias"][3:] = 0.0
    weights["layers.2.weight"][:, 3:] = 0.0
    assert_constant(spec, weights)


def test_signs_of_balanced_units():
    """The largest entry has both signs: the first entry that is no mirror image decides."""
    spec = WeightSpec.mlp([3, 2, 1], activation="tanh", bias=False)
    weights = {
        "layers.0.weight": torch.tensor([[-2.0, 2.0, 0.0], [0.0, -1.0, 1.0]]),
        "layers.1.weight": torch.tensor([[1.0, 5.0]]),
    }
    assert_constant(spec, weights)
    canonical, _ = spec.canonicalize(weights)
    assert canonical["layers.0.weight"].tolist() == [[0.0, 1.0, -1.0], [2.0, -2.0, 0.0]]


def test_equal_units_keep_their_order():
    spec = WeightSpec.mlp([2, 5, 1], activation="gelu")
    weights = {name: torch.ones_like(w) for name, w in random_weights(spec).items()}
    _, element = spec.canonicalize(weights)
    assert element["hidden0"].tolist() == [0, 1, 2, 3, 4]


def test_a_wide_network_of_zeros_is_no_trouble():
    spec = WeightSpec.mlp([100, 90, 80, 3], activation="sine")
    zeros = {name: torch.zeros_like(w) for name, w in random_weights(spec, (2,)).items()}
    canonical, _ = spec.canonicalize({name: -w for name, w in zeros.items()})
    assert_same_bits(canonical, zeros)


# -- what is given and what is left ------------------------------------------------------------------------


def test_scalings_that_only_act_together_are_left_undecided():
    groups = Group("a", 4), Group("b", 3)
    factors = scaling("positive", "a", ("w", 0, 0)), scaling("positive", "b", ("w", 0, 1, -1))
    spec = WeightSpec.build(groups, {"w": TensorSpec.dense((4, 3), ["a", "b"])}, factors)
    weights = random_weights(spec)
    canonical, element = spec.canonicalize(weights)
    assert (element["positive(a)"] == 1).all()
    assert (element["positive(b)"] == 1).all()
    assert torch.equal(canonical["w"].flatten().sort().values, weights["w"].flatten().sort().values)


def test_phases_without_a_step_are_left_undecided():
    phase = scaling("phase", "a", ("w", 0, 0), shifts=(Exponent("b", 0, 0),), shift=0.0)
    tensors = {name: TensorSpec.dense((4,), ["a"]) for name in "wb"}
    spec = WeightSpec.build([Group("a", 4)], tensors, [phase])
    _, element = spec.canonicalize(random_weights(spec))
    assert (element["phase(a)"] == 0).all()


def test_tied_names_and_constants():
    """The copies move alike, under whichever of their names they come; constants stay."""
    plain = WeightSpec.mlp([2, 4, 1], activation="tanh")
    tensors = dict(plain.tensors)
    weight = tensors["layers.0.weight"]
    tensors["layers.0.weight"] = TensorSpec(weight.shape, weight.cells, aliases=("tied",))
    spec = WeightSpec.build(plain.groups.values(), tensors, plain.scalings.values(), {"steps": ()})
    weights = {**random_weights(plain, (3,)), "steps": torch.full((3,), 7)}
    expected, _ = plain.canonicalize({name: weights[name] for name in plain.tensors})
    tied = weights["layers.0.weight"]
    both, _ = spec.canonicalize({**weights, "tied": tied})
    assert torch.equal(both["tied"], expected["layers.0.weight"])
    assert torch.equal(both["layers.0.weight"], expected["layers.0.weight"])
    assert both["steps"].tolist() == [7, 7, 7]
    assert both["steps"].data_ptr() != weights["steps"].data_ptr()
    del weights["layers.0.weight"]
    alone, _ = spec.canonicalize({**weights, "tied": tied})
    assert torch.equal(alone["tied"], expected["layers.0.weight"])


def test_half_precision_is_kept():
    spec = SPECS["deep relu"]
    weights = {name: w.half() for name, w in networks(spec, (3,)).items()}
    canonical, _ = spec.canonicalize(weights)
    again, _ = spec.canonicalize(canonical)
    for name, w in canonical.items():
        assert w.dtype == torch.float16
        assert torch.equal(again[name], w)


@pytest.mark.parametrize("name", ["2-4-1 sine", "deep relu", "attention"])
def test_gradients_flow_for_a_fixed_element(name):
    spec = SPECS[name]
    weights = networks(spec, (3,), dtype=DOUBLE)
    flat = spec.flatten(weights).requires_grad_()
    canonical, element = spec.canonicalize({**weights, **spec.unflatten(flat)})
    assert not any(value.requires_grad for value in element.values())
    acted = spec.flatten(spec.act(element, spec.unflatten(flat)))
    (expected,) = torch.autograd.grad(acted.pow(3).sum(), flat)
    (found,) = torch.autograd.grad(spec.flatten(canonical).pow(3).sum(), flat)
    torch.testing.assert_close(found, expected)


def test_a_spec_of_constants_alone():
    spec = WeightSpec.build([], {}, (), {"steps": ()})
    assert spec.canonicalize({"steps": torch.tensor(3)}) == ({"steps": torch.tensor(3)}, {})


def test_missing_and_unknown_tensors_are_named():
    spec = SPECS["2-4-1 sine"]
    weights = random_weights(spec)
    with pytest.raises(SpecError, match="unknown tensor 'other'"):
        spec.canonicalize({**weights, "other": torch.zeros(1)})
    del weights["layers.0.bias"]
    with pytest.raises(SpecError, match=r"tensor 'layers\.0\.bias' is missing"):
        spec.canonicalize(weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value):
    spec = SPECS["2-4-1 sine"]
    weights = random_weights(spec, (3,))
    weights["layers.0.weight"][1, 2, 0] = value
    message = rf"'layers\.0\.weight' is {value} in network \[1\], at \[2, 0\]"
    with pytest.raises(SpecError, match=message):
        spec.canonicalize(weights)
    with pytest.raises(SpecError, match=rf"is {value} at \[2, 0\]"):
        spec.canonicalize({name: w[1] for name, w in weights.items()})
