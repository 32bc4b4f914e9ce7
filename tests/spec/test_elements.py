"""The group: its action on weights, and its own structure."""

import inspect
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightspace.errors import SpecError
from weightspace.nets import MLP
from weightspace.spec import (
    SYMMETRIES,
    Exponent,
    Group,
    Scaling,
    TensorSpec,
    WeightSpec,
    act,
    canonicalize,
    check_element,
    check_weights,
    compose,
    invert,
    trace,
)
from weightspace.testing import mixed_spec, random_weights, sine_specs, tiny_specs

SPECS = {**tiny_specs(), "mixed": mixed_spec(), **sine_specs()}
DOUBLE = torch.float64
some_spec = st.sampled_from(sorted(SPECS))
seeds = st.integers(0, 2**31)


def draw(spec, seed, batch=()):
    generator = torch.Generator().manual_seed(seed)
    return spec.random_element(batch, generator=generator, dtype=DOUBLE)


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


# -- several scalings of one bias --------------------------------------------------------------------------


class Sines(nn.Module):
    """``up(gain * sin(layer(x)))``, its parts registered in the order that is asked for."""

    def __init__(self, parts):
        super().__init__()
        made = {
            "gain": lambda: nn.Parameter(torch.randn(6)),
            "layer": lambda: nn.Linear(3, 6),
            "up": lambda: nn.Linear(6, 2),
        }
        for name in parts:
            setattr(self, name, made[name]())

    def forward(self, x):
        units = torch.sin(self.layer(x))
        return self.up(units * self.gain if hasattr(self, "gain") else units)


@pytest.mark.parametrize(
    ("parts", "flipping"),
    [(("gain", "layer", "up"), 1), (("layer", "up"), 1), (("up", "layer"), 2), (("up", "gain", "layer"), 3)],
)
def test_traced_sine_layers_have_a_group(parts, flipping):
    """Where ``up`` comes first, odd steps flip the bias that they shift."""
    spec = trace(Sines(parts), torch.randn(4, 3))
    on_bias = [s for s in spec.scalings.values() if any(e.tensor == "layer.bias" for e in s.exponents)]
    assert len(on_bias) == flipping
    weights = random_weights(spec, (), 0, DOUBLE)
    for seed in range(5):
        first, second = draw(spec, seed), draw(spec, seed + 100)
        assert_same(
            spec.act(spec.compose(second, first), weights), spec.act(second, spec.act(first, weights))
        )
        assert_same(spec.act(spec.invert(first), spec.act(first, weights)), weights)
        canonical, _ = spec.canonicalize(weights)
        assert_same(spec.canonicalize(spec.act(first, weights))[0], canonical)


def test_a_step_that_turns_its_bias_by_hand():
    """b -> shift - b twice is the identity, and the inverse of one such step is itself."""
    spec = sine_specs()["turned"]
    one = {"phase(units)": torch.tensor([1, 2, -1, 0])}
    assert spec.compose(one, one)["phase(units)"].tolist() == [0, 4, 0, 0]
    assert spec.invert(one)["phase(units)"].tolist() == [1, -2, -1, 0]


def crossed_spec():
    """``b[h, c]`` with a phase per h and a sign per c, which no group contains."""
    tensors = {"b": TensorSpec.dense((3, 2), ["h", "c"])}
    sign = Scaling("sign", "c", "sign", (Exponent("b", 0, 1),))
    phase = Scaling("phase", "h", "phase", (), (Exponent("b", 0, 0),), 1.0)
    return WeightSpec.build([Group("h", 3), Group("c", 2)], tensors, [sign, phase])


def test_flips_along_other_units_have_no_product():
    spec = crossed_spec()
    step = {"phase": torch.tensor([0, 1, 0])}
    flip = {"sign": torch.tensor([1.0, -1.0])}
    message = "'sign' flips what 'phase' shifts, but not unit by unit of 'h'"
    with pytest.raises(SpecError, match=message):
        spec.compose(flip, step)
    with pytest.raises(SpecError, match=message):
        spec.invert({**flip, **step})
    weights = {"b": torch.randn(3, 2, dtype=DOUBLE)}
    assert_same(spec.act(spec.compose(step, flip), weights), spec.act(step, spec.act(flip, weights)))
    assert_same(spec.compose(spec.identity(), step), {**spec.identity(), **step})


# -- types -------------------------------------------------------------------------------------------------


