"""Each merge method: a value worked out by hand, a slow oracle, and the traps that such methods fall into."""

import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace import merge
from weightspace.errors import SpecError
from weightspace.merge._slerp import arc
from weightspace.merge._threshold import largest
from weightspace.testing import merge_inputs


def one(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def several(count, sizes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            for name, size in sizes.items()
        }
        for _ in range(count)
    ]


# -- averages ----------------------------------------------------------------------------------------------


def test_weights_are_normalised_and_a_weight_of_0_counts_as_0():
    networks = [one(1.0), one(10.0), one(100.0)]
    assert merge.weighted(networks, weights=[1, 0, 3])["w"].item() == pytest.approx(301 / 4)
    assert merge.weighted(networks, weights=[2, 0, 6])["w"].item() == pytest.approx(301 / 4)
    assert merge.weighted(networks, weights=[2.0, -1.0, 0.0])["w"].item() == pytest.approx(-8.0)


def test_a_zero_in_a_network_is_a_value_and_not_missing():
    """Methods that mask by ``weight != 0`` fail here: both changes are from 1 to 0."""
    base, networks = one(1.0, 5.0), [one(0.0, 5.0), one(0.0, 5.0)]
    for name in ("task-arithmetic", "ties", "dare", "dare-ties", "model-stock"):
        options = {"weights": [0.5, 0.5]} if name in ("task-arithmetic", "dare") else {}
        options |= {"rate": 0.0} if "dare" in name else {}
        assert merge.merge_networks(name, networks, base=base, **options)["w"].tolist() == [0.0, 5.0], name
    assert merge.average([one(0.0), one(1.0)])["w"].item() == 0.5
    assert merge.slerp([one(0.0, 0.0), one(2.0, 4.0)])["w"].tolist() == [1.0, 2.0]
    assert merge.fisher([one(0.0), one(1.0)], statistics=[one(1.0), one(1.0)])["w"].item() == 0.5


# -- slerp -------------------------------------------------------------------------------------------------


def test_slerp_by_hand():
    """60 degrees apart: after a third of the way, 20 degrees."""
    a, b = one(1.0, 0.0), one(0.5, math.sqrt(3) / 2)
    merged = merge.slerp([a, b], t=1 / 3)["w"]
    expected = torch.tensor([math.cos(math.radians(20)), math.sin(math.radians(20))])
    assert torch.allclose(merged, expected)
    for t, end in ((0.0, a), (1.0, b)):
        assert torch.equal(merge.slerp([a, b], t=t)["w"], end["w"])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-1.0, -2.0]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_parallel_opposite_and_zero_tensors_are_interpolated_linearly(a, b):
    merged = merge.slerp([one(*a), one(*b)], t=0.25)["w"]
    assert torch.allclose(merged, 0.75 * torch.tensor(a) + 0.25 * torch.tensor(b))


def test_the_arc_goes_over_into_the_line():
    angle = 1.1e-3  # just above where the line takes over
    first, second = arc(1.0, math.cos(angle), 1.0, 0.25)
    assert (first, second) == pytest.approx((0.75, 0.25), abs=1e-6)


# -- task arithmetic, TIES, DARE ---------------------------------------------------------------------------


def test_task_arithmetic_by_hand():
    base, a, b = one(1.0, 1.0), one(2.0, 0.0), one(1.0, 3.0)
    merged = merge.task_arithmetic([a, b], base=base, weights=[2.0, -0.5])["w"]
    assert merged.tolist() == [1 + 2 * 1, 1 + 2 * -1 - 0.5 * 2]
    assert merge.task_arithmetic([a], base=base)["w"].tolist() == pytest.approx([1.4, 0.6])
    forgotten = merge.task_arithmetic([a], base=base, weights=[-1.0])["w"]
    assert forgotten.tolist() == [0.0, 2.0]


