"""What is done to copies of trained networks, and to which of their weights."""

import numpy as np
import pytest
import torch

from weightspace.datagen._distributions import Distribution
from weightspace.datagen.classifiers._copies import COPIES, prune, quantise
from weightspace.nets import CNN, RNN
from weightspace.zoo import spec_of

NETS = {
    "cnn_batch": lambda: CNN((2, 6, 6), (5, 7), 4, norm="batch"),
    "lstm": lambda: RNN(9, 6, 4, cell="lstm"),
}
NETWORKS = 4


@pytest.fixture(params=NETS)
def population(request):
    net = NETS[request.param]()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(NETWORKS, *tensor.shape, generator=generator) * (1 + 0.1 * place) + 0.05
        for place, (name, tensor) in enumerate(net.state_dict().items())
    }
    return spec_of(net), weights


def applied(kind, population, numbers=None, seed=0, **options):
    spec, weights = population
    numbers = np.arange(NETWORKS) if numbers is None else np.array(numbers)
    copy = COPIES[kind].model_validate(options)
    labels = copy.labels(seed, numbers)
    part = {name: tensor[: len(numbers)] for name, tensor in weights.items()}
    before = {name: tensor.clone() for name, tensor in part.items()}
    found = copy.apply(spec, part, labels, seed, numbers)
    assert all(torch.equal(before[name], part[name]) for name in part), "the networks themselves were changed"
    assert list(found) == list(weights)
    assert all(found[name].dtype == torch.float32 for name in found)
    return found, labels


def statistics(population):
    return [name for name, entry in population[0].tensors.items() if entry.kind == "statistic"]


# -- pruned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9])
def test_the_smallest_of_the_whole_network_are_zero(population, sparsity):
    found, labels = applied("pruned", population, sparsity=sparsity)
    matrices = [name for name, tensor in population[1].items() if tensor.ndim > 2]
    before = torch.cat([population[1][name].flatten(1) for name in matrices], 1)
    after = torch.cat([found[name].flatten(1) for name in matrices], 1)
    assert labels["sparsity"].tolist() == [sparsity] * NETWORKS
    expected = round(sparsity * before.shape[1])
    assert ((after == 0).sum(1) == expected).all()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[new != 0], old[new != 0])
        if expected:
            assert old[new == 0].abs().max() < old[new != 0].abs().min()
    for name in set(population[1]) - set(matrices):
        assert torch.equal(found[name], population[1][name]), name


def test_shares_in_decimals_are_exact():
    """0.29 * 100 is 28.999999999999996 in binary."""
    weights = {"w": torch.randn(1, 10, 10, generator=torch.Generator().manual_seed(0))}
    for percent in range(100):
        found = prune(weights, torch.tensor([percent / 100], dtype=torch.float64))["w"]
        assert (found == 0).sum() == percent


def test_the_smallest_of_each_tensor_are_zero(population):
    found, _ = applied("pruned", population, sparsity=0.4, scope="tensor")
    for name, tensor in population[1].items():
        if tensor.ndim > 2:
            assert ((found[name] == 0).flatten(1).sum(1) == round(0.4 * tensor[0].numel())).all()
        else:
            assert torch.equal(found[name], tensor)


def test_equal_weights_are_pruned_one_by_one():
    found = prune({"w": torch.ones(2, 5, 4)}, torch.tensor([0.25, 0.5]))["w"]
    assert (found == 0).flatten(1).sum(1).tolist() == [5, 10]


# -- quantised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantised_weights_have_so_few_values(population, bits):
    found, _ = applied("quantised", population, bits=bits)
    for name, tensor in population[1].items():
        if name in statistics(population):
            assert torch.equal(found[name], tensor), name
            continue
        for old, new in zip(tensor, found[name], strict=True):
            levels = 2 ** (bits - 1) - 1
            values = new.unique()
            assert len(values) <= 2 * levels + 1
            step = old.abs().max().double() / levels
            assert (old.double() - new.double()).abs().max() <= step / 2 * (1 + 1e-5)
            multiples = new.double() / step
            torch.testing.assert_close(multiples, multiples.round(), atol=1e-4, rtol=0)
            torch.testing.assert_close(new.abs().max(), old.abs().max())


def test_tensors_of_zeros_stay_so():
    assert torch.equal(quantise({"w": torch.zeros(2, 3)}, torch.tensor([2, 4]))["w"], torch.zeros(2, 3))


