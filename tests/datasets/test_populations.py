"""Several populations as one data set: batches of one each, spread evenly, in another order in each epoch."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from weightspace.datasets import (
    Permutation,
    PopulationBatches,
    PopulationsDataset,
    ZooDataset,
    choose_population,
    open_populations,
    population_names,
)
from weightspace.errors import ConfigError, TaskError, ZooError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo

SHAPES = {"a": (8, 8), "b": (5, 7, 6), "c": (4,)}
NETWORKS = {"a": 40, "b": 20, "c": 10}


@pytest.fixture(scope="module")
def zoo():
    made = {
        name: tiny_zoo(networks=NETWORKS[name], hidden=hidden, views=1) for name, hidden in SHAPES.items()
    }
    return Zoo({name: zoo["inr"] for name, zoo in made.items()}, made["a"].sources)


@pytest.fixture
def dataset(zoo):
    return PopulationsDataset(open_populations(zoo, "all", "train", target="psnr"))


def test_populations_by_name(zoo):
    assert population_names(zoo, "all") == ("a", "b", "c")
    assert population_names(zoo, "c, a") == ("c", "a")
    assert population_names(zoo, "b") == ("b",)
    assert population_names(tiny_zoo(), None) == ("inr",)
    assert choose_population(tiny_zoo(), "all").rows == 40
    with pytest.raises(ConfigError, match="the zoo has several, name one of a, b, c"):
        population_names(zoo, None)
    with pytest.raises(ZooError, match="population: expected one of a, b, c, found 'd'"):
        population_names(zoo, "a,d")
    with pytest.raises(ConfigError, match="population: expected one of a, b, c, found 'a,b'"):
        ZooDataset(zoo, population="a,b")


def test_members_are_those_of_the_parts_one_after_the_other(zoo, dataset):
    single = [ZooDataset(zoo, "train", target="psnr", population=name) for name in zoo]
    assert len(dataset) == sum(map(len, single)) == 42
    assert torch.equal(dataset.targets, torch.cat([part.targets for part in single]))
    at = len(single[0]) + len(single[1])
    weights, targets, name = dataset[[at + 2, at]]
    expected = single[2].read([2, 0])
    assert name == "c"
    assert torch.equal(targets, expected[1])
    assert all(torch.equal(weights[key], tensor) for key, tensor in expected[0].items())
    weights, target, name = dataset[at - 1]
    assert (name, weights["layers.0.weight"].shape) == ("b", (5, 2))
    assert float(target) == float(single[1].targets[-1])
    for wrong in ([0, at], [], [len(dataset)], [-1]):
        with pytest.raises(IndexError, match="expected members of one population"):
            dataset.read(wrong)


def test_every_member_is_read_once_in_batches_of_one_population(dataset):
    order = PopulationBatches(dataset, 5, seed=3)
    loader = DataLoader(dataset, batch_size=None, sampler=order)
    seen, names = [], []
    for weights, targets, name in loader:
        assert 2 <= len(targets) <= 5
        assert weights["layers.0.weight"].shape[:2] == (len(targets), SHAPES[name][0])
        seen.append(targets)
        names.append(name)
    assert torch.equal(torch.cat(seen).sort().values, dataset.targets.sort().values)
    assert len(loader) == len(names) == 5 + 3 + 2
    assert Counter(names) == {"a": 5, "b": 3, "c": 2}


def test_the_order_is_keyed_by_seed_and_epoch(dataset):
    def batches(seed, epoch):
        order = PopulationBatches(dataset, 5, seed=seed)
        order.set_epoch(epoch)
        return list(order)

    assert batches(0, 0) == batches(0, 0)
    assert batches(0, 0) != batches(0, 1)
    assert batches(0, 0) != batches(1, 0)
    assert [part.epoch for part in dataset.parts.values()] == [0, 0, 0]
    dataset.augment = Permutation()
    before = dataset.read([0, 1])[0]["layers.1.weight"]
    dataset.epoch = 1
    assert not torch.equal(dataset.read([0, 1])[0]["layers.1.weight"], before)


def test_populations_of_one_size_take_turns(zoo):
    """In every stretch of three batches each of the three comes once; who comes first changes."""
    parts = {name: ZooDataset(zoo, None, population=name, where="network < 10") for name in zoo}
    dataset, first = PopulationsDataset(parts), set()
    for seed in range(10):
        names = [
            int(np.searchsorted(dataset.starts, batch[0], side="right"))
            for batch in PopulationBatches(dataset, 2, seed=seed)
        ]
        assert all(sorted(names[at : at + 3]) == [1, 2, 3] for at in range(0, 15, 3))
        first.add(names[0])
    assert len(first) > 1


def test_without_shuffling_one_population_follows_the_other(dataset):
    members = [member for batch in PopulationBatches(dataset, 5, shuffle=False) for member in batch]
    assert members == list(range(len(dataset)))


def test_a_single_network_is_left_out_of_training_only(zoo):
    parts = {
        "a": ZooDataset(zoo, None, population="a", where="network < 3"),
        "b": ZooDataset(zoo, None, population="b", where="network == 0"),
    }
    dataset = PopulationsDataset(parts)
    assert [sorted(batch) for batch in PopulationBatches(dataset, 2)] == [[0, 1, 2]]
    assert [m for batch in PopulationBatches(dataset, 8) for m in sorted(batch)] == [0, 1, 2]
    assert [m for batch in PopulationBatches(dataset, 8, shuffle=False) for m in batch] == [0, 1, 2, 3]


def test_populations_without_networks_in_the_split_are_passed_over(zoo):
    inr = zoo["c"]
    where = f"network in {np.flatnonzero(inr.split == 0).tolist()} and step > 0"
    assert list(open_populations(zoo, "all", "train")) == ["a", "b", "c"]
    found = open_populations(zoo, "all", "val", where=where)
    assert "c" not in found
    assert all(len(part) for part in found.values())
    with pytest.raises(
        ConfigError, match="where: 'network == 99' holds for no networks of split val in any of 3 populations"
    ):
        open_populations(zoo, "all", "val", where="network == 99")
    with pytest.raises(TaskError, match="there are no networks of split test in any of 2 populations"):
        open_populations(zoo, "a,b", "test", fractions=(0.5, 0.5, 0.0))
    with pytest.raises(ConfigError, match="expected at least one data set"):
        PopulationsDataset({})