def test_ties_by_hand():
    base = {"w": torch.tensor([10.0, 10.0]), "v": torch.tensor([10.0, 10.0])}
    a = {"w": torch.tensor([14.0, 8.0]), "v": torch.tensor([10.5, 11.0])}  # changes 4, -2, .5, 1
    b = {"w": torch.tensor([13.0, 13.0]), "v": torch.tensor([9.0, 10.25])}  # changes 3, 3, -1, .25
    # halves are kept: a's 4 and -2, b's 3 and 3; signs +, +; the mean of 4 and 3, and 3 alone
    merged = merge.ties([a, b], base=base, density=0.5, scaling=2.0)
    assert merged["w"].tolist() == [10 + 2 * 3.5, 10 + 2 * 3.0]
    assert merged["v"].tolist() == [10.0, 10.0], (
        "trimming is global: nothing of a tensor with small changes is left"
    )
    # a counts three times: elected are + (4), - (3 * -2 + 3 = -3)
    weighted = merge.ties([a, b], base=base, density=0.5, weights=[3, 1])["w"]
    assert weighted.tolist() == [10 + (3 * 4 + 3) / 4, 8.0]


def test_changes_that_cancel_leave_the_base():
    assert merge.ties([one(1.0, 2.0), one(-1.0, 2.0)], base=one(0.0, 0.0), density=1.0)["w"].tolist() == [
        0.0,
        2.0,
    ]


@pytest.mark.parametrize("density", [1e-9, 0.01])
def test_a_density_below_one_entry_keeps_the_largest(density):
    networks = [one(1.0, -3.0, 2.0), one(1.0, -3.0, 2.0)]
    merged = merge.ties(networks, base=one(0.0, 0.0, 0.0), density=density)["w"]
    assert merged.tolist() == [0.0, -3.0, 0.0]


def sorted_ties(networks, base, density, scaling):
    """TIES on whole networks as vectors, by sorting and by loops over entries."""
    start = torch.cat([tensor.flatten().double() for tensor in base.values()])
    changes = [torch.cat([n[name].flatten().double() for name in base]) - start for n in networks]
    keep = max(1, math.floor(density * len(start) + 0.5))
    trimmed = []
    for change in changes:
        smallest = change.abs().sort(descending=True).values[keep - 1]
        trimmed.append([x if abs(x) >= smallest else 0.0 for x in change.tolist()])
    merged = []
    for at, origin in enumerate(start.tolist()):
        entries = [change[at] for change in trimmed]
        sign = math.copysign(1, sum(entries)) if sum(entries) else 0
        agreeing = [x for x in entries if x * sign > 0]
        merged.append(origin + scaling * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return torch.tensor(merged, dtype=torch.float64)


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(1e-3, 1), st.integers(2, 4), st.booleans())
def test_ties_is_that_of_a_full_sort(seed, density, count, coarse):
    base, *networks = several(count + 1, {"w": (7, 3), "v": (11,), "u": ()}, seed, torch.float64)
    if coarse:  # many equal magnitudes, and changes of exactly 0
        base, *networks = ({k: (2 * v).round() for k, v in network.items()} for network in (base, *networks))
        networks[0]["w"][0, 0] += 1  # not the base itself
        networks[1]["w"][0, 1] += 1
    merged = merge.ties(networks, base=base, density=density, scaling=0.7)
    expected = sorted_ties(networks, base, density, 0.7)
    assert torch.allclose(torch.cat([merged[name].flatten() for name in base]), expected)


@settings(max_examples=40)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_the_threshold_is_the_one_that_sorting_finds(data, dtype):
    width = 32 if dtype == torch.float32 else 64
    numbers = st.floats(0, allow_infinity=False, width=width)
    values = data.draw(st.lists(numbers, min_size=1, max_size=40))
    values = torch.tensor(values * data.draw(st.integers(1, 3)), dtype=dtype)
    ranks = [data.draw(st.integers(1, len(values))) for _ in range(2)]
    found = largest(lambda: ([part, part] for part in values.split(7)), ranks, dtype, values.device)
    assert found == [values.sort(descending=True).values[rank - 1].item() for rank in ranks]