def test_values_have_the_type_that_is_asked_for():
    spec = SPECS["gained"]
    for dtype in (torch.float64, torch.float16):
        for element in (spec.identity(dtype=dtype), spec.random_element((2,), dtype=dtype)):
            assert element["positive(units)"].dtype == element["sign of the gain"].dtype == dtype
            assert element["phase(units)"].dtype == torch.int64
    assert spec.random_element()["positive(units)"].dtype == torch.float32
    with pytest.raises(SpecError, match=r"^dtype: expected a floating type, found torch\.int64$"):
        spec.random_element(dtype=torch.int64)
    with pytest.raises(SpecError, match="expected a floating type"):
        spec.identity(dtype=torch.complex64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_act_rounds_once_to_the_type_of_the_weights(dtype):
    spec = SPECS["gained"]
    weights = random_weights(spec, (), 1, DOUBLE)
    narrow = {name: w.to(dtype) for name, w in weights.items()}
    element = {**draw(spec, 0), "phase(units)": torch.zeros(4, dtype=torch.long)}
    exact = spec.act(element, {name: w.double() for name, w in narrow.items()})
    moved = spec.act(element, narrow)
    for name, w in moved.items():
        assert w.dtype == dtype
        # signs are exact, so that one rounding of one product is left
        assert torch.equal(w, exact[name].to(dtype))


def test_whole_numbers_of_every_type_permute():
    spec = SPECS["2-4-4-1 tanh"]
    weights = random_weights(spec, (3,))
    element = spec.random_element((3,), symmetries=["permutation"])
    for dtype in (torch.int32, torch.int8, torch.uint8):
        assert_same(
            spec.act({name: p.to(dtype) for name, p in element.items()}, weights), spec.act(element, weights)
        )
    whole = {name: (10 * w).long() for name, w in weights.items()}
    assert spec.act(element, whole)["layers.0.bias"].dtype == torch.int64


# -- what is refused ---------------------------------------------------------------------------------------


BAD_ELEMENTS = [
    ("2-4-1 sine", {"hidden9": torch.arange(4)}, "'hidden9' is neither a group nor a scaling of this spec"),
    ("2-4-1 sine", {"hidden0": torch.arange(5)}, r"'hidden0' should end in shape \[4\], found \[5\]"),
    ("2-4-1 sine", {"hidden0": torch.tensor(0)}, r"'hidden0' should end in shape \[4\], found \[\]"),
    (
        "2-4-1 sine",
        {"hidden0": torch.arange(4.0)},
        r"'hidden0' should hold whole numbers \(int64\), found float32",
    ),
    (
        "2-4-1 sine",
        {"hidden0": torch.ones(4).bool()},
        r"'hidden0' should hold whole numbers \(int64\), found bool",
    ),
    ("2-4-1 sine", {"hidden0": torch.tensor([1, 1, 2, 3])}, "permutation of 0 to 3, found 1 more than once"),
    ("2-4-1 sine", {"hidden0": torch.tensor([1, 0, 2, 7])}, "permutation of 0 to 3, found 7"),
    ("2-4-1 sine", {"hidden0": torch.tensor([-1, 0, 1, 2])}, "permutation of 0 to 3, found -1"),
    (
        "2-4-1 sine",
        {"hidden0": torch.tensor([[[0, 1, 2, 3]], [[0, 1, 2, 2]]])},
        r"found 2 more than once in row \[1, 0\]",
    ),
    (
        "2-4-1 sine",
        {"sign(hidden0)": torch.tensor([3.0, 1, 1, 1])},
        r"should hold 1 and -1, found 3\.0 at \[0\]",
    ),
    (
        "2-4-1 sine",
        {"sign(hidden0)": torch.tensor([1.0, 0, 1, 1])},
        r"should hold 1 and -1, found 0\.0 at \[1\]",
    ),
    ("2-4-1 sine", {"sign(hidden0)": torch.full((4,), torch.nan)}, "should hold 1 and -1, found nan"),
    (
        "2-4-1 sine",
        {"sign(hidden0)": torch.ones(4).bool()},
        "should hold numbers of a floating type, found bool",
    ),
    ("2-4-1 sine", {"phase(hidden0)": torch.ones(4)}, r"should hold whole numbers \(int64\), found float32"),
    (
        "2-3-2 without bias",
        {"positive(hidden0)": torch.tensor([[1.0, 1, 1], [1, 0, 1]])},
        r"should hold finite factors above 0, found 0\.0 at \[1, 1\]",
    ),
    ("2-3-2 without bias", {"positive(hidden0)": -torch.ones(3)}, r"factors above 0, found -1\.0 at \[0\]"),
    ("2-3-2 without bias", {"positive(hidden0)": torch.full((3,), torch.inf)}, "factors above 0, found inf"),
    ("2-3-2 without bias", {"positive(hidden0)": torch.full((3,), torch.nan)}, "factors above 0, found nan"),
    ("mixed", {"features": torch.tensor([[0, 1], [1, 1], [0, 1]])}, r"found 1 more than once in row \[1\]"),
]


@pytest.mark.parametrize(("name", "element", "message"), BAD_ELEMENTS)
def test_bad_elements_are_named(name, element, message):
    """By whatever takes an element, in either place."""
    spec = SPECS[name]
    with pytest.raises(SpecError, match=f"^element: .*{message}"):
        check_element(spec, element)
    with pytest.raises(SpecError, match=f"^element: .*{message}"):
        spec.act(element, random_weights(spec))
    with pytest.raises(SpecError, match=f"^element: .*{message}"):
        spec.invert(element)
    with pytest.raises(SpecError, match=f"^second: .*{message}"):
        spec.compose(element, {})
    with pytest.raises(SpecError, match=f"^first: .*{message}"):
        spec.compose({}, element)


def test_batches_that_do_not_broadcast_are_named():
    spec = SPECS["2-4-1 sine"]
    two, three = ({"hidden0": torch.arange(4).expand(n, 4)} for n in (2, 3))
    with pytest.raises(
        SpecError, match=r"batch shape \[3\] does not broadcast against that of the weights, \[2\]"
    ):
        spec.act(three, random_weights(spec, (2,)))
    with pytest.raises(SpecError, match=r"second: batch shape \[3\] does not .* that of first, \[2\]"):
        spec.compose(three, two)
    with pytest.raises(SpecError, match=r"'sign\(hidden0\)' has batch shape \[3\], others \[2\]"):
        spec.invert({**two, "sign(hidden0)": torch.ones(3, 4)})


def plain(function):
    """Without the checks of beartype, as users have it."""
    return inspect.unwrap(function)


def test_what_is_no_tensor_is_named():
    spec = SPECS["2-4-1 sine"]
    weights = random_weights(spec)
    rows = {"hidden0": [1, 0, 2, 3]}
    message = "'hidden0' should be a torch.Tensor, found list"
    for call in (
        lambda: plain(act)(spec, rows, weights),
        lambda: plain(invert)(spec, rows),
        lambda: plain(compose)(spec, rows, {}),
        lambda: plain(compose)(spec, {}, rows),
    ):
        with pytest.raises(SpecError, match=message):
            call()
    arrays = {name: w.numpy() for name, w in weights.items()}
    message = r"^weights: 'layers\.0\.weight' should be a torch\.Tensor, found ndarray$"
    for call in (lambda: plain(act)(spec, {}, arrays), lambda: plain(canonicalize)(spec, arrays)):
        with pytest.raises(SpecError, match=message):
            call()
    with pytest.raises(SpecError, match=r"^element: expected a dict of tensors, found list$"):
        plain(act)(spec, [], weights)
    with pytest.raises(SpecError, match=r"^weights: expected a dict of tensors, found list$"):
        plain(act)(spec, {}, [])


def test_weights_of_other_types_are_named():
    spec = SPECS["2-4-1 sine"]
    weights = random_weights(spec)
    whole = {**weights, "layers.0.bias": torch.ones(4, dtype=torch.int64)}
    message = r"^weights: 'sign\(hidden0\)' scales 'layers\.0\.bias', expected a floating type, found int64$"
    for call in (lambda: spec.act(spec.random_element(), whole), lambda: spec.canonicalize(whole)):
        with pytest.raises(SpecError, match=message):
            call()
    turning = {**weights, "layers.1.bias": torch.ones(1, dtype=torch.complex64)}
    message = r"^weights: 'layers\.1\.bias' should hold real numbers, found complex64$"
    for call in (lambda: spec.act({}, turning), lambda: spec.canonicalize(turning)):
        with pytest.raises(SpecError, match=message):
            call()


def test_tied_tensors_that_differ_are_named():
    tied = TensorSpec((5, 3), TensorSpec.dense((5, 3), [None, "stream"]).cells, aliases=("head",))
    spec = WeightSpec.build([Group("stream", 3)], {"embed": tied})
    w = torch.randn(5, 3)
    element = {"stream": torch.tensor([2, 0, 1])}
    for good in ({"embed": w, "head": w}, {"embed": w, "head": w.clone()}, {"head": w}):
        assert check_weights(spec, good) == ()
        assert all(torch.equal(moved, w[:, [2, 0, 1]]) for moved in spec.act(element, good).values())
        assert torch.equal(spec.flatten(good), w.flatten())
    bad = {"embed": w, "head": w + 1}
    message = "^weights: 'head' is tied to 'embed', expected equal values, found others$"
    for call in (lambda: spec.act(element, bad), lambda: spec.canonicalize(bad)):
        with pytest.raises(SpecError, match=message):
            call()


def test_checks_are_a_small_part_of_an_action():
    """All values of 512 elements are looked at in a fraction of the time that moving the weights takes."""
    spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
    element = spec.random_element((512,))
    weights = random_weights(spec, (512,))
    seconds = {check_element: [], spec.act: []}
    for _ in range(10):
        for function, arguments in ((check_element, (spec, element)), (spec.act, (element, weights))):
            start = time.process_time()
            function(*arguments)
            seconds[function].append(time.process_time() - start)
    assert min(seconds[check_element]) < 0.5 * min(seconds[spec.act])


def test_constants_without_axes_come_back():
    tensors = {"w": TensorSpec.dense((3,), ["g"])}
    spec = WeightSpec.build([Group("g", 3)], tensors, constants={"count": ()})
    element = {"g": torch.tensor([2, 0, 1])}
    moved = spec.act(element, {"w": torch.arange(3.0), "count": torch.tensor(7)})
    assert moved["w"].tolist() == [2.0, 0.0, 1.0]
    assert moved["count"] == 7
