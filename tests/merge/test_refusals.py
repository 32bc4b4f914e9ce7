"""What cannot be merged is refused in one sentence, before anything is merged."""

import pytest
import torch

from weightspace import merge
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.merge import MERGERS, find_merger, prepare
from weightspace.merge._checks import _check_mapping
from weightspace.merge._registry import merger
from weightspace.spec import Frozen, TensorSpec, WeightSpec
from weightspace.testing import LazyNetwork, LiveTensors, random_weights

BASE = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
A = {"w": torch.ones(2, 3), "b": torch.ones(2)}
B = {"w": torch.full((2, 3), 2.0), "b": torch.ones(2)}


def given_to(method):
    """All that a method needs, all of it right."""
    found, arguments = MERGERS[method], {}
    if found.base:
        arguments["base"] = BASE
    if found.statistics == "fisher":
        arguments["statistics"] = [A, B]
    if found.statistics == "grams":
        arguments["statistics"] = [{"w": torch.eye(3)}] * 2
    if found.score:
        arguments["score"] = lambda network: 0.0
    if method == "weighted":
        arguments["weights"] = [1, 1]
    return arguments


@pytest.mark.parametrize("method", MERGERS)
def test_every_method_refuses_networks_that_differ_or_are_spoilt(method):
    arguments = given_to(method)
    assert set(prepare(method, [A, B], **arguments)) == {"w", "b"}
    spoilt = {"w": torch.full((2, 3), torch.nan), "b": torch.ones(2)}
    infinite = {"w": torch.ones(2, 3, dtype=torch.float16), "b": torch.tensor([1.0, -torch.inf])}
    for networks, message in [
        ([A, {"w": A["w"]}], "network 1: tensor 'b' of network 0 is missing"),
        ([{"w": A["w"]}, A], "network 0: tensor 'b' of network 1 is missing"),
        (
            [A, {**A, "w": torch.ones(2, 2)}],
            r"network 1: 'w' should have shape \[2, 3\] as in network 0, found \[2, 2\]",
        ),
        ([A, {**A, "w": torch.ones(3, 2)}], r"found \[3, 2\], which is transposed"),
        ([A, spoilt], "network 1: 'w' has values that are NaN or infinite"),
        ([infinite, A], "network 0: 'b' has values that are NaN or infinite"),
    ]:
        with pytest.raises(SpecError, match=message):
            prepare(method, networks, **arguments)
    if method not in ("average", "task-arithmetic", "dare", "gradient-matching"):
        with pytest.raises(ConfigError, match=r"networks: expected (at least|exactly) two, found one"):
            prepare(method, [A], **arguments)
    with pytest.raises(ConfigError, match=r"networks: expected .*, found none"):
        prepare(method, [], **arguments)
    with pytest.raises(ConfigError, match=f"{method}: strength: no such option; expected one of"):
        prepare(method, [A, B], strength=1, **arguments)


@pytest.mark.parametrize("method", [name for name, found in MERGERS.items() if found.base])
def test_a_base_must_be_none_of_the_networks(method):
    arguments = given_to(method)
    with pytest.raises(ConfigError, match=r"base: expected the network .*, found network 1"):
        prepare(method, [A, BASE], **arguments)
    copy = {name: tensor.clone() for name, tensor in BASE.items()}
    with pytest.raises(ConfigError, match=r"base: expected the network .*, found the values of network 0"):
        prepare(method, [copy, A], **arguments)
    assert prepare(method, [A, {**copy, "b": torch.ones(2)}], **arguments), "frozen tensors are no such base"
    arguments["base"] = {"w": BASE["w"]}
    with pytest.raises(SpecError, match="base: tensor 'b' of network 0 is missing"):
        prepare(method, [A, B], **arguments)
    del arguments["base"]
    with pytest.raises(ConfigError, match=f"{method}: it needs base, found none"):
        prepare(method, [A, B], **arguments)