def test_dare_drops_at_its_rate_enlarges_the_rest_and_keeps_the_mean():
    size = 200_000
    base, network = {"w": torch.zeros(size)}, {"w": torch.ones(size)}
    merged = merge.dare([network], base=base, rate=0.75, weights=[1.0])["w"]
    assert set(merged.tolist()) == {0.0, 4.0}
    deviation = math.sqrt(0.75 * 0.25 / size)
    assert abs((merged == 0).double().mean().item() - 0.75) < 5 * deviation


def test_what_dare_drops_depends_on_seed_place_and_name_alone():
    base = {"w": torch.zeros(64), "v": torch.zeros(64)}
    ones = {"w": torch.ones(64), "v": torch.ones(64)}

    def kept(networks, base, **options):
        return merge.dare(networks, base=base, weights=[1.0, 1000.0][: len(networks)], **options)

    first = kept([ones], base)
    assert torch.equal(kept([ones], base)["w"], first["w"])
    assert not torch.equal(kept([ones], base, seed=1)["w"], first["w"])
    assert not torch.equal(first["v"], first["w"])
    alone = kept([{"v": ones["v"]}], {"v": base["v"]})
    assert torch.equal(alone["v"], first["v"]), "other tensors make no difference"
    both = kept([ones, ones], base)["w"]
    assert torch.equal(both % 1000, first["w"])
    assert not torch.equal(both // 1000, first["w"])


def test_dare_ties_by_hand():
    """What is left after dropping is trimmed and elected as by TIES of the same network."""
    base, a = {"w": torch.zeros(32)}, {"w": torch.arange(1.0, 33.0)}
    dropped = merge.dare([a], base=base, rate=0.5, weights=[1.0])
    twin = {"w": a["w"] * 1e-3}  # too small to be kept where the other is
    merged = merge.dare_ties([a, twin], base=base, rate=0.5, density=0.25, weights=[1.0, 0.0])["w"]
    kept = dropped["w"].sort(descending=True).values[7]
    assert torch.equal(merged, torch.where(dropped["w"] >= kept, dropped["w"], 0.0))


# -- with statistics ---------------------------------------------------------------------------------------


def test_fisher_by_hand():
    networks, statistics = [one(1.0, 2.0), one(5.0, 4.0)], [one(3.0, 0.0), one(1.0, 0.0)]
    assert merge.fisher(networks, statistics=statistics)["w"].tolist() == pytest.approx([2.0, 3.0])
    merged = merge.fisher(networks, statistics=statistics, weights=[1, 3])["w"]
    assert merged.tolist() == pytest.approx([3.0, 3.5])


def test_fisher_of_minute_information_is_still_its_ratio():
    statistics = [one(3e-20), one(1e-20)]
    assert merge.fisher([one(1.0), one(5.0)], statistics=statistics)["w"].item() == pytest.approx(2.0)


def test_tensors_without_information_are_averaged():
    networks = [{"w": torch.ones(1), "v": torch.ones(1)}, {"w": torch.zeros(1), "v": torch.zeros(1)}]
    statistics = [one(3.0), one(1.0)]
    merged = merge.fisher(networks, statistics=statistics)
    assert (merged["w"].item(), merged["v"].item()) == (0.75, 0.5)


def test_gradient_matching_by_hand():
    base, networks, statistics = one(1.0), [one(2.0), one(5.0)], [one(2.0), one(3.0)]
    # P = 1 + 2 * 0.5 = 2; total = 2 + 0.5 * 1 * 2 + 1 * 4 * 3 = 15
    merged = merge.gradient_matching(
        networks,
        base=base,
        statistics=statistics,
        base_statistics=one(0.5),
        weights=[0.5, 1.0],
        samples=[1, 4],
        base_samples=2.0,
        prior=1.0,
    )["w"]
    assert merged.item() == pytest.approx(1 + 0.5 * (2 + 2) / 15 * 1 + 1.0 * (12 + 2) / 15 * 4)


def test_gradient_matching_finds_the_minimum_of_quadratic_losses():
    """Losses h_i / 2 (w - m_i)^2, each network the minimum of its own with the base's loss around the base."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.rand(3, 6, generator=generator, dtype=torch.float64) + 0.1
    start, *minima = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    prior, own, tasks = 0.3, curvature[0], curvature[1:]
    held = own + prior
    networks = [(h * m + held * start) / (h + held) for h, m in zip(tasks, minima, strict=True)]
    joint = (held * start + sum(h * m for h, m in zip(tasks, minima, strict=True))) / (held + sum(tasks))
    merged = merge.gradient_matching(
        [{"w": network} for network in networks],
        base={"w": start},
        statistics=[{"w": h} for h in tasks],
        base_statistics={"w": own},
        prior=prior,
    )["w"]
    assert torch.allclose(merged, joint)


def test_regmean_is_least_squares_on_all_data():
    """Against numpy's solver on the concatenated inputs and the outputs that each network gives."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, 5, generator=generator, dtype=torch.float64) for rows in (9, 4, 7)]
    layers = [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in inputs]
    outputs = torch.cat([x @ w.T for x, w in zip(inputs, layers, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    networks = [{"fc.weight": w, "fc.bias": w[:, 0].clone()} for w in layers]
    grams = [{"fc.weight": x.T @ x} for x in inputs]
    merged = merge.regmean(networks, statistics=grams, alpha=1.0)
    assert torch.allclose(merged["fc.weight"], expected, atol=1e-8)
    assert torch.allclose(merged["fc.bias"], torch.stack(layers)[:, :, 0].mean(0))


def test_regmean_without_correlations_is_an_average_by_the_inputs_sizes():
    networks = [{"w": torch.tensor([[1.0, 2.0]])}, {"w": torch.tensor([[3.0, 6.0]])}]
    grams = [{"w": torch.tensor([[3.0, 1.5], [1.5, 1.0]])}, {"w": torch.tensor([[1.0, -0.5], [-0.5, 1.0]])}]
    merged = merge.regmean(networks, statistics=grams, alpha=0.0)["w"]
    assert merged.flatten().tolist() == pytest.approx([1.5, 4.0])


def test_regmean_keeps_the_mean_where_inputs_never_occur():
    networks = [{"w": torch.tensor([[1.0, 2.0]])}, {"w": torch.tensor([[3.0, 6.0]])}]
    seen = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    merged = merge.regmean(networks, statistics=[{"w": seen}, {"w": 3 * seen}], alpha=1.0)["w"]
    assert merged.flatten().tolist() == pytest.approx([2.5, 4.0])
    nothing = merge.regmean(networks, statistics=[{"w": 0 * seen}, {"w": 0 * seen}])["w"]
    assert nothing.flatten().tolist() == pytest.approx([2.0, 4.0])


def test_gram_matrices_of_single_precision_or_of_few_inputs_are_solved_and_others_refused():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 40, generator=generator)  # of rank 3, and rounded
    networks = several(2, {"w": (2, 40)})
    grams = [{"w": inputs.T @ inputs}] * 2
    merged = merge.regmean(networks, statistics=grams, alpha=1.0)["w"]
    assert torch.allclose(merged, (networks[0]["w"] + networks[1]["w"]) / 2, atol=1e-3)
    with pytest.raises(SpecError, match=r"statistics 1: the Gram matrix of 'w' .* below 0 .*, found -1"):
        merge.regmean(networks, statistics=[grams[0], {"w": -torch.eye(40)}])


# -- Model Stock, soups ------------------------------------------------------------------------------------


def test_model_stock_by_hand():
    """Three changes at right angles stay at the base; at 60 degrees, t = 3 c / (1 + 2 c) with c = 1/2 is 3/4."""
    base = one(1.0, 1.0, 1.0)
    orthogonal = [{"w": base["w"] + row} for row in 2 * torch.eye(3)]
    assert torch.allclose(merge.model_stock(orthogonal, base=base)["w"], base["w"])
    slanted = [{"w": base["w"] + row} for row in torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 1, 1]])]
    assert torch.allclose(merge.model_stock(slanted, base=base)["w"], 1 + 0.75 * torch.full((3,), 2 / 3))
    opposite = [one(3.0, 1.0, 1.0), one(-1.0, 1.0, 1.0)]
    assert torch.allclose(merge.model_stock(opposite, base=base)["w"], base["w"])


