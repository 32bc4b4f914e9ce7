"""Views: another network of the same item, never the network itself, and only within the split."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from weightspace.datasets import Compose, MixUp, Permutation, Views, ZooDataset
from weightspace.datasets._siblings import Siblings
from weightspace.errors import ConfigError
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture(scope="module")
def zoo():
    return tiny_zoo(networks=60, views=3)


def rows_read(dataset, indices):
    """The rows of the zoo that stand in a batch."""
    found = dataset.spec.flatten(dataset.read(indices)[0])
    stored = torch.as_tensor(np.array(dataset.population.weights))
    return torch.cdist(found.double(), stored.double()).argmin(1).numpy()


def test_the_other_view_is_of_the_same_item_and_never_the_same(zoo):
    dataset = ZooDataset(zoo, "train", augment=Views(1.0))
    source, seen = dataset.population.source, {}
    for epoch in range(12):
        dataset.epoch = epoch
        found = rows_read(dataset, range(len(dataset)))
        assert (found != dataset.rows).all()
        assert (source[found] == source[dataset.rows]).all()
        for row, other in zip(dataset.rows.tolist(), found.tolist(), strict=True):
            seen.setdefault(row, set()).add(other)
    assert {len(others) for others in seen.values()} == {2}, "each of the two others, sooner or later"


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_networks_are_replaced_as_often_as_asked(zoo, p):
    dataset = ZooDataset(zoo, None, augment=Views(p))
    replaced = []
    for epoch in range(30):
        dataset.epoch = epoch
        replaced.append(rows_read(dataset, range(60)) != dataset.rows)
    assert np.mean(replaced) == pytest.approx(p, abs=0.04)


def test_a_network_without_another_view_stays(zoo):
    inr = zoo["inr"]
    source = inr.source.copy()
    source[10:] = np.arange(100, 150)
    lonely = Zoo({"inr": replace(inr, source=source)})
    dataset = ZooDataset(lonely, None, augment=Views(1.0))
    found = rows_read(dataset, range(60))
    assert (found[10:] == np.arange(10, 60)).all()
    assert (found[:9] != np.arange(9)).all()
    assert found[9] == 9, "the others of its item are now of items of their own"


def test_views_of_other_splits_are_not_used(zoo):
    inr = zoo["inr"]
    split = np.where(inr.view == 2, 2, 0).astype(np.uint8)
    mixed = Zoo({"inr": replace(inr, split=split, source=inr.source)})
    dataset = ZooDataset(mixed, "train", augment=Views(1.0))
    for epoch in range(5):
        dataset.epoch = epoch
        assert set(rows_read(dataset, range(len(dataset)))) <= set(dataset.rows)


def test_trajectories_are_replaced_whole(zoo):
    inr = zoo["inr"]
    twice = replace(
        inr,
        weights=np.concatenate([inr.weights, inr.weights + 1]),
        network=np.tile(inr.network, 2),
        step=np.repeat([1, 2], 60).astype(np.int64),
        metrics={},
    )
    dataset = ZooDataset(Zoo({"inr": twice}), None, sequences=True, augment=Views(1.0))
    weights, _ = dataset.read(range(60))
    flat = dataset.spec.flatten(weights)
    torch.testing.assert_close(flat[:, 1], flat[:, 0] + 1, rtol=0, atol=1e-6)
    plain = ZooDataset(Zoo({"inr": twice}), None, sequences=True)
    assert not (flat == plain.spec.flatten(plain.read(range(60))[0])).all(-1).any()


def test_views_come_before_what_moves_them(zoo):
    """Reading another network and permuting it is what a data set of the others gives."""
    dataset = ZooDataset(zoo, None, augment=Compose([Views(1.0), Permutation()]))
    moved, _ = dataset.read(range(60))
    plain = ZooDataset(zoo, None, augment=Views(1.0)).read(range(60))[0]
    for name in ("layers.0.bias", "layers.1.bias"):
        assert torch.equal(moved[name].sort(1).values, plain[name].sort(1).values)
    assert not torch.equal(moved["layers.0.bias"], plain["layers.0.bias"])


@pytest.mark.parametrize("before", [MixUp("direct"), Permutation(), Views()])
def test_views_after_others_are_refused(zoo, before):
    """What came before would be lost, and after MixUp targets would be mixed and weights not."""
    dataset = ZooDataset(zoo, None)
    with pytest.raises(
        ConfigError, match=f"views: expected it to come first, .* found {before.name} before it"
    ):
        dataset.augment = Compose([before, Views()])


def test_hyperparameters_that_differ_between_views_are_refused(zoo):
    inr = zoo["inr"]
    rates = {"rate": np.arange(60) / 60, "decay": np.asarray(inr.source) / 60}
    tuned = Zoo({"inr": replace(inr, hyperparameters=rates)})
    with pytest.raises(ConfigError, match="views: expected a zoo with several views of some items"):
        ZooDataset(tuned, None, target="rate", augment=Views())
    dataset = ZooDataset(tuned, None, target="decay", augment=Views(1.0))
    assert (rows_read(dataset, range(60)) != dataset.rows).all()


def test_zoos_without_views_and_targets_that_differ_between_them_are_refused(zoo):
    with pytest.raises(ConfigError, match="views: expected a zoo with several views of some items, found"):
        ZooDataset(tiny_zoo(networks=10, views=1), None, augment=Views())
    with pytest.raises(ConfigError, match="views: expected a zoo with several views of some items, found"):
        ZooDataset(zoo, None, target="psnr", augment=Views())


def test_another_checkpoint_of_the_same_network_is_no_other_view():
    """Items 0 and 1 have two networks each of three checkpoints, item 2 has one."""
    items = np.repeat([0, 0, 1, 1, 2], 3)
    networks = np.repeat(np.arange(5), 3)
    order = np.random.default_rng(0).permutation(15)
    siblings = Siblings.among(items[order], networks[order])
    for uniform in np.linspace(0, 0.999, 13):
        other = siblings.other(np.arange(15), np.full(15, uniform))
        assert (items[order][other] == items[order]).all()
        alone = items[order] == 2
        assert (other[alone] == np.flatnonzero(alone)).all()
        assert (networks[order][other[~alone]] != networks[order][~alone]).all()
    assert Siblings.among(np.repeat(np.arange(5), 3), networks) is None
