"""C2M3: the climb rises by exact steps, ends at least as high as merge-many, and every cycle of maps closes."""

import itertools
import json

import numpy as np
import pytest
import torch

from weightspace.align import MATCHERS, Matcher, cycle_consistent, merge_many
from weightspace.align._cycle_consistent import Climb, pairs, stacked
from weightspace.align._report import Stopwatch, finish
from weightspace.align._soft import act_soft
from weightspace.align.judging import cycle_error
from weightspace.errors import ConfigError
from weightspace.spec import Cell, Dim, Group, TensorSpec, WeightSpec
from weightspace.testing import mixed_spec, random_weights

DOUBLE = torch.float64
MLP = WeightSpec.mlp([3, 7, 6, 2])


def recurrent_spec():
    tensors = {
        "in": TensorSpec.dense((6, 3), ["state", None]),
        "recurrent": TensorSpec.dense((6, 6), ["state", "state"]),
        "out": TensorSpec.dense((2, 6), [None, "state"]),
    }
    return WeightSpec.build([Group("state", 6, activation="tanh")], tensors)


def networks_of(spec, count=4, dtype=torch.float32, seed=0):
    return [random_weights(spec, seed=100 * seed + number, dtype=dtype) for number in range(count)]


def climb_of(spec, count=4):
    return Climb(spec, stacked(networks_of(spec, count, DOUBLE)), tuple(spec.groups))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# -- Frank-Wolfe -------------------------------------------------------------------------------------------


def test_the_objective_is_the_sum_over_ordered_pairs():
    first, second = (stacked(networks_of(MLP, 3, DOUBLE, seed)) for seed in (0, 1))
    expected = sum(
        (first[name][a] * second[name][b]).sum()
        for name in first
        for a, b in itertools.permutations(range(3), 2)
    )
    assert pairs(first, second).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("spec", [MLP, recurrent_spec()], ids=["mlp", "recurrent"])
def test_every_step_goes_to_the_top_of_its_line(spec, monkeypatch):
    """Against the objective itself at many places of the line, and at the place that was chosen."""
    climb, lines = climb_of(spec), []
    length = Climb._length

    def watched(self, matrices, target, *rest):
        chosen = length(self, matrices, target, *rest)
        lines.append((matrices, target, chosen))
        return chosen

    monkeypatch.setattr(Climb, "_length", watched)
    climb.run(climb.start(), 4, 0.0)

    def objective(matrices, target, t):
        between = {name: (1 - t) * matrices[name] + t * target[name] for name in matrices}
        moved = act_soft(spec, between, climb.networks)
        return pairs(moved, moved).item()

    assert len(lines) >= 2
    for matrices, target, chosen in lines:
        grid = [objective(matrices, target, float(t)) for t in np.linspace(0, 1, 26)]
        assert objective(matrices, target, chosen) >= max(grid) - 1e-9 * abs(max(grid))
    for (matrices, _, _), (later, _, _) in itertools.pairwise(lines):
        assert objective(later, later, 0.0) > objective(matrices, matrices, 0.0)


def test_the_climb_ends_where_no_permutation_promises_more():
    climb = climb_of(MLP)
    matrices, steps = climb.run(climb.start(), 500, 1e-6)
    assert 1 < steps < 500
    again, more = climb.run(matrices, 500, 1e-6)
    assert more == 0
    assert_equal(again, matrices)
    for matrix in matrices.values():
        assert matrix.min() >= 0
        for axis in (-1, -2):
            torch.testing.assert_close(matrix.sum(axis), torch.ones_like(matrix.sum(axis)))


# -- the whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [MLP, recurrent_spec(), mixed_spec()], ids=["mlp", "recurrent", "mixed"])
def test_it_ends_no_lower_than_merge_many(spec):
    gains = []
    for seed in range(3 if spec is MLP else 1):
        networks = networks_of(spec, 4, seed=seed)
        sums = [
            method(spec, networks, **options)[1].distance_after.square().sum().item()
            for method, options in ((merge_many, {"restarts": 1}), (cycle_consistent, {}))
        ]
        gains.append(1 - sums[1] / sums[0])
    assert min(gains) >= -1e-9
    assert max(gains) > 0 or spec is not MLP