def test_model_stock_looks_at_each_tensor_by_itself():
    base = {"w": torch.zeros(2), "v": torch.zeros(2)}
    a = {"w": torch.tensor([1.0, 0.0]), "v": torch.tensor([1.0, 1.0])}
    b = {"w": torch.tensor([0.0, 1.0]), "v": torch.tensor([1.0, 1.0])}
    merged = merge.model_stock([a, b], base=base)
    assert torch.allclose(merged["w"], torch.zeros(2), atol=1e-6)
    assert torch.allclose(merged["v"], torch.ones(2))


def test_a_greedy_soup_takes_what_does_not_make_it_worse():
    """2 is best: 1.5 and 3 are better together than 1.5 alone, and worse with 0 or with 9."""
    networks = [one(9.0), one(3.0), one(0.0), one(1.5)]
    calls = []

    def score(network):
        calls.append(network["w"].item())
        return -abs(network["w"].item() - 2.0)

    assert merge.soup_members(networks, score) == [3, 1]
    assert calls == [9.0, 3.0, 0.0, 1.5, 2.25, 1.5, pytest.approx(4.5)]
    assert merge.greedy_soup(networks, score=score)["w"].item() == 2.25


# -- what is no parameter ----------------------------------------------------------------------------------


def test_variances_stay_positive_where_task_vectors_would_make_them_negative():
    base, a, b = (merge_inputs(seed) for seed in (0, 1, 2))
    a["norm.running_var"], b["norm.running_var"] = torch.full((5,), 0.1), torch.full((5,), 0.3)
    base["norm.running_var"] = torch.full((5,), 9.0)
    merged = merge.task_arithmetic([a, b], base=base, weights=[1.0, 1.0])
    assert torch.allclose(merged["norm.running_var"], torch.full((5,), 0.2))
    del base["norm.num_batches_tracked"], a["norm.num_batches_tracked"], b["norm.num_batches_tracked"]
    unknown = merge.task_arithmetic([a, b], base=base, weights=[1.0, 1.0])["norm.running_var"]
    assert torch.allclose(unknown, torch.full((5,), -8.6)), "a name alone tells nothing"