def test_many_bits_change_little():
    weights = {"w": torch.randn(2, 50, generator=torch.Generator().manual_seed(0))}
    found = quantise(weights, torch.tensor([16, 16]))["w"]
    assert 0 < (found - weights["w"]).abs().max() < 1e-4


# -- noised --------------------------------------------------------------------------------------------------


def test_noise_is_relative_to_each_tensors_spread():
    net = CNN((3, 6, 6), (30, 30), 10)
    weights = {
        name: torch.randn(2, *tensor.shape) * (place + 1)
        for place, (name, tensor) in enumerate(net.state_dict().items())
    }
    found, _ = applied("noised", (spec_of(net), weights), numbers=[0, 1], noise=0.3)
    for name, tensor in weights.items():
        for old, new in zip(tensor.double(), found[name].double(), strict=True):
            added, count = new - old, old.numel()
            expected = 0.3 * old.std(correction=0)
            assert added.std().item() == pytest.approx(expected.item(), rel=5 / np.sqrt(2 * count)), name
            assert abs(added.mean()) < 5 * expected / np.sqrt(count)


def test_noise_leaves_statistics_alone_and_reaches_everything_else(population):
    found, _ = applied("noised", population, noise=0.1)
    for name, tensor in population[1].items():
        same = (found[name] == tensor).double().mean()
        assert same == 1 if name in statistics(population) else same < 0.02, name


def test_noise_depends_on_a_networks_number_and_the_seed_alone(population):
    together, _ = applied("noised", population)
    spec, weights = population
    backwards = {name: tensor.flip(0) for name, tensor in weights.items()}
    found, _ = applied("noised", (spec, backwards), numbers=[3, 2, 1, 0])
    for name, tensor in together.items():
        assert torch.equal(found[name].flip(0), tensor)
    alone, _ = applied("noised", population, numbers=[0])
    name = next(name for name, tensor in weights.items() if tensor.ndim > 2)
    assert torch.equal(alone[name][0], together[name][0])
    for other in (applied("noised", population, seed=1), applied("noised", population, numbers=[8, 1, 2, 3])):
        assert (other[0][name][0] != together[name][0]).any()
    equal = {name: tensor[:1].expand_as(tensor) for name, tensor in weights.items()}
    found, _ = applied("noised", (spec, equal))
    assert (found[name][0] != found[name][1]).all(), "two networks have the same noise"


def test_weights_of_diverged_networks_stay_finite(population):
    """Squares of them overflow."""
    spec, weights = population
    large = {name: tensor * 1e30 for name, tensor in weights.items()}
    for kind in COPIES:
        found, _ = applied(kind, (spec, large))
        assert all(tensor.isfinite().all() for tensor in found.values()), kind


# -- labels --------------------------------------------------------------------------------------------------


DRAWN = {
    "pruned": ("sparsity", {"choice": [0.1, 0.5, 0.9]}),
    "quantised": ("bits", {"integer": [2, 8]}),
    "noised": ("noise", {"log_uniform": [0.01, 0.5]}),
}


@pytest.mark.parametrize("kind", COPIES)
def test_each_network_has_what_is_drawn_for_it(population, kind):
    field, distribution = DRAWN[kind]
    spec, weights = population
    together, labels = applied(kind, population, **{field: distribution})
    assert len(set(labels[field].tolist())) > 1
    for at in range(NETWORKS):
        one = {name: tensor[at : at + 1] for name, tensor in weights.items()}
        constant, _ = applied(kind, (spec, one), numbers=[at], **{field: labels[field][at].item()})
        for name in weights:
            torch.testing.assert_close(constant[name][0], together[name][at], rtol=1e-6, atol=1e-7)
    numbers = np.array([2, 0])
    copy = COPIES[kind].model_validate({field: distribution})
    np.testing.assert_array_equal(copy.labels(0, numbers)[field], labels[field][numbers])
    assert set(labels) == {field}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("pruned", "sparsity", 1.0),
        ("pruned", "sparsity", {"uniform": [-0.1, 0.5]}),
        ("quantised", "bits", 1),
        ("quantised", "bits", {"integer": [2, 17]}),
        ("noised", "noise", {"uniform": [0.5, 1.0]}),
    ],
)
def test_values_out_of_range_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=field):
        COPIES[kind].model_validate({field: value})


def test_defaults_are_constants():
    for kind, (field, _) in DRAWN.items():
        assert isinstance(getattr(COPIES[kind](), field), Distribution)
        assert getattr(COPIES[kind](), field).is_constant
