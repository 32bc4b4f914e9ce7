"""Weight matching: what it finds, what it leaves alone, and what it refuses."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, vmap

from weightspace.align import weight_matching
from weightspace.errors import ConfigError, SpecError
from weightspace.nets import MLP
from weightspace.spec import Cell, Dim, Exponent, Frozen, Group, Scaling, TensorSpec, WeightSpec
from weightspace.testing import random_weights

DOUBLE = torch.float64
PERMUTATION, BOTH = ("permutation",), ("permutation", "sign")
PHASES = ("permutation", "sign", "phase")
SPECS = {
    "tanh": WeightSpec.mlp([2, 9, 8, 7, 2], activation="tanh"),
    "sine": WeightSpec.mlp([2, 12, 12, 1], activation="sine", w0=30.0),
    "gaussian": WeightSpec.mlp([3, 8, 7, 2], activation="gaussian"),
    "relu without bias": WeightSpec.mlp([4, 8, 8, 3], activation="relu", bias=False),
}
seeds = st.integers(0, 2**31)


def convolutional_spec():
    """What MLPs lack: kernels, a residual stream, two cells in one tensor, two statistics."""
    stream, hidden = 5, 4
    rows = Cell((Dim(0, stream, hidden, "hidden"), Dim(1, 1, stream, "stream")))
    fixed = Cell((Dim(0, stream, 2), Dim(1, 1, stream, "stream")), hidden * stream)
    tensors = {
        "stem": TensorSpec.dense((stream, 3, 3, 3), ["stream", None, None, None]),
        "enter": TensorSpec.dense((hidden, stream, 3, 3), ["hidden", "stream", None, None]),
        "mean": TensorSpec.dense((hidden,), ["hidden"], kind="statistic"),
        "leave": TensorSpec.dense((stream, hidden, 3, 3), ["stream", "hidden", None, None]),
        "heads": TensorSpec((hidden + 2, stream), (rows, fixed)),
        "scale": TensorSpec.dense((2,), [None], kind="statistic"),
    }
    return WeightSpec(
        Frozen({"stream": Group("stream", stream), "hidden": Group("hidden", hidden)}), Frozen(tensors)
    )


ALL = {**SPECS, "convolutional": convolutional_spec()}


def planted(spec, symmetries, batch=(6,), seed=0, dtype=torch.float32):
    """Networks, and copies of them moved by random elements."""
    generator = torch.Generator().manual_seed(seed)
    a = random_weights(spec, batch, seed, dtype)
    element = spec.random_element(batch, symmetries=symmetries, generator=generator)
    return a, spec.act(element, a), element


def pair_of(spec, batch=(4,), seed=0, dtype=torch.float32):
    return random_weights(spec, batch, seed, dtype), random_weights(spec, batch, seed + 1, dtype)


def rows(weights, row):
    return {name: tensor[row] for name, tensor in weights.items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module", params=["compiled", "batched"], autouse=True)
def way(request):
    """Every test is of both ways to match: in compiled code, and as operations on whole batches."""
    if request.param == "compiled":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weightspace.align._compiled.can_match", lambda problem: False)
        yield request.param


# -- what it finds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetries", [PERMUTATION, BOTH])
@pytest.mark.parametrize("name", ALL)
def test_a_planted_element_is_undone_exactly(name, symmetries):
    spec = ALL[name]
    a, b, element = planted(spec, symmetries)
    aligned, report = weight_matching(spec, a, b, symmetries=symmetries, restarts=2)
    assert_equal(aligned, a)
    assert (report.distance_before > 0).all()
    assert (report.distance_after == 0).all()
    inverse = spec.invert(element)
    assert_equal(report.element, {key: inverse[key] for key in report.element})


@pytest.mark.parametrize("symmetries", [PERMUTATION, BOTH])
def test_a_planted_element_is_undone_under_noise(symmetries):
    spec = SPECS["tanh"]
    a, b, element = planted(spec, symmetries, (20,))
    noise = random_weights(spec, (20,), seed=9)
    noisy = {name: tensor + 0.05 * noise[name] for name, tensor in b.items()}
    _, report = weight_matching(spec, a, noisy, symmetries=symmetries, restarts=2)
    inverse = spec.invert(element)
    assert_equal(report.element, {key: inverse[key] for key in report.element})


def brute_force(spec, a, b, signs):
    """The best inner product over all elements of a network with one group."""
    (group,) = spec.groups.values()
    best = -torch.inf
    for order in itertools.permutations(range(group.size)):
        for flips in itertools.product((1.0, -1.0), repeat=group.size) if signs else [()]:
            element = {group.name: torch.tensor(order)}
            if signs:
                element[f"sign({group.name})"] = torch.tensor(flips)
            moved = spec.act(element, b)
            best = max(best, sum((a[name] * moved[name]).sum().item() for name in a))
    return best


@pytest.mark.parametrize("activation", ["tanh", "gaussian"])
@pytest.mark.parametrize("symmetries", [PERMUTATION, BOTH])
def test_one_group_is_solved_to_the_optimum(activation, symmetries):
    spec = WeightSpec.mlp([2, 3, 1], activation=activation)
    a, b = pair_of(spec, (25,), dtype=DOUBLE)
    _, report = weight_matching(spec, a, b, symmetries=symmetries)
    for row in range(25):
        expected = brute_force(spec, rows(a, row), rows(b, row), "sign" in symmetries)
        assert report.objective[row].item() == pytest.approx(expected, rel=1e-12)


def test_signs_alone_keep_the_order():
    spec = WeightSpec.mlp([1, 2, 1], activation="tanh", bias=False)
    a = {"layers.0.weight": torch.tensor([[1.0], [2.0]]), "layers.1.weight": torch.tensor([[3.0, 4.0]])}
    b = {"layers.0.weight": torch.tensor([[2.0], [-1.0]]), "layers.1.weight": torch.tensor([[4.0, -3.0]])}
    aligned, report = weight_matching(spec, a, b, symmetries=("sign",))
    assert set(report.element) == {"sign(hidden0)"}
    assert aligned["layers.0.weight"].flatten().tolist() == [2.0, 1.0]
    assert aligned["layers.1.weight"].flatten().tolist() == [4.0, 3.0]
    assert report.objective.item() == 1 * 2 + 2 * 1 + 3 * 4 + 4 * 3


def test_the_second_start_undoes_what_the_first_cannot():
    """Behind a shuffled and flipped layer two copies agree on nothing; from the input on they agree."""
    spec = WeightSpec.mlp([2, 32, 32, 32, 1], activation="tanh")
    a, b, _ = planted(spec, BOTH, (20,))
    plain, forward = (
        weight_matching(spec, a, b, symmetries=BOTH, restarts=restarts)[1] for restarts in (1, 2)
    )
    assert (plain.distance_after > 0).any()
    assert (forward.distance_after == 0).all()


def test_layer_by_layer_first_one_run_undoes_a_planted_permutation():
    spec = WeightSpec.mlp([2, 32, 32, 32, 1], activation="tanh")
    a, b, _ = planted(spec, PERMUTATION, (20,))
    given, layers = (weight_matching(spec, a, b, restarts=1, first=first)[1] for first in ("given", "layers"))
    assert (given.distance_after > 0).any()
    assert (layers.distance_after == 0).all()


# -- where it begins and ends ------------------------------------------------------------------------------


def test_a_warm_start_is_where_it_begins():
    """From the inverse of what was planted nothing is left to do, though one run alone does not find it."""
    spec = SPECS["tanh"]
    a, b, element = planted(spec, BOTH, (20,), seed=3)
    start = spec.invert(element)
    _, cold = weight_matching(spec, a, b, symmetries=BOTH, restarts=1)
    aligned, warm = weight_matching(spec, a, b, symmetries=BOTH, restarts=1, start=start)
    assert (cold.distance_after > 0).any()
    assert_equal(aligned, a)
    assert_equal(warm.element, {key: start[key] for key in warm.element})
    torch.testing.assert_close(warm.distance_before, cold.distance_before)
    assert (warm.sweeps == 1).all()


def test_a_warm_start_may_hold_what_is_not_matched_and_serves_all_pairs():
    spec = SPECS["tanh"]
    a, b = pair_of(spec, (5,))
    start = spec.random_element(symmetries=["sign"], generator=torch.Generator().manual_seed(0))
    aligned, report = weight_matching(spec, a, b, start=start)
    expected, _ = weight_matching(spec, a, spec.act(start, b))
    assert_equal(aligned, expected)
    assert_equal(spec.act(report.element, b), aligned)
    assert {name: value.shape[0] for name, value in report.element.items()} == dict.fromkeys(
        start, 5
    ) | dict.fromkeys(spec.groups, 5)


def test_a_start_of_another_space_is_refused():
    spec = SPECS["tanh"]
    a, b = pair_of(spec)
    with pytest.raises(SpecError, match="hidden0"):
        weight_matching(spec, a, b, start={"hidden0": torch.arange(4)})


def test_a_tolerance_ends_what_gains_little():
    spec = SPECS["tanh"]
    a, b = pair_of(spec, (30,), dtype=DOUBLE)
    every, coarse, one = (
        weight_matching(spec, a, b, restarts=1, tolerance=tolerance)[1] for tolerance in (0.0, 0.03, 1e6)
    )
    assert (one.sweeps == 1).all()
    assert (coarse.sweeps <= every.sweeps).all()
    assert (coarse.sweeps < every.sweeps).any()
    assert (coarse.objective <= every.objective).all()
    # what a sweep more would gain is less than the tolerance
    bound = sum(a[name].flatten(1).norm(dim=1) * b[name].flatten(1).norm(dim=1) for name in a)
    for sweeps in range(2, int(every.sweeps.max()) + 1):
        fewer, more = (weight_matching(spec, a, b, restarts=1, max_sweeps=n)[1] for n in (sweeps - 1, sweeps))
        ended = coarse.sweeps == sweeps
        assert (more.objective - fewer.objective <= 0.03 * bound)[ended & (every.sweeps > sweeps)].all()


# -- phases ------------------------------------------------------------------------------------------------


def sirens(widths, batch=(6,), seed=0, dtype=DOUBLE, w0=30.0):
    """SIRENs with small biases, as SIRENs have them: a phase step is a shift by a tenth."""
    spec = WeightSpec.mlp(widths, activation="sine", w0=w0)
    return spec, {name: 0.2 * w for name, w in random_weights(spec, batch, seed, dtype).items()}


@pytest.mark.parametrize("symmetries", [("phase",), ("permutation", "phase"), ("sign", "phase"), PHASES])
@pytest.mark.parametrize("widths", [[2, 16, 1], [2, 12, 12, 1], [3, 9, 8, 7, 2]])
def test_a_planted_element_with_phases_is_undone(widths, symmetries):
    spec, a = sirens(widths)
    generator = torch.Generator().manual_seed(1)
    element = spec.random_element((6,), symmetries=symmetries, generator=generator, dtype=DOUBLE)
    b = spec.act(element, a)
    aligned, report = weight_matching(spec, a, b, symmetries=symmetries, restarts=2)
    inverse = spec.invert(element)
    assert report.element.keys() == inverse.keys()
    for name, value in report.element.items():
        assert torch.equal(value.double(), inverse[name].double()), name
    for name, w in aligned.items():
        torch.testing.assert_close(w, a[name], rtol=0, atol=1e-14)
    assert (report.distance_before > 0.1).all()
    assert (report.distance_after < 1e-13).all()


def test_phases_bring_one_hidden_layer_to_the_least_distance():
    """Against every permutation, sign and number of steps that a bias could need."""
    spec, a = sirens([1, 2, 1], (15,))
    _, b = sirens([1, 2, 1], (15,), seed=1)
    _, report = weight_matching(spec, a, b, symmetries=PHASES, restarts=1)
    choices = itertools.product(
        itertools.permutations(range(2)),
        itertools.product((1.0, -1.0), repeat=2),
        itertools.product(range(-10, 11), repeat=2),
    )
    orders, signs, steps = (torch.tensor(values).unsqueeze(1) for values in zip(*choices, strict=True))
    element = {"hidden0": orders, "sign(hidden0)": signs.double(), "phase(hidden0)": steps}
    moved = spec.act(element, b)
    squares = sum((a[name] - moved[name]).square().flatten(2).sum(2) for name in a)
    least = squares.amin(0).sqrt()
    torch.testing.assert_close(report.distance_after, least, rtol=1e-12, atol=0)


def test_a_phase_by_hand():
    """sin(w0 b) u with w0 = pi, where one step adds 1: b = 2.1, u = 3 is b = 0.1, u = 3, and b = 1.1, u = -3."""
    spec = WeightSpec.mlp([1, 1, 1], activation="sine", w0=math.pi)

    def weights(bias, reader):
        tensors = {"layers.0.weight": [[1.0]], "layers.0.bias": [bias]}
        tensors |= {"layers.1.weight": [[reader]], "layers.1.bias": [0.0]}
        return {name: torch.tensor(values, dtype=DOUBLE) for name, values in tensors.items()}

    _, report = weight_matching(spec, weights(0.1, 3.0), weights(2.1, 3.0), symmetries=("phase",))
    assert report.element["phase(hidden0)"].tolist() == [-2]
    assert report.distance_after.item() == pytest.approx(0, abs=1e-14)
    _, report = weight_matching(spec, weights(0.1, -3.0), weights(1.3, 3.0), symmetries=("phase",))
    assert report.element["phase(hidden0)"].tolist() == [-1]
    assert report.distance_after.item() == pytest.approx(0.2)
    # an odd step would bring the bias closer still, but turns the reader away
    _, report = weight_matching(spec, weights(0.1, 3.0), weights(1.0, 3.0), symmetries=("phase",))
    assert report.element["phase(hidden0)"].tolist() == [0]


@settings(max_examples=20)
@given(seed=seeds, restarts=st.integers(1, 3))
def test_phases_keep_the_function_and_never_part_networks(seed, restarts):
    spec, a = sirens((2, 9, 8, 2), (5,), seed)
    _, b = sirens((2, 9, 8, 2), (5,), seed + 1)
    net = MLP((2, 9, 8, 2), activation="sine", w0=30.0).double()
    x = torch.rand(16, 2, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    aligned, report = weight_matching(spec, a, b, symmetries=PHASES, restarts=restarts, seed=seed)
    before, after = (vmap(lambda w: functional_call(net, w, (x,)))(weights) for weights in (b, aligned))
    assert (after - before).abs().max() <= 1e-11 * before.abs().max()
    assert (report.distance_after < report.distance_before).all()
    for name, w in spec.act(report.element, b).items():
        assert torch.equal(aligned[name], w)


def test_every_sweep_more_with_phases_brings_them_no_further_apart():
    spec, a = sirens([2, 12, 12, 1], (20,))
    _, b = sirens([2, 12, 12, 1], (20,), seed=1)
    distance, closest = None, {}
    for sweeps in range(1, 6):
        _, report = weight_matching(spec, a, b, symmetries=PHASES, max_sweeps=sweeps)
        assert (
            report.distance_after <= (report.distance_before if distance is None else distance) + 1e-12
        ).all()
        distance = report.distance_after
    for symmetries in (PERMUTATION, BOTH, PHASES):
        closest[symmetries] = weight_matching(spec, a, b, symmetries=symmetries)[1].distance_after.mean()
    assert closest[PHASES] < closest[BOTH] < closest[PERMUTATION]


def test_aligned_with_phases_nothing_is_left_to_do():
    spec, a = sirens([2, 12, 12, 1], (10,), dtype=torch.float32)
    _, b = sirens([2, 12, 12, 1], (10,), seed=1, dtype=torch.float32)
    aligned, first = weight_matching(spec, a, b, symmetries=PHASES, restarts=1)
    _, second = weight_matching(spec, a, aligned, symmetries=PHASES, restarts=1, seed=1)
    identity = spec.identity()
    for key, value in second.element.items():
        assert torch.equal(value, identity[key].expand(value.shape))
    torch.testing.assert_close(second.distance_before, first.distance_after, rtol=1e-6, atol=0)


# -- what it promises --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (DOUBLE, 1e-12)])
@settings(max_examples=30)
@given(seed=seeds, symmetries=st.sampled_from([PERMUTATION, BOTH]), restarts=st.integers(1, 3))
def test_the_function_stays_the_same(dtype, tolerance, seed, symmetries, restarts):
    net = MLP((3, 9, 8, 2), activation="tanh")
    spec = WeightSpec.mlp(net.widths, activation="tanh")
    a, b = pair_of(spec, (5,), seed, dtype)
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    aligned, report = weight_matching(spec, a, b, symmetries=symmetries, restarts=restarts, seed=seed)
    before, after = (vmap(lambda w: functional_call(net, w, (x,)))(weights) for weights in (b, aligned))
    assert (after - before).abs().max() <= tolerance * before.abs().max()
    assert (report.distance_after < report.distance_before).all(), "else nothing was tested"


@settings(max_examples=15)
@given(name=st.sampled_from(sorted(ALL)), seed=seeds, symmetries=st.sampled_from([PERMUTATION, BOTH]))
def test_every_sweep_more_brings_them_no_further_apart(name, seed, symmetries):
    spec = ALL[name]
    a, b = pair_of(spec, (3,), seed)
    parameters = [key for key, tensor in spec.tensors.items() if tensor.kind == "parameter"]
    objective = sum((a[key].double() * b[key]).flatten(1).sum(1) for key in parameters)
    distance = None
    for sweeps in range(1, 6):
        _, report = weight_matching(spec, a, b, symmetries=symmetries, max_sweeps=sweeps, seed=seed)
        assert (report.objective >= objective - 1e-5).all()
        assert (
            report.distance_after <= (report.distance_before if distance is None else distance) + 1e-6
        ).all()
        assert (report.sweeps <= sweeps).all()
        objective, distance = report.objective, report.distance_after


@pytest.mark.parametrize("name", ALL)
def test_the_report_is_about_the_aligned_weights(name):
    spec = ALL[name]
    a, b = pair_of(spec)
    aligned, report = weight_matching(spec, a, b, symmetries=BOTH)
    assert_equal(spec.act(report.element, b), aligned)
    assert aligned.keys() == b.keys()
    parameters = [key for key, tensor in spec.tensors.items() if tensor.kind == "parameter"]
    a, b, aligned = ({key: w[key].double().flatten(1) for key in parameters} for w in (a, b, aligned))
    products = sum((a[key] * aligned[key]).sum(1) for key in parameters)
    torch.testing.assert_close(report.objective, products, rtol=1e-6, atol=1e-6)
    for found, other in ((report.distance_before, b), (report.distance_after, aligned)):
        squares = sum((a[key] - other[key]).square().sum(1) for key in parameters)
        torch.testing.assert_close(found, squares.sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_neighbours_in_a_batch_change_nothing(name):
    spec = ALL[name]
    a, b = pair_of(spec, (12,), dtype=DOUBLE)
    aligned, report = weight_matching(spec, a, b, symmetries=BOTH, restarts=3, seed=5)
    for row in range(12):
        alone, alone_report = weight_matching(
            spec, rows(a, row), rows(b, row), symmetries=BOTH, restarts=3, seed=5
        )
        assert_equal(alone, rows(aligned, row))
        assert_equal(alone_report.element, rows(report.element, row))
        assert alone_report.sweeps == report.sweeps[row]
        assert alone_report.objective.shape == ()


def test_similarity_matrices_may_be_made_in_parts(monkeypatch):
    spec = SPECS["tanh"]
    a, b = pair_of(spec, (9,), dtype=DOUBLE)
    whole, _ = weight_matching(spec, a, b, symmetries=BOTH, restarts=3)
    monkeypatch.setattr("weightspace.align._sweeps._CHUNK", 200)
    parts, _ = weight_matching(spec, a, b, symmetries=BOTH, restarts=3)
    assert_equal(parts, whole)


@pytest.mark.parametrize("name", ALL)
def test_aligning_what_is_aligned_does_nothing(name):
    spec = ALL[name]
    a, b = pair_of(spec, (10,))
    aligned, first = weight_matching(spec, a, b, symmetries=BOTH, restarts=1)
    again, second = weight_matching(spec, a, aligned, symmetries=BOTH, restarts=1, seed=1)
    assert_equal(again, aligned)
    identity = spec.identity()
    for key, value in second.element.items():
        assert torch.equal(value, identity[key].expand(value.shape))
    assert torch.equal(second.distance_after, first.distance_after)
    assert (second.sweeps == 1).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("restarts", [1, 3])
def test_ties_keep_the_order_as_it_is(value, restarts):
    spec = SPECS["tanh"]
    a = {name: torch.full_like(w, value) for name, w in random_weights(spec, (2,)).items()}
    _, report = weight_matching(spec, a, a, symmetries=BOTH, restarts=restarts)
    identity = spec.identity()
    for key, found in report.element.items():
        assert torch.equal(found, identity[key].expand(found.shape))


def test_more_restarts_are_never_worse():
    spec = SPECS["tanh"]
    a, b = pair_of(spec, (30,))
    objectives = [weight_matching(spec, a, b, restarts=n)[1].objective for n in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(objectives):
        assert (more >= fewer).all()
        assert (more > fewer).any()


def test_the_seed_decides():
    spec = SPECS["tanh"]
    a, b = pair_of(spec, (40,))
    first, again, other = (weight_matching(spec, a, b, seed=seed)[0] for seed in (1, 1, 2))
    assert_equal(first, again)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_global_generator_is_left_alone():
    spec = SPECS["tanh"]
    a, b = pair_of(spec)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    weight_matching(spec, a, b, restarts=3)
    assert torch.equal(torch.rand(3), expected)


# -- what it takes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference_batch", "batch", "joint"),
    [((), (4,), (4,)), ((4,), (), (4,)), ((2, 1), (3,), (2, 3)), ((), (), ()), ((3,), (0, 1), (0, 3))],
)
@pytest.mark.parametrize("name", ["sine", "convolutional"])
def test_batch_axes_broadcast(name, reference_batch, batch, joint):
    spec = ALL[name]
    a = random_weights(spec, reference_batch, 0, DOUBLE)
    b = random_weights(spec, batch, 1, DOUBLE)
    aligned, report = weight_matching(spec, a, b, restarts=2)
    whole = [{n: w.expand(*joint, *spec.tensors[n].shape) for n, w in side.items()} for side in (a, b)]
    expected, expected_report = weight_matching(spec, *whole, restarts=2)
    assert spec.batch_shape(aligned) == report.objective.shape == report.sweeps.shape == joint
    assert_equal(aligned, expected)
    assert_equal(report.element, expected_report.element)


def test_a_space_without_groups_stays():
    spec = WeightSpec.mlp([3, 2])
    a, b = random_weights(spec, (4,)), random_weights(spec, (), 1)
    aligned, report = weight_matching(spec, a, b, restarts=2)
    assert spec.batch_shape(aligned) == (4,)
    assert_equal(rows(aligned, 2), b)
    assert report.element == {}
    assert report.sweeps.tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_accumulated_in_float32(dtype):
    """2048 + 1 is 2048 in float16: only wider sums tell these units apart."""
    spec = WeightSpec.mlp([2, 2, 1], activation="relu", bias=False)
    first = torch.tensor([[64.0, 1.0], [64.0, -1.0]], dtype=dtype)
    last = torch.zeros(1, 2, dtype=dtype)
    a = {"layers.0.weight": first, "layers.1.weight": last}
    b = {"layers.0.weight": first.flip(0), "layers.1.weight": last}
    aligned, report = weight_matching(spec, a, b)
    assert_equal(aligned, a)
    assert aligned["layers.0.weight"].dtype == dtype
    assert report.objective.item() == 2 * (64 * 64 + 1)
    a, b, _ = planted(SPECS["tanh"], PERMUTATION, dtype=dtype)
    assert_equal(weight_matching(SPECS["tanh"], a, b, restarts=2)[0], a)


def test_autocast_does_not_round():
    spec = SPECS["sine"]
    a, b = pair_of(spec, (20,))
    expected, report = weight_matching(spec, a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, found_report = weight_matching(spec, a, b)
    assert_equal(found, expected)
    assert torch.equal(found_report.objective, report.objective)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e15), (torch.float32, 1e-15), (DOUBLE, 1e150)])
def test_scale_does_not_matter(dtype, scale):
    spec = SPECS["sine"]
    a, b, element = planted(spec, BOTH, dtype=dtype)
    _, report = weight_matching(
        spec, *({n: scale * w for n, w in side.items()} for side in (a, b)), symmetries=BOTH
    )
    inverse = spec.invert(element)
    assert_equal(report.element, {key: inverse[key] for key in report.element})


def test_what_is_too_large_for_float64_is_named():
    spec = SPECS["sine"]
    a, b = ({n: 1e160 * w for n, w in side.items()} for side in pair_of(spec, dtype=DOUBLE))
    with pytest.raises(SpecError, match=r"reference: expected finite values, .* has norm inf"):
        weight_matching(spec, a, b)


def test_statistics_move_and_do_not_count():
    spec = convolutional_spec()
    a, b, element = planted(spec, PERMUTATION)
    other = {**b, "mean": 100.0 * torch.randn_like(b["mean"]), "scale": b["scale"] + 1.0}
    aligned, report = weight_matching(spec, a, other, restarts=2)
    assert (report.distance_after == 0).all()
    inverse = spec.invert(element)
    assert torch.equal(aligned["mean"], other["mean"].gather(-1, inverse["hidden"]))
    assert torch.equal(aligned["scale"], other["scale"])
    without = {name: w for name, w in a.items() if spec.tensors[name].kind == "parameter"}
    assert_equal(weight_matching(spec, without, other, restarts=2)[0], aligned)


def test_gradients_pass_through_and_arguments_are_left_alone():
    spec = SPECS["sine"]
    a, b = pair_of(spec)
    kept = {name: w.clone() for name, w in b.items()}
    for w in b.values():
        w.requires_grad_()
    aligned, report = weight_matching(spec, a, b)
    assert not report.objective.requires_grad
    sum(w.sum() for w in aligned.values()).backward()
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in b.values())
    assert_equal({name: w.detach() for name, w in b.items()}, kept)


def test_the_report_prints_as_one_line():
    spec = WeightSpec.mlp([1, 2, 1], bias=False)
    a = {"layers.0.weight": torch.tensor([[3.0], [0.0]]), "layers.1.weight": torch.tensor([[0.0, 4.0]])}
    b = {"layers.0.weight": torch.tensor([[0.0], [3.0]]), "layers.1.weight": torch.tensor([[4.0, 0.0]])}
    _, report = weight_matching(spec, a, b)
    assert str(report).startswith("weight-matching: distance 7.071 -> 0, inner product 25, 1 sweep, ")
    _, report = weight_matching(spec, a, {name: w.expand(3, *w.shape) for name, w in b.items()})
    text, _, seconds = report.summary().rpartition(", ")
    assert (
        text == "weight-matching of 3 networks, means: distance 7.071 -> 0, inner product 25, at most 1 sweep"
    )
    assert seconds == f"{report.seconds:.2g} s"


# -- what it refuses ---------------------------------------------------------------------------------------


def cubic_spec():
    return WeightSpec.build([Group("g", 3)], {"cube": TensorSpec.dense((3, 3, 3), ["g"] * 3)})


def pairs_of_heads_spec():
    """Heads with features that meet heads with features."""
    dims = (
        Dim(0, 24, 3, "heads"),
        Dim(0, 12, 2, "features", (0,)),
        Dim(1, 4, 3, "heads"),
        Dim(1, 2, 2, "features", (2,)),
    )
    groups = [Group("heads", 3), Group("features", 2, ("heads",))]
    return WeightSpec.build(groups, {"w": TensorSpec((6, 6), (Cell(tuple(_row_major(dims))),))})


def _row_major(dims):
    strides = [math.prod(dim.size for dim in dims[at + 1 :]) for at in range(len(dims))]
    return (Dim(d.axis, stride, d.size, d.group, d.parents) for d, stride in zip(dims, strides, strict=True))


def two_parents_spec():
    dims = Dim(0, 6, 2, "a"), Dim(1, 2, 3, "b"), Dim(2, 1, 2, "c", (0, 1))
    groups = [Group("a", 2), Group("b", 3), Group("c", 2, ("a", "b"))]
    return WeightSpec.build(groups, {"w": TensorSpec((2, 3, 2), (Cell(dims),))})


def repeated_phase_spec():
    tensors = {"w": TensorSpec.dense((3, 3), ["g", "g"]), "b": TensorSpec.dense((3,), ["g"])}
    phase = Scaling("p", "g", "phase", (Exponent("w", 0, 1),), (Exponent("b", 0, 0),), 0.1)
    return WeightSpec.build([Group("g", 3)], tensors, [phase])


def shared_shift_spec():
    """A phase that shifts numbers which units of another group share."""
    tensors = {"b": TensorSpec.dense((3, 2), ["g", "h"]), "u": TensorSpec.dense((3,), ["g"])}
    phase = Scaling("p", "g", "phase", (Exponent("u", 0, 0),), (Exponent("b", 0, 0),), 0.1)
    return WeightSpec.build([Group("g", 3), Group("h", 2)], tensors, [phase])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (cubic_spec(), r"group 'g' occurs 3 times in a cell of tensor 'cube': not supported"),
        (pairs_of_heads_spec(), r"'heads' is repeated in a cell of tensor 'w' and has groups nested in it"),
        (two_parents_spec(), r"'c' lies within 'a' and 'b', of which neither lies within the other"),
        (repeated_phase_spec(), r"'g' is repeated in a cell of tensor 'w' and has a phase: not supported"),
        (shared_shift_spec(), r"'g': its phase shifts what is not flipped unit by unit"),
        (
            WeightSpec(Frozen(), Frozen({"w": TensorSpec.dense((3,), [None], kind="statistic")})),
            "no parameters to match",
        ),
    ],
)
def test_what_is_not_supported_is_named(spec, message):
    weights = random_weights(spec)
    with pytest.raises(SpecError, match=message):
        weight_matching(spec, weights, weights, symmetries=PHASES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"symmetries": ("rotation",)},
            "expected some of permutation, positive, sign, phase, found 'rotation'",
        ),
        ({"symmetries": ()}, "expected some of permutation, positive, sign, phase, found none"),
        ({"first": "last"}, "first: expected given or layers, found 'last'"),
        ({"tolerance": -0.1}, "tolerance: expected a finite number of at least 0, found -0.1"),
        ({"tolerance": math.nan}, "tolerance: expected a finite number of at least 0, found nan"),
        ({"restarts": 0}, "restarts: expected at least 1, found 0"),
        ({"max_sweeps": -1}, "max_sweeps: expected at least 1, found -1"),
        ({"seed": -1}, "seed: expected at least 0, found -1"),
    ],
)
def test_options_are_checked(options, message):
    spec = SPECS["tanh"]
    weights = random_weights(spec)
    with pytest.raises(ConfigError, match=message):
        weight_matching(spec, weights, weights, **options)


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (without(a, "stem"), b), "reference: parameter 'stem' is missing"),
        (lambda a, b: (a, without(b, "mean")), "weights: statistic 'mean' is missing"),
        (lambda a, b: (a, {**b, "stem": b["stem"][..., 0]}), "'stem' should end in shape"),
        (lambda a, b: (a, {**b, "other": b["stem"]}), "unknown tensor 'other'"),
        (lambda a, b: (rows(a, slice(3)), b), r"batch shape \[4\] does not broadcast .* \[3\]"),
        (
            lambda a, b: (a, {**b, "leave": b["leave"].index_fill(0, torch.tensor(2), torch.nan)}),
            "weights: expected finite values, but tensor 'leave' of pair 2 has norm nan",
        ),
        (
            lambda a, b: ({**a, "enter": a["enter"] * 1e18}, {**b, "stem": b["stem"] * 3e18}),
            r"weights: tensor 'stem' of pair \d has norm .*e\+19, whose products overflow float32",
        ),
        (lambda a, b: ({**a, "stem": a["stem"] / 0}, b), "reference: .* 'stem' of pair 0 has norm inf"),
        (lambda a, b: (a, {**b, "stem": b["stem"] + 1j}), "expected real parameters, found torch.complex64"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    spec = convolutional_spec()
    a, b = change(*pair_of(spec))
    with pytest.raises(SpecError, match=message):
        weight_matching(spec, a, b)