def test_weights_tied_in_one_network_alone_are_merged_separately():
    tied, loose = merge_inputs(1), merge_inputs(2)
    loose["head.weight"] = loose["head.weight"] + 1.0
    merged = merge.average([tied, loose])
    assert torch.allclose(merged["head.weight"], merged["embed.weight"] + 0.5)


def test_tied_weights_are_trimmed_once():
    """Counted twice, the changes of the embedding would be more than half of all."""
    base = {"embed": torch.zeros(2), "v": torch.zeros(2)}
    networks = [{"embed": torch.tensor([4.0, 3.0]), "v": torch.tensor([2.0, 1.0])} for _ in range(2)]
    for network in (base, *networks):
        network["head"] = network["embed"]
    merged = merge.ties(networks, base=base, density=0.75)
    assert merged["embed"].tolist() == [4.0, 3.0]
    assert merged["v"].tolist() == [2.0, 0.0]
    assert merged["head"] is merged["embed"]


def test_dtypes_that_differ_give_the_wider_one():
    a, b = one(1.0, 2.0, dtype=torch.float16), one(3.0, 4.0, dtype=torch.bfloat16)
    for name in ("average", "slerp"):
        merged = merge.merge_networks(name, [a, b])["w"]
        assert merged.dtype == torch.float32
        assert merge.prepare(name, [a, b]).meta("w").dtype == torch.float32
    merged = merge.ties([a, b], base=one(0.0, 0.0, dtype=torch.float64), density=1.0)["w"]
    assert merged.tolist() == [2.0, 3.0]


