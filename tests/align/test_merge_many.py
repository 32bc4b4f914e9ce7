"""Merge many: the sum of squared distances to the mean never rises, and ends where it should."""

import itertools

import numpy as np
import pytest
import torch

from weightspace.align import merge_many
from weightspace.align._merge_many import Descent
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import WeightSpec
from weightspace.testing import mixed_spec, random_weights

DOUBLE = torch.float64


def networks_of(spec, count=4, dtype=torch.float32):
    return [random_weights(spec, seed=seed, dtype=dtype) for seed in range(count)]


def flat_total(spec, networks):
    """The sum of squared distances to the mean, of flattened networks."""
    flat = torch.stack([spec.flatten(network).double() for network in networks])
    return (flat - flat.mean(0)).square().sum().item()


@pytest.mark.parametrize("spec", [WeightSpec.mlp([3, 9, 8, 2]), mixed_spec()], ids=["mlp", "mixed"])
@pytest.mark.parametrize("start", ["gather", "scatter", "given"])
def test_no_turn_raises_the_sum(spec, start, monkeypatch):
    networks = networks_of(spec)
    parameters = [{n: w for n, w in network.items() if n != "running_mean"} for network in networks]
    run = Descent(spec, ("permutation",), parameters, np.random.default_rng(0), [{} for _ in networks])
    if start != "given":
        getattr(run, start)()
    sums = []
    turn = Descent._turn

    def watched(self, *arguments, **options):
        turn(self, *arguments, **options)
        flat = torch.stack([torch.cat([w.flatten() for w in n.values()]) for n in self.moved]).double()
        sums.append((flat - flat.mean(0)).square().sum().item())

    monkeypatch.setattr(Descent, "_turn", watched)
    run.finish()
    sums.insert(0, run.totals[0])
    assert len(sums) == 1 + 4 * (len(run.totals) - 1)
    assert sums[-1] < sums[0]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(sums))
    assert run.totals[-1] == pytest.approx(sums[-1])


def test_the_report_says_what_came_of_it():
    spec = mixed_spec()
    networks = networks_of(spec)
    aligned, report = merge_many(spec, networks, seed=3)
    parameters = [[{**n, "running_mean": torch.zeros(4)} for n in some] for some in (networks, aligned)]
    before, after = (flat_total(spec, some) for some in parameters)
    assert report.distance_before.square().sum().item() == pytest.approx(before)
    assert report.distance_after.square().sum().item() == pytest.approx(after)
    mean = torch.stack([spec.flatten(network).double() for network in parameters[1]]).mean(0)
    for number, network in enumerate(parameters[1]):
        assert report.objective[number].item() == pytest.approx(
            (mean @ spec.flatten(network).double()).item()
        )
        assert torch.equal(
            aligned[number]["running_mean"],
            networks[number]["running_mean"][report.element["stream"][number]],
        )


def test_three_networks_by_hand():
    """One of three has its two units swapped; swapped back, the values are 1, 2, 3 and 4, 5, 6."""
    spec = WeightSpec.mlp([1, 2, 1], bias=False)
    values = [((1.0, 4.0), (0.0, 0.0)), ((5.0, 2.0), (0.0, 0.0)), ((3.0, 6.0), (0.0, 0.0))]
    networks = [
        {"layers.0.weight": torch.tensor(first)[:, None], "layers.1.weight": torch.tensor(last)[None]}
        for first, last in values
    ]
    aligned, report = merge_many(spec, networks)
    found = {tuple(network["layers.0.weight"].flatten().tolist()) for network in aligned}
    assert found in ({(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)}, {(4.0, 1.0), (5.0, 2.0), (6.0, 3.0)})
    assert report.distance_after.tolist() == pytest.approx([2**0.5, 0.0, 2**0.5])
    assert report.objective.tolist() == pytest.approx([2 * 1 + 5 * 4, 2 * 2 + 5 * 5, 2 * 3 + 5 * 6])


def best_by_force(spec, networks):
    """The lowest sum over all orders of the units of all networks but the first."""
    orders = [torch.tensor(order) for order in itertools.permutations(range(spec.groups["hidden0"].size))]
    choices = itertools.product(orders, repeat=len(networks) - 1)
    return min(
        flat_total(
            spec,
            [
                networks[0],
                *(spec.act({"hidden0": p}, n) for p, n in zip(chosen, networks[1:], strict=True)),
            ],
        )
        for chosen in choices
    )


def test_a_few_runs_find_the_best_there_is():
    spec = WeightSpec.mlp([2, 3, 1])
    for seed in range(2):
        networks = [random_weights(spec, seed=10 * seed + number, dtype=DOUBLE) for number in range(3)]
        _, report = merge_many(spec, networks, restarts=5)
        expected = best_by_force(spec, networks)
        assert report.distance_after.square().sum().item() == pytest.approx(expected)


def test_signs_are_matched_too():
    spec = WeightSpec.mlp([2, 8, 8, 1], activation="tanh")
    original = random_weights(spec)
    generator = torch.Generator().manual_seed(0)
    networks = [spec.act(spec.random_element(generator=generator), original) for _ in range(4)]
    _, report = merge_many(spec, networks, symmetries=("permutation", "sign"))
    assert report.distance_before.min() > 1
    assert report.distance_after.max() < 1e-5


def test_two_networks_are_matched_as_a_pair_and_keep_their_types():
    spec = WeightSpec.mlp([2, 6, 1])
    a = random_weights(spec)
    element = spec.random_element(symmetries=["permutation"], generator=torch.Generator().manual_seed(0))
    b = {name: tensor.half() for name, tensor in spec.act(element, a).items()}
    aligned, report = merge_many(spec, [a, b])
    assert {tensor.dtype for tensor in aligned[1].values()} == {torch.float16}
    assert report.distance_after.max() < 2e-3


def test_one_round_at_the_most_where_one_is_asked_for():
    spec = WeightSpec.mlp([3, 9, 8, 2])
    _, report = merge_many(spec, networks_of(spec), max_sweeps=1, restarts=1)
    assert report.sweeps.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "networks: expected at least two to align, found 1"),
        (2, {"restarts": 0}, "restarts: expected at least 1, found 0"),
        (2, {"tolerance": float("nan")}, "tolerance: expected at least 0, found nan"),
        (2, {"seed": -1}, "seed: expected at least 0, found -1"),
        (2, {"symmetries": ("mirror",)}, "symmetries: expected some of permutation, .* found 'mirror'"),
    ],
)
def test_options_out_of_range_are_refused(count, options, message):
    spec = WeightSpec.mlp([1, 3, 1])
    with pytest.raises(ConfigError, match=message):
        merge_many(spec, networks_of(spec, count), **options)


def test_batches_of_networks_are_refused():
    spec = WeightSpec.mlp([1, 3, 1])
    message = r"networks: network 1: expected a single one, found batch shape \[5\]"
    with pytest.raises(SpecError, match=message):
        merge_many(spec, [random_weights(spec), random_weights(spec, (5,))])
