"""Zoos as PyTorch data sets: the same batches however they are read, and splits that keep items together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from weightspace.datasets import (
    Compose,
    GaussianNoise,
    MixUp,
    Negation,
    Permutation,
    Rotation,
    SignFlip,
    Views,
    ZooDataset,
)
from weightspace.errors import ConfigError, TaskError, ZooError
from weightspace.nets import MLP, coordinate_grid, evaluate_batch
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_zoo(networks=40).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def assert_same_batches(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 1
    for (weights, targets), (expected_weights, expected_targets) in zip(found, expected, strict=True):
        assert torch.equal(targets, expected_targets)
        assert list(weights) == list(expected_weights)
        for name, tensor in expected_weights.items():
            assert torch.equal(weights[name], tensor)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "augment",
    [
        None,
        Compose([Permutation(), GaussianNoise(0.1)]),
        Compose([Views(), SignFlip(), Rotation(), MixUp("aligned")]),
    ],
)
def test_a_plain_loader_gives_the_same_batches(path, workers, augment):
    dataset = ZooDataset(path, augment=augment, seed=3)
    loader = DataLoader(dataset, batch_size=5, num_workers=workers)
    assert_same_batches(loader, dataset.batches(5))


def test_a_shuffled_loader_reads_every_network_once(path):
    dataset = ZooDataset(path, target="psnr")
    loader = DataLoader(dataset, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))
    seen = torch.cat([targets for _, targets in loader])
    assert not torch.equal(seen, dataset.targets)
    assert torch.equal(seen.sort().values, dataset.targets.sort().values)
    by_psnr = {float(t): dataset.read([at])[0] for at, t in enumerate(dataset.targets)}
    for weights, targets in loader:
        for at, target in enumerate(targets):
            assert torch.equal(weights["layers.1.weight"][at], by_psnr[float(target)]["layers.1.weight"][0])


def test_batches_shuffle_and_drop_the_rest(path):
    dataset = ZooDataset(path, target="psnr")
    assert len(dataset) == 24
    sizes = [len(targets) for _, targets in dataset.batches(10)]
    assert sizes == [10, 10, 4]
    whole = [targets for _, targets in dataset.batches(10, drop_last=True, shuffle=True, seed=1)]
    assert [len(targets) for targets in whole] == [10, 10]
    same, other = (
        torch.cat([targets for _, targets in dataset.batches(10, shuffle=True, seed=seed)]) for seed in (1, 2)
    )
    assert torch.equal(same[:20], torch.cat(whole))
    assert not torch.equal(same, other)
    assert torch.equal(other.sort().values, dataset.targets.sort().values)


def test_one_member_and_subsets(path):
    dataset = ZooDataset(path)
    weights, target = dataset[3]
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        name: tensor.shape for name, tensor in dataset.spec.tensors.items()
    }
    row = dataset.rows[3]
    assert torch.equal(dataset.spec.flatten(weights), dataset.population.read(int(row)))
    assert int(target) == dataset.population.labels["label"][dataset.population.network[row]]
    subset = DataLoader(Subset(dataset, [3, 4, 7, 1]), batch_size=2)
    assert_same_batches(subset, [dataset.read([3, 4]), dataset.read([7, 1])])
    with pytest.raises(IndexError):
        dataset[24]


def test_splits_are_disjoint_by_item_and_cover_the_zoo(path):
    population = Zoo.open(path)["inr"]
    splits = [ZooDataset(path, split) for split in ("train", "val", "test")]
    rows = np.concatenate([dataset.rows for dataset in splits])
    assert sorted(rows.tolist()) == list(range(40))
    assert [len(dataset) for dataset in splits] == [24, 8, 8]
    items = [set(population.source[population.network[d.rows]].tolist()) for d in splits]
    assert sum(map(len, items)) == len(set.union(*items)) == 20
    assert len(ZooDataset(path, None)) == 40


def test_fractions_draw_the_splits_anew(path):
    population = Zoo.open(path)["inr"]

    def rows(split, seed=0, fractions=(0.5, 0.25, 0.25)):
        return ZooDataset(path, split, fractions=fractions, split_seed=seed).rows

    found = [rows(split) for split in ("train", "val", "test")]
    assert [len(r) for r in found] == [20, 10, 10]
    assert sorted(np.concatenate(found).tolist()) == list(range(40))
    items = [set(population.source[r].tolist()) for r in found]
    assert sum(map(len, items)) == 20
    assert rows("train").tolist() == found[0].tolist()
    assert rows("train", seed=1).tolist() != found[0].tolist()
    assert len(ZooDataset(path, None, fractions=(0.5, 0.25, 0.25))) == 40
    with pytest.raises(ConfigError, match="expected three shares that sum to 1"):
        rows("train", fractions=(0.5, 0.5, 0.5))
    with pytest.raises(TaskError, match="no networks with finite weights in split 'val'"):
        rows("val", fractions=(0.5, 0.0, 0.5))


def test_labels_are_per_network_and_metrics_per_row():
    """Two checkpoints per network: the label is repeated, the metric is not."""
    inr = tiny_zoo(networks=6)["inr"]
    twice = replace(
        inr,
        weights=np.repeat(inr.weights, 2, axis=0),
        network=np.repeat(inr.network, 2),
        step=np.tile(np.array([1, 2]), 6),
        metrics={"psnr": np.arange(12, dtype=np.float32)},
    )
    zoo = Zoo({"inr": twice})
    assert ZooDataset(zoo, None).targets.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert ZooDataset(zoo, None, target="psnr").targets.tolist() == list(range(12))
    train = ZooDataset(zoo, "train", target="psnr")
    assert train.targets.tolist() == [float(row) for row in train.rows]
    assert set(twice.network[train.rows]) == set(np.flatnonzero(inr.split == 0))


def test_what_the_zoo_lacks_is_named(path):
    with pytest.raises(TaskError, match=r"no label or metric 'loss'; it has labels label and metrics psnr"):
        ZooDataset(path, target="loss")
    with pytest.raises(ConfigError, match="split: expected one of train, val, test, found 'dev'"):
        ZooDataset(path, "dev")
    with pytest.raises(ConfigError, match="split: expected one of train, val, test, found 'dev'"):
        ZooDataset(path, "dev", fractions=(0.5, 0.25, 0.25))
    with pytest.raises(ZooError, match="population: expected one of inr, found 'cnn'"):
        ZooDataset(path, population="cnn")
    inr = Zoo.open(path)["inr"]
    with pytest.raises(ConfigError, match="population: the zoo has several, name one of a, b"):
        ZooDataset(Zoo({"a": inr, "b": inr}))
    assert len(ZooDataset(Zoo({"a": inr, "b": inr}), population="b")) == 24
    with pytest.raises(TaskError, match="it has labels none and metrics none"):
        ZooDataset(Zoo({"a": replace(inr, labels={}, metrics={})}))


def test_augmentations_depend_on_seed_epoch_and_rows_alone(path):
    def read(rows, seed=0, epoch=0):
        dataset = ZooDataset(path, augment=GaussianNoise(0.5), seed=seed)
        dataset.epoch = epoch
        return dataset.spec.flatten(dataset.read(rows)[0])

    first = read([4, 5, 6])
    assert torch.equal(first, read([4, 5, 6]))
    assert not torch.equal(first, read([4, 5, 6], epoch=1))
    assert not torch.equal(first, read([4, 5, 6], seed=1))
    plain = ZooDataset(path)
    noise = first - plain.spec.flatten(plain.read([4, 5, 6])[0])
    assert not torch.allclose(noise[0], noise[1])


def test_what_else_is_in_a_batch_changes_no_bits_of_a_network(path):
    """Neither neighbours nor the order, the number of networks, or reading one alone."""
    augment = Compose([Views(), Permutation(), Rotation(), GaussianNoise(0.5)])
    dataset = ZooDataset(path, augment=augment)
    whole = dataset.spec.flatten(dataset.read(range(24))[0])
    for rows in ([4, 5, 6], [6, 4], [23], [*range(23, -1, -1)]):
        assert torch.equal(dataset.spec.flatten(dataset.read(rows)[0]), whole[rows])
    assert torch.equal(dataset.spec.flatten(dataset[-1][0]), whole[-1])
    shuffled = DataLoader(Subset(dataset, [9, 3, 11]), batch_size=2)
    found = torch.cat([dataset.spec.flatten(weights) for weights, _ in shuffled])
    assert torch.equal(found, whole[[9, 3, 11]])


def test_a_network_has_the_same_numbers_in_every_subset_of_its_zoo(path):
    """They are keyed by the row of the zoo, not by the place in the split."""
    augment = GaussianNoise(0.5)
    train, every = ZooDataset(path, "train", augment=augment), ZooDataset(path, None, augment=augment)
    some = [2, 7, 19]
    one, other = train.read(some)[0], every.read(train.rows[some])[0]
    assert torch.equal(train.spec.flatten(one), every.spec.flatten(other))


def test_copies_are_augmented_independently(path):
    dataset = ZooDataset(path, augment=Compose([Permutation(), GaussianNoise(0.1)]))
    plain = dataset.read([4, 5, 6])
    dataset.copies = 3
    weights, targets = dataset.read([4, 5, 6])
    assert targets.tolist() == plain[1].tolist() * 3
    copies = dataset.spec.flatten(weights).unflatten(0, (3, 3))
    assert torch.equal(copies[0], dataset.spec.flatten(plain[0]))
    for one in range(3):
        for other in range(one):
            assert not (copies[one] == copies[other]).all(-1).any()
    dataset.augment = None
    same = dataset.spec.flatten(dataset.read([4, 5])[0])
    assert torch.equal(same[:2], same[2:4])


def test_class_numbers_are_mixed_as_shares_of_all_classes_of_the_zoo(path):
    dataset = ZooDataset(path, "val", augment=MixUp("direct"))
    assert dataset.classes == 3
    _, targets = dataset.read(range(8))
    assert targets.shape == (8, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert ZooDataset(path, target="psnr").classes is None
    mixed = ZooDataset(path, target="psnr", augment=MixUp("direct")).read(range(8))[1]
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, ZooDataset(path, target="psnr").read(range(8))[1])


def test_an_augmentation_that_does_not_suit_is_refused_when_it_is_set(path):
    dataset = ZooDataset(path, target=None, augment=Permutation())
    with pytest.raises(ConfigError, match="mixup: expected class numbers with a known number of classes"):
        dataset.augment = MixUp("direct")
    assert dataset.augment == Permutation()


@pytest.mark.parametrize("centred", [False, True])
def test_signals_are_negated_about_the_middle_of_what_the_zoo_stores(centred):
    """With the output offset of the architecture, which is no weight."""
    zoo = tiny_zoo(networks=10)
    if centred:
        source = zoo.sources["tiny"]
        zoo = Zoo(
            dict(zoo.populations),
            {"tiny": replace(source, items=source.items.astype(np.float32) / 127.5 - 1)},
        )
    net, grid = MLP((2, 8, 8, 1), output_offset=0.5), coordinate_grid((5, 5))
    before, after = (
        evaluate_batch(net, ZooDataset(zoo, None, augment=augment).read(range(10))[0], grid)
        for augment in (None, Negation(1.0))
    )
    torch.testing.assert_close(after, (0.0 if centred else 1.0) - before, rtol=0, atol=1e-5)


def test_keeping_all_in_memory_changes_nothing(path):
    lazy, resident = (ZooDataset(path, augment=GaussianNoise(0.1)) for _ in range(2))
    assert resident.to("cpu") is resident
    assert_same_batches(resident.batches(7, shuffle=True), lazy.batches(7, shuffle=True))
    weights, _ = ZooDataset(path).to("cpu").read([0, 1])
    weights["layers.0.weight"].zero_()
    again, _ = resident.read([0, 1])
    assert again["layers.0.weight"].abs().sum() > 0


def test_reading_never_changes_the_zoo():
    zoo = tiny_zoo(networks=10)
    before = zoo["inr"].weights.copy()
    for weights, _ in ZooDataset(zoo, None).batches(4):
        for tensor in weights.values():
            tensor.zero_()
    np.testing.assert_array_equal(zoo["inr"].weights, before)


def test_a_diverged_network_is_skipped_and_counted():
    """One NaN would turn the noise of its whole batch, and the statistics of a BatchNorm, into NaN."""
    zoo = tiny_zoo(networks=20)
    inr = zoo["inr"]
    weights = inr.weights.copy()
    weights[7, 3] = np.nan
    dataset = ZooDataset(
        Zoo({"inr": replace(inr, weights=weights)}), None, augment=Compose([GaussianNoise(0.1)])
    )
    assert dataset.skipped == 1
    assert len(dataset) == 19
    assert 7 not in dataset.rows
    batch, _ = dataset.read(range(19))
    assert all(tensor.isfinite().all() for tensor in batch.values())


def test_indices_count_from_the_end_too_and_end_somewhere():
    dataset = ZooDataset(tiny_zoo(networks=20), None)
    assert torch.equal(dataset[-1][1], dataset[19][1])
    with pytest.raises(IndexError, match="dataset of 20"):
        dataset[20]


def test_the_order_depends_on_seed_and_epoch():
    dataset = ZooDataset(tiny_zoo(networks=20), None)
    first = dataset.order(0)
    assert torch.equal(first, dataset.order(0))
    assert not torch.equal(first, dataset.order(1))
    dataset.epoch = 1
    assert not torch.equal(first, dataset.order(0))
    assert sorted(dataset.order(0).tolist()) == list(range(20))