def test_a_merged_network_can_be_merged_again():
    a, b, c = (merge_inputs(seed) for seed in (1, 2, 3))
    nested = merge.prepare("average", [merge.prepare("average", [a, b]), c]).gather()
    direct = merge.average([a, b, c], [0.25, 0.25, 0.5])
    assert torch.allclose(nested["embed.weight"], direct["embed.weight"])
    assert nested["head.weight"] is nested["embed.weight"]


# -- extremes, and what a stranger gives -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-100, 1.0, 1e100])
def test_the_arc_does_not_depend_on_the_size_of_double_precision_weights(size):
    a, b = one(size, 0.0, dtype=torch.float64), one(size, size, dtype=torch.float64)
    found = merge.slerp([a, b])["w"] / size
    half = math.pi / 8
    assert found.tolist() == pytest.approx([1 / math.cos(half), 0.5 / math.cos(half)])


@pytest.mark.parametrize("size", [1e-32, 1.0, 1e39])
def test_weights_count_by_their_ratio_alone(size):
    a, b, base = one(3.0), one(1.0), one(0.0)
    assert merge.ties([a, b], base=base, density=1.0, weights=[3 * size, size])["w"].item() == 2.5
    information = [one(1.0), one(1.0)]
    found = merge.fisher([a, b], statistics=information, weights=[3 * size, size])["w"]
    assert found.item() == pytest.approx(2.5)


def test_information_near_the_largest_number_does_not_overflow():
    information = [one(3e38), one(1e38)]
    assert merge.fisher([one(2.0), one(6.0)], statistics=information)["w"].item() == pytest.approx(3.0)


def test_empty_tensors_and_their_gram_matrices():
    empty = {"w": torch.ones(3, 0)}
    assert merge.regmean([empty, empty], statistics=[{"w": torch.ones(0, 0)}] * 2)["w"].shape == (3, 0)


@pytest.mark.parametrize("method", ["fisher", "gradient-matching", "regmean"])
def test_statistics_of_tied_weights_count_under_either_name(method):
    """Files may hold names in another order than the module does."""
    networks = several(3, {"in": (4, 3)})
    rows = several(2, {"in": (9, 3)}, seed=1)
    kinds = {"regmean": lambda tensor: tensor.T @ tensor}
    values = [kinds.get(method, lambda tensor: tensor[:4].square())(row["in"]) for row in rows]
    base, *tied = [{"out": network["in"], "in": network["in"]} for network in networks]
    given = {"base": base} if method == "gradient-matching" else {}
    found = [
        merge.merge_networks(method, tied, statistics=[{name: value} for value in values], **given)["out"]
        for name in ("out", "in")
    ]
    assert torch.equal(*found)
    assert not torch.allclose(found[1], (tied[0]["in"] + tied[1]["in"]) / 2)


def test_integers_of_other_widths_are_those_of_the_first_and_said_to_be():
    first, second = {"n": torch.tensor(3, dtype=torch.int32)}, {"n": torch.tensor(5)}
    lazy = merge.prepare("average", [first, second])
    assert lazy["n"].dtype == lazy.meta("n").dtype == torch.int32


class Reading(Mapping):
    """A lazy network that counts how often each tensor is read."""

    def __init__(self, weights):
        self.weights, self.reads = weights, Counter()

    def __getitem__(self, name):
        self.reads[name] += 1
        return self.weights[name].clone()

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)

    def meta(self, name):
        return self.weights[name].to("meta")


def test_checks_read_each_tensor_once_and_merging_once_more():
    networks = [Reading(merge_inputs(seed)) for seed in (1, 2)]
    _, *names = networks[0]  # checks of annotations under pytest read the first
    lazy = merge.prepare("average", networks)
    assert "scale" in lazy
    assert "else" not in lazy
    assert {network.reads[name] for network in networks for name in names} == {1}
    for _ in lazy.items():
        pass
    floating = {name for name in names if lazy.meta(name).is_floating_point()}
    assert {network.reads[name] for network in networks for name in floating} == {2}
