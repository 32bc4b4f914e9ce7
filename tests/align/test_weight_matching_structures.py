"""Weight matching where groups nest or repeat, and where units have factors or several signs."""

import itertools
from functools import cache

import pytest
import torch

from weightspace.align import _nested, weight_matching
from weightspace.align._families import match_family
from weightspace.align._plans import make_plans
from weightspace.errors import SpecError
from weightspace.spec import Cell, Dim, Exponent, Group, Scaling, TensorSpec, WeightSpec
from weightspace.testing import networks, random_weights, sine_specs

DOUBLE = torch.float64
PERMUTATION, BOTH = ("permutation",), ("permutation", "sign")
SCALES = ("permutation", "positive")


@cache
def traced(name):
    case = networks()[name]
    return WeightSpec.trace(case.build(), case.inputs(), verify=False)


def planted(spec, symmetries, noise=0.0, batch=(), seed=0, dtype=torch.float32):
    """Networks, copies with noise that a random element has moved, and what undoes it."""
    generator = torch.Generator().manual_seed(seed)
    a = random_weights(spec, batch, seed, dtype)
    noisy = {n: w + noise * torch.randn(w.shape, generator=generator, dtype=dtype) for n, w in a.items()}
    element = spec.random_element(batch, symmetries=symmetries, generator=generator, dtype=dtype)
    return a, spec.act(element, noisy), spec.invert(element)


def distance(spec, a, b):
    names = [name for name, tensor in spec.tensors.items() if tensor.kind == "parameter"]
    return sum((a[name] - b[name]).square().sum() for name in names).sqrt()


# -- the spec's own small worlds, against every element ----------------------------------------------------


def heads_spec(heads=2, features=2, fixed=2):
    """Queries and values of heads: two groups of features that do not meet."""
    groups = [Group("heads", heads), Group("q", features, ("heads",)), Group("v", features, ("heads",))]

    def tensor(name):
        dims = Dim(0, features * fixed, heads, "heads"), Dim(0, fixed, features, name, (0,)), Dim(1, 1, fixed)
        return TensorSpec((heads * features, fixed), (Cell(dims),))

    return WeightSpec.build(groups, {"query": tensor("q"), "value": tensor("v")})


def deep_spec():
    """Groups within groups within groups, and a matrix of the innermost with itself."""
    groups = [Group("a", 2), Group("b", 2, ("a",)), Group("c", 2, ("b", "a"))]
    dims = Dim(0, 4, 2, "a"), Dim(0, 2, 2, "b", (0,)), Dim(0, 1, 2, "c", (1, 0))
    matrix = (
        Dim(0, 8, 2, "a"),
        Dim(0, 4, 2, "b", (0,)),
        Dim(0, 2, 2, "c", (1, 0)),
        Dim(0, 1, 2, "c", (1, 0)),
    )
    tensors = {"w": TensorSpec((8,), (Cell(dims),)), "m": TensorSpec((16,), (Cell(matrix),))}
    return WeightSpec.build(groups, tensors)


def recurrent_spec(size=4, fixed=2):
    tensors = {
        "enter": TensorSpec.dense((size, fixed), ["state", None]),
        "recurrent": TensorSpec.dense((size, size), ["state", "state"]),
    }
    return WeightSpec.build([Group("state", size)], tensors)


def elements(spec):
    """Every permutation of the spec."""
    shapes = {name: spec.unit_shape(name) for name in spec.groups}
    choices = []
    for *outer, size in shapes.values():
        rows = list(itertools.permutations(range(size)))
        choices.append(
            [torch.tensor(rows)[list(pick)].view(*outer, size) for pick in _picks(len(rows), outer)]
        )
    for picked in itertools.product(*choices):
        yield dict(zip(shapes, picked, strict=True))


def _picks(rows, outer):
    count = 1
    for size in outer:
        count *= size
    return itertools.product(range(rows), repeat=count)


@pytest.mark.parametrize("spec", [heads_spec(), deep_spec()], ids=["heads", "deep"])
def test_a_family_is_matched_to_the_optimum(spec):
    """Where nothing that moves meets: the least distance over all elements of the wreath product."""
    every = list(elements(spec))
    stacked = {name: torch.stack([element[name] for element in every]) for name in spec.groups}
    for seed in range(4):
        a, b = (random_weights(spec, (), 2 * seed + i, DOUBLE) for i in (0, 1))
        moved = spec.act(stacked, b)
        least = sum((a[n] - moved[n]).square().flatten(1).sum(1) for n in a).min().sqrt()
        _, report = weight_matching(spec, a, b)
        torch.testing.assert_close(report.distance_after, least)
        element = match_family(spec, next(iter(spec.groups)), a, b)
        torch.testing.assert_close(distance(spec, a, spec.act(element, b)), least)