@pytest.mark.parametrize("method", [name for name, found in MERGERS.items() if found.statistics])
def test_statistics_must_fit_the_networks(method):
    arguments = given_to(method)
    first, second = arguments["statistics"]
    spoilt = {name: tensor * torch.nan for name, tensor in first.items()}
    for statistics, message in [
        ([first], "statistics: expected those of 2 networks, found those of 1"),
        ([{}, {}], "statistics 0: expected tensors under the names of the networks', found none"),
        ([first, {}], "statistics 1: tensor 'w' is missing"),
        (
            [{**first, "v": first["w"]}, {**second, "v": first["w"]}],
            "statistics 0: 'v' is no tensor of the networks",
        ),
        ([first, spoilt], "statistics 1: 'w' has values that are NaN or infinite"),
        (
            [first, {**first, "w": torch.ones(4, 4)}],
            r"statistics 1: 'w' .*should have .*shape \[., 3\].*, found \[4, 4\]",
        ),
    ]:
        with pytest.raises((ConfigError, SpecError), match=message):
            prepare(method, [A, B], **{**arguments, "statistics": statistics})
    del arguments["statistics"]
    with pytest.raises(ConfigError, match=f"{method}: it needs statistics, found none"):
        prepare(method, [A, B], **arguments)


def test_fisher_information_is_not_negative():
    with pytest.raises(SpecError, match="statistics 1: 'w' should be at least 0 everywhere, found -1"):
        merge.fisher([A, B], statistics=[A, {**A, "w": -A["w"]}])


OPTIONS = [
    ("weighted", {"weights": [1, -1]}, "weights: expected a sum other than 0, found 1, -1"),
    ("weighted", {"weights": [0.1, 0.2, -0.3]}, "weights: expected one per network, 2, found 3"),
    ("weighted", {"weights": [1, torch.nan]}, "weights: .*found nan"),
    ("weighted", {}, "weighted: weights: field required"),
    ("task-arithmetic", {"weights": [1]}, "weights: expected one per network, 2, found 1"),
    ("ties", {"density": 0}, "ties: density: input should be greater than 0, found 0"),
    ("ties", {"density": "1.5"}, "ties: density: input should be less than or equal to 1, found '1.5'"),
    ("ties", {"density": torch.nan}, "ties: density: input should be .*, found nan"),
    ("ties", {"weights": [1, -1]}, "weights: expected none below 0, found -1 at 1"),
    ("ties", {"weights": [0, 0]}, "weights: expected a sum other than 0, found 0, 0"),
    ("dare", {"rate": 1}, "dare: rate: input should be less than 1, found 1"),
    ("dare", {"rate": -0.1}, "dare: rate: input should be greater than or equal to 0, found -0.1"),
    ("dare-ties", {"rate": "all"}, "dare-ties: rate: input should be a valid number"),
    ("slerp", {"t": 1.1}, "slerp: t: input should be less than or equal to 1, found 1.1"),
    ("regmean", {"alpha": 2}, "regmean: alpha: input should be less than or equal to 1, found 2"),
    ("fisher", {"weights": [0, 0]}, "weights: expected a sum other than 0"),
    ("gradient-matching", {"prior": 0}, "gradient-matching: prior: input should be greater than 0, found 0"),
    (
        "gradient-matching",
        {"samples": [1]},
        "samples: expected 2 finite numbers above 0, one per network, found",
    ),
    (
        "gradient-matching",
        {"samples": [1, torch.inf]},
        r"samples: expected 2 finite numbers .*found \[1, inf\]",
    ),
    (
        "gradient-matching",
        {"prior": torch.inf},
        "gradient-matching: prior: expected a finite number, found inf",
    ),
    ("ties", {"scaling": torch.nan}, "ties: scaling: expected a finite number, found nan"),
]


@pytest.mark.parametrize(("method", "options", "message"), OPTIONS)
def test_options_out_of_range_are_named(method, options, message):
    arguments = given_to(method)
    arguments.pop("weights", None)
    with pytest.raises(ConfigError, match=message):
        prepare(method, [A, B], **arguments, **options)


def test_what_a_method_makes_no_use_of_is_refused():
    with pytest.raises(ConfigError, match="average: it makes no use of base"):
        prepare("average", [A, B], base=BASE)
    with pytest.raises(ConfigError, match="ties: it makes no use of statistics"):
        prepare("ties", [A, B], base=BASE, statistics=[A, B])
    with pytest.raises(ConfigError, match="fisher: it makes no use of base_statistics"):
        prepare("fisher", [A, B], statistics=[A, B], base_statistics=A)
    with pytest.raises(ConfigError, match="networks: expected exactly two, found 3, for slerp"):
        prepare("slerp", [A, B, A])
    with pytest.raises(ConfigError, match=r"method: expected one of average, weighted, .*, found 'soup'"):
        find_merger("soup")
    with pytest.raises(ValueError, match="merge method 'ties' is registered twice"):
        merger("ties", lambda stack: stack.mean)(lambda networks: networks)