def test_it_finds_the_best_there_is_of_a_few_units():
    spec = WeightSpec.mlp([2, 3, 1])
    orders = [torch.tensor(order) for order in itertools.permutations(range(3))]
    for seed in range(3):
        networks = networks_of(spec, 3, DOUBLE, seed)
        flat = [torch.stack([spec.flatten(spec.act({"hidden0": p}, n)) for p in orders]) for n in networks]
        means = (flat[0][0] + flat[1][:, None] + flat[2]) / 3
        squares = sum(network[0].square().sum() for network in flat)
        best = (squares - 3 * means.square().sum(-1)).min().item()
        _, report = cycle_consistent(spec, networks, restarts=4)
        assert report.distance_after.square().sum().item() == pytest.approx(best)


def test_it_runs_in_inference_mode():
    networks = networks_of(MLP)
    expected, _ = cycle_consistent(MLP, networks)
    with torch.inference_mode():
        found, _ = cycle_consistent(MLP, [{n: w.clone() for n, w in network.items()} for network in networks])
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_where_every_group_is_nested_it_is_merge_many():
    dims = (Dim(0, 8, 3, "heads"), Dim(0, 4, 2, "units", (0,)), Dim(1, 1, 4))
    spec = WeightSpec.build(
        [Group("heads", 3), Group("units", 2, ("heads",))], {"query": TensorSpec((6, 4), (Cell(dims),))}
    )
    networks = networks_of(spec)
    _, one = merge_many(spec, networks, restarts=1)
    _, other = cycle_consistent(spec, networks)
    assert_equal(other.element, one.element)


# -- cycles ------------------------------------------------------------------------------------------------


def test_pairwise_maps_do_not_close_and_those_through_the_universe_do():
    networks = networks_of(MLP)
    pairwise, universe = cycle_error(MLP, networks), cycle_error(MLP, networks, "c2m3")
    assert len(pairwise.cycles) == len(universe.cycles) == 4 * 3 * 2
    assert pairwise.moved.mean() > 0.1
    assert pairwise.distance.mean() > 0.1
    assert universe.moved.tolist() == universe.distance.tolist() == [0.0] * 24
    assert "of units do not come back" in str(pairwise)


@pytest.mark.parametrize("method", ["weight-matching", "merge-many"])
def test_cycles_of_shuffled_copies_close(method):
    """However the copies were shuffled: heads, the features within them, and a repeated group."""
    spec, generator = mixed_spec(), torch.Generator().manual_seed(0)
    original = random_weights(spec)
    elements = [spec.random_element(symmetries=["permutation"], generator=generator) for _ in range(3)]
    found = cycle_error(spec, [spec.act(element, original) for element in elements], method, restarts=4)
    assert found.moved.tolist() == [0.0] * 6


def swap(spec, reference, weights, *, seed=0, shift: bool = False):
    """Swaps the first two of four units, or shifts all by one."""
    element = {"hidden0": torch.tensor([1, 2, 3, 0] if shift else [1, 0, 2, 3])}
    return finish(spec, "swap", reference, weights, element, 1, Stopwatch())


def test_what_does_not_come_back_is_counted(monkeypatch):
    monkeypatch.setitem(MATCHERS, "swap", Matcher("swap", swap, "none"))
    spec = WeightSpec.mlp([1, 4, 1], bias=False)
    network = {
        "layers.0.weight": torch.tensor([[1.0], [2.0], [2.0], [4.0]]),
        "layers.1.weight": torch.zeros(1, 4),
    }
    thrice = cycle_error(spec, [network] * 3, "swap")
    assert thrice.cycles[0] == (0, 1, 2)
    assert thrice.moved.tolist() == [0.5] * 6
    assert thrice.distance.tolist() == pytest.approx([(2 / 25) ** 0.5] * 6)
    assert cycle_error(spec, [network] * 3, "swap", length=2).moved.tolist() == [0.0] * 6
    assert cycle_error(spec, [network] * 3, "swap", shift=True).moved.tolist() == [1.0] * 6
    document = json.loads(thrice.to_json())
    assert document["moved"] == 0.5
    assert document["cycles"][0]["through"] == [0, 1, 2]


def test_one_network_has_no_cycles():
    with pytest.raises(ConfigError, match="networks: expected at least two, found 1"):
        cycle_error(MLP, networks_of(MLP, 1))


@pytest.mark.parametrize("length", [1, 4])
def test_cycles_need_so_many_networks(length):
    with pytest.raises(ConfigError, match=f"length: expected 2 to 3 networks in a cycle, found {length}"):
        cycle_error(MLP, networks_of(MLP, 3), length=length)