def test_a_repeated_group_ends_near_the_optimum():
    """Frank and Wolfe promise no optimum: all planted ones, most random ones, and never worse than the start."""
    spec = recurrent_spec(5)
    every = list(elements(spec))
    stacked = {"state": torch.stack([element["state"] for element in every])}
    best, pairs = 0, 30
    for seed in range(pairs):
        a, b = (random_weights(spec, (), 2 * seed + i, DOUBLE) for i in (0, 1))
        moved = spec.act(stacked, b)
        least = sum((a[n] - moved[n]).square().flatten(1).sum(1) for n in a).min().sqrt()
        _, report = weight_matching(spec, a, b)
        assert report.distance_after <= report.distance_before + 1e-12
        best += bool(report.distance_after <= least + 1e-9)
        _, exact = weight_matching(spec, a, moved_by(spec, every[seed], a))
        assert exact.distance_after == 0
    assert best >= 0.6 * pairs


def moved_by(spec, element, weights):
    return spec.act(element, weights)


def test_a_repeated_group_by_hand():
    """A cycle of three units, numbered the other way round: the linear part says nothing, the square decides."""
    spec = WeightSpec.build([Group("g", 3)], {"w": TensorSpec.dense((3, 3), ["g", "g"])})
    a = {"w": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 0.0]])}
    b = {"w": torch.tensor([[0.0, 0.0, 1.0], [5.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    aligned, report = weight_matching(spec, a, b)
    assert torch.equal(aligned["w"], a["w"])
    assert report.element["g"].tolist() == [0, 2, 1]
    assert report.objective.item() == 27.0


# -- planted elements on real networks ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "lenet",
        "resnet18",
        "resnext",
        "multihead_attention",
        "cross_attention",
        "transformer_encoder",
        "vit",
        "llama",
        "rnn",
        "gru",
        "lstm",
        "bilinear",
        "mixture_of_experts",
    ],
)
def test_a_planted_permutation_is_found_under_noise(name):
    spec = traced(name)
    a, b, inverse = planted(spec, PERMUTATION, noise=0.03)
    _, report = weight_matching(spec, a, b)
    for group in spec.groups:
        assert torch.equal(report.element[group], inverse[group]), group
    assert report.distance_after < 0.04 * spec.num_parameters**0.5


@pytest.mark.parametrize("name", ["resnet18", "transformer_encoder", "llama", "lstm", "rnn"])
def test_planted_signs_are_found_with_it(name):
    """Also where a group has several of them: one per norm that reads a residual stream."""
    spec = traced(name)
    a, b, inverse = planted(spec, BOTH, noise=0.03)
    _, report = weight_matching(spec, a, b, symmetries=BOTH)
    assert report.element.keys() == inverse.keys()
    for key, value in report.element.items():
        assert torch.equal(value, inverse[key].to(value)), key


@pytest.mark.parametrize("name", ["mlp", "rnn_relu", "resnet18", "multihead_attention"])
def test_planted_factors_are_undone(name):
    spec = traced(name)
    a, b, _ = planted(spec, SCALES, dtype=DOUBLE)
    aligned, report = weight_matching(spec, a, b, symmetries=SCALES)
    _, without = weight_matching(spec, a, b)
    assert report.distance_after < 1e-3 * report.distance_before
    assert without.distance_after > 100 * report.distance_after
    for key, value in spec.act(report.element, b).items():
        torch.testing.assert_close(value, aligned[key])


@pytest.mark.parametrize("name", sorted(sine_specs()))
def test_all_symmetries_together_on_sine_layers(name):
    """Two signs, a phase and a factor of the same units; signs of heads and of units within them."""
    spec = sine_specs()[name]
    kinds = ("permutation", "sign", "phase", "positive")
    a, b, _ = planted(spec, kinds, batch=(5,), dtype=DOUBLE)
    _, report = weight_matching(spec, a, b, symmetries=kinds)
    assert (report.distance_before > 1).all()
    assert (report.distance_after < 1e-12).all()


# -- factors and signs against slow oracles ----------------------------------------------------------------


def test_the_best_factor_by_hand():
    """Entering 3 against 1 and leaving 2 against 6: the factor 3 makes both equal."""
    spec = WeightSpec.mlp([1, 1, 1], activation="relu", bias=False)

    def weights(entering, leaving):
        return {"layers.0.weight": torch.tensor([[entering]]), "layers.1.weight": torch.tensor([[leaving]])}

    _, report = weight_matching(spec, weights(3.0, 2.0), weights(1.0, 6.0), symmetries=("positive",))
    assert report.element["positive(hidden0)"].item() == pytest.approx(3.0, rel=1e-5)
    assert report.distance_after.item() == pytest.approx(0.0, abs=1e-5)


def test_factors_bring_one_hidden_layer_to_the_least_distance():
    """Against every order of the units and a fine grid of factors."""
    spec = WeightSpec.mlp([2, 2, 1], activation="relu")
    grid = torch.linspace(-6, 6, 4001, dtype=DOUBLE).exp()
    for seed in range(10):
        a, b = (random_weights(spec, (), 2 * seed + i, DOUBLE) for i in (0, 1))
        least = []
        for order in itertools.permutations(range(2)):
            rows = {n: w.expand(len(grid), *w.shape) for n, w in b.items()}
            sources = torch.tensor(order).expand(len(grid), 2)
            factors = grid[:, None].expand(-1, 2)
            moved = spec.act({"hidden0": sources, "positive(hidden0)": factors}, rows)
            per_unit = (moved["layers.0.weight"] - a["layers.0.weight"]).square().sum(2)
            per_unit = per_unit + (moved["layers.0.bias"] - a["layers.0.bias"]).square()
            per_unit = per_unit + (moved["layers.1.weight"] - a["layers.1.weight"]).square().sum(1)
            least.append(per_unit.amin(0).sum())
        rest = (a["layers.1.bias"] - b["layers.1.bias"]).square().sum()
        _, report = weight_matching(spec, a, b, symmetries=SCALES)
        expected = (min(least) + rest).sqrt()
        assert report.distance_after <= expected + 1e-9
        assert report.distance_after >= expected - 1e-3


def test_several_signs_of_one_group_against_all_choices():
    signs = [
        Scaling("s", "g", "sign", (Exponent("u", 0, 0), Exponent("v", 0, 0))),
        Scaling("t", "g", "sign", (Exponent("v", 0, 0), Exponent("w", 0, 0))),
    ]
    tensors = {name: TensorSpec.dense((3, 2), ["g", None]) for name in ("u", "v", "w")}
    spec = WeightSpec.build([Group("g", 3)], tensors, signs)
    flips = list(itertools.product((1.0, -1.0), repeat=3))
    choices = list(itertools.product(itertools.permutations(range(3)), flips, flips))
    element = {
        key: torch.tensor([choice[at] for choice in choices], dtype=dtype)
        for at, (key, dtype) in enumerate((("g", torch.long), ("s", DOUBLE), ("t", DOUBLE)))
    }
    for seed in range(5):
        a, b = (random_weights(spec, (), 2 * seed + i, DOUBLE) for i in (0, 1))
        moved = spec.act(element, b)
        best = sum((a[n] * moved[n]).flatten(1).sum(1) for n in a).max()
        _, report = weight_matching(spec, a, b, symmetries=BOTH)
        torch.testing.assert_close(report.objective, best)


# -- what it promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer_encoder", "lstm", "rnn_relu"])
def test_every_sweep_more_brings_them_no_further_apart(name):
    spec = traced(name)
    kinds = ("permutation", "sign", "positive") if name == "rnn_relu" else BOTH
    a, b = (random_weights(spec, (), seed, DOUBLE) for seed in (0, 1))
    before = distance(spec, a, b)
    for sweeps in (1, 2, 4):
        aligned, report = weight_matching(spec, a, b, symmetries=kinds, restarts=1, max_sweeps=sweeps)
        assert report.distance_after <= before + 1e-9
        torch.testing.assert_close(distance(spec, a, aligned), report.distance_after)
        before = report.distance_after


@pytest.mark.parametrize("name", ["multihead_attention", "gru"])
def test_the_function_stays_the_same(name):
    case, spec = networks()[name], traced(name)
    module, inputs = case.build().double(), case.inputs()
    inputs = tuple(part.double() for part in inputs)
    a, b = (random_weights(spec, (), seed, DOUBLE) for seed in (0, 1))
    aligned, report = weight_matching(spec, a, b, symmetries=BOTH)
    outputs = [torch.func.functional_call(module, weights, inputs) for weights in (b, aligned)]
    before, after = (out[0] if isinstance(out, tuple) else out for out in outputs)
    assert report.distance_after < report.distance_before
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["transformer_encoder", "rnn"])
def test_batches_and_parts_change_nothing(name, monkeypatch):
    spec = traced(name)
    a, b = (random_weights(spec, (3,), seed, DOUBLE) for seed in (0, 1))
    aligned, report = weight_matching(spec, a, b, symmetries=BOTH)
    monkeypatch.setattr(_nested, "_CHUNK", 1)
    for row in range(3):
        alone, single = weight_matching(
            spec, {n: w[row] for n, w in a.items()}, {n: w[row] for n, w in b.items()}, symmetries=BOTH
        )
        for key in aligned:
            assert torch.equal(alone[key], aligned[key][row]), key
        assert single.sweeps == report.sweeps[row]


def test_signs_without_permutations_leave_heads_where_they_are():
    spec = traced("multihead_attention")
    a, b, inverse = planted(spec, ("sign",), noise=0.03)
    _, report = weight_matching(spec, a, b, symmetries=("sign",))
    assert set(report.element) == set(spec.scalings) & set(inverse)
    for key, value in report.element.items():
        assert torch.equal(value, inverse[key].to(value)), key


def test_warm_starts_of_nested_and_repeated_groups():
    for name in ("transformer_encoder", "lstm"):
        spec = traced(name)
        a, b, inverse = planted(spec, PERMUTATION, noise=0.03)
        _, report = weight_matching(spec, a, b, restarts=1, start=inverse)
        assert report.sweeps == 1
        for group in spec.groups:
            assert torch.equal(report.element[group], inverse[group])


# -- one pair, whose products are brought up to date --------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "resnet18", "transformer_encoder"])
def test_products_brought_up_to_date_are_those_made_anew(name, monkeypatch):
    """A single pair keeps its products from sweep to sweep; two pairs do not."""
    monkeypatch.setattr("weightspace.align._compiled.can_match", lambda problem: False)
    spec = traced(name)
    a, b = (random_weights(spec, (), seed, DOUBLE) for seed in (0, 1))
    kept, report = weight_matching(spec, a, b, restarts=3)
    monkeypatch.setattr("weightspace.align._products.Products.of", lambda *arguments: None)
    anew, expected = weight_matching(spec, a, b, restarts=3)
    assert report.sweeps == expected.sweeps
    for key in anew:
        assert torch.equal(kept[key], anew[key]), key
    torch.testing.assert_close(report.objective, expected.objective, rtol=1e-12, atol=0)


# -- one family alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "transformer_encoder", "lstm"])
def test_match_family_undoes_what_was_planted_in_one_group(name):
    spec = traced(name)
    for plan in make_plans(spec, PERMUTATION)[:3]:
        names = (plan.group, *plan.inner)
        a, _, _ = planted(spec, PERMUTATION, batch=(2,))
        element = {k: v for k, v in planted(spec, PERMUTATION, batch=(2,), seed=1)[2].items() if k in names}
        found = match_family(spec, plan.group, a, spec.act(element, a))
        inverse = spec.invert(element)
        assert found.keys() == set(names)
        for key in names:
            assert torch.equal(found[key], inverse[key])


def test_match_family_needs_no_other_tensors_and_broadcasts():
    spec = traced("mlp")
    a, b = random_weights(spec, (3, 1)), random_weights(spec, (2,), 1)
    (first, *_) = make_plans(spec, PERMUTATION)
    some = {name: b[name] for name in first.tensors}
    found = match_family(spec, first.group, a, some)
    assert found[first.group].shape == (3, 2, first.size)
    aligned, _ = weight_matching(spec, a, b, restarts=1, max_sweeps=1)
    assert (spec.batch_shape(aligned)) == (3, 2)
    with pytest.raises(SpecError, match="within no other, found 'features0'"):
        match_family(traced("transformer_encoder"), "features0", a, b)