def test_scores_are_finite():
    with pytest.raises(DataError, match="score: expected a finite number, found nan for network 0"):
        merge.greedy_soup([A, B], score=lambda network: float("nan"))


def test_complex_weights_are_averaged_and_not_trimmed():
    networks = [{"w": torch.tensor([1 + 1j])}, {"w": torch.tensor([3 - 1j])}]
    assert merge.average(networks)["w"].tolist() == [2 + 0j]
    with pytest.raises(ConfigError, match="slerp: 'w' should hold real numbers, found complex64"):
        merge.slerp(networks)


def test_quantised_weights_are_not_merged_without_their_scales():
    quantised = {**A, "w": A["w"].to(torch.float8_e4m3fn)}
    with pytest.raises(SpecError, match="network 1: 'w' should be of at least 16 bits, found float8_e4m3fn"):
        merge.average([A, quantised])


def test_whatever_is_wrong_is_told_before_the_first_tensor_is_merged():
    live = LiveTensors()
    spoilt = {**A, "b": torch.tensor([1.0, torch.nan])}
    with pytest.raises(SpecError, match="network 1: 'b'"):
        merge.stream("average", [LazyNetwork(A, live), LazyNetwork(spoilt, live)])


# -- with a spec -------------------------------------------------------------------------------------------

TIED = WeightSpec(
    Frozen(),
    Frozen({"w": TensorSpec((2,), TensorSpec.dense((2,), [None]).cells, aliases=("head",))}),
    constants=Frozen({"grid": (2,), "count": ()}),
)


def tied(value, head=None, grid=0.5, count=0):
    return {
        "w": torch.full((2,), value),
        "head": torch.full((2,), value if head is None else head),
        "grid": torch.full((2,), grid),
        "count": torch.tensor(count),
    }


def test_a_spec_says_what_is_tied_and_what_is_constant():
    """Copies in two places of memory, as in files that store both names."""
    merged = merge.average([tied(1.0, count=3), tied(2.0, count=4)], spec=TIED)
    assert merged["head"] is merged["w"]
    assert merged["grid"].tolist() == [0.5, 0.5]
    assert merged["count"].item() == 3
    dropped = merge.dare([tied(1.0), tied(2.0)], base=tied(0.0), spec=TIED, weights=[1, 1])
    assert torch.equal(dropped["head"], dropped["w"])


def test_tied_weights_and_constants_that_differ_are_refused():
    with pytest.raises(
        SpecError, match="network 1: 'head' is tied to 'w', expected equal values, found others"
    ):
        merge.average([tied(1.0), tied(2.0, head=2.5)], spec=TIED)
    with pytest.raises(SpecError, match="base: constant 'grid' differs from that of network 0"):
        merge.ties([tied(1.0), tied(2.0)], base=tied(0.0, grid=0.25), spec=TIED)


def test_batches_are_averaged_alone():
    spec = WeightSpec.mlp([2, 3, 1])
    networks = [random_weights(spec, (4,), seed) for seed in (0, 1)]
    assert merge.weighted(networks, weights=[1, 3], spec=spec)["layers.0.weight"].shape == (4, 3, 2)
    with pytest.raises(SpecError, match=r"networks: expected one network each, found batches of shape \[4\]"):
        merge.slerp(networks, spec=spec)


def test_what_is_no_network_is_named():
    with pytest.raises(SpecError, match=r"network 1: expected a mapping of names to tensors.* found Linear"):
        _check_mapping("network 1", torch.nn.Linear(1, 1))  # beartype would refuse it earlier


def test_soups_of_other_networks_than_a_merge_takes_have_no_members():
    with pytest.raises(ConfigError, match="networks: expected at least two, found none, for greedy-soup"):
        merge.soup_members([], len)
    with pytest.raises(SpecError, match="network 1: tensor 'w' of network 0 is missing"):
        merge.soup_members([{"w": A["w"]}, {"v": A["w"]}], len)
