"""Data sets of several checkpoints per network: filters, splits that keep networks together, and trajectories."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from weightspace.datasets import (
    Compose,
    GaussianNoise,
    Normalisation,
    Permutation,
    ZooDataset,
    parse_augmentations,
)
from weightspace.errors import ConfigError, TaskError
from weightspace.nets import MLP, coordinate_grid, evaluate_batch
from weightspace.testing import tiny_zoo
from weightspace.zoo import SPLITS, Zoo

NETWORKS, CHECKPOINTS = 30, 4


def checkpoints(counts=None, copies=1, seed=0):
    """A population with so many checkpoints per network, in no order; each drifts from the one before."""
    inr = tiny_zoo(networks=NETWORKS, views=1)["inr"]
    counts = np.full(NETWORKS, CHECKPOINTS) if counts is None else np.asarray(counts)
    network = np.repeat(np.arange(NETWORKS), counts)
    place = np.arange(len(network)) - np.repeat(np.cumsum(counts) - counts, counts)
    generator = np.random.default_rng(seed)
    drift = 0.01 * place[:, None].astype(np.float32)
    order = generator.permutation(len(network))
    source = np.arange(NETWORKS) // copies
    return replace(
        inr,
        weights=(inr.weights[network] + drift)[order],
        network=network[order].astype(np.int64),
        step=(10 * place[order]).astype(np.int64),
        source=source.astype(np.int64),
        metrics={
            "epoch": place[order].astype(np.float32),
            "accuracy": generator.uniform(0, 1, len(network)).astype(np.float32),
        },
        hyperparameters={"rate": np.linspace(0.1, 1.0, NETWORKS, dtype=np.float32)},
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return Zoo({"inr": checkpoints()}).save(tmp_path_factory.mktemp("zoo") / "zoo.h5")


def networks_of(dataset):
    return set(dataset.population.network[dataset.rows].ravel().tolist())


# -- filters -----------------------------------------------------------------------------------------------


def test_a_filter_leaves_the_rows_of_the_split_for_which_it_holds(path):
    where = "epoch == last and accuracy > 0.2"
    parts = [ZooDataset(path, split, target="accuracy", where=where) for split in SPLITS]
    population = parts[0].population
    expected = [
        row
        for row in range(population.rows)
        if population.metrics["epoch"][row] == CHECKPOINTS - 1 and population.metrics["accuracy"][row] > 0.2
    ]
    assert sorted(row for part in parts for row in part.rows.tolist()) == expected
    assert 0 < len(expected) < NETWORKS
    for at, part in enumerate(parts):
        assert bool((part.targets > 0.2).all())
        assert set(population.split[population.network[part.rows]].tolist()) == {at}
    assert parts[0].skipped == 0


def test_a_filter_that_leaves_nothing_says_of_how_much(path):
    with pytest.raises(ConfigError, match=r"where: 'accuracy > 2' holds for none of 120 rows of 30 networks"):
        ZooDataset(path, where="accuracy > 2")
    population = Zoo.open(path)["inr"]
    network = int(population.network[population.rows_of("test")[0]])
    message = (
        f"where: 'network == {network} and epoch > 0' holds for 3 rows of 120, but for none of "
        f"{len(population.rows_of('train'))} rows of split train"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        ZooDataset(path, "train", where=f"network == {network} and epoch > 0")
    with pytest.raises(ConfigError, match="where: expected one of accuracy, epoch, rate, label, step, "):
        ZooDataset(path, where="loss > 2")


def test_a_bad_row_that_the_filter_leaves_out_is_no_problem(path):
    population = Zoo.open(path)["inr"]
    weights = np.array(population.weights)
    weights[population.metrics["epoch"] == 2] = np.nan
    zoo = Zoo({"inr": replace(population, weights=weights)})
    assert len(ZooDataset(zoo, None, where="epoch != 2", skip_bad=False)) == 90
    with pytest.raises(TaskError, match="NaN or infinite weights in 30 rows"):
        ZooDataset(zoo, None, skip_bad=False)


# -- splits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, *({"fractions": (0.5, 0.2, 0.3), "split_seed": seed} for seed in range(20))]
)
@pytest.mark.parametrize("copies", [1, 3])
def test_no_network_and_no_copy_has_rows_on_both_sides(options, copies):
    population = checkpoints(copies=copies)
    if copies > 1 and not options:
        population = replace(
            population, split=np.repeat(np.arange(NETWORKS // copies) % 3, copies).astype(np.uint8)
        )
    zoo = Zoo({"inr": population})
    parts = [ZooDataset(zoo, split, **options) for split in SPLITS]
    assert sum(len(part) for part in parts) == NETWORKS * CHECKPOINTS
    for at, part in enumerate(parts):
        assert len(part) == CHECKPOINTS * len(networks_of(part)) > 0, "all checkpoints of a network, or none"
        for other in parts[at + 1 :]:
            assert not networks_of(part) & networks_of(other)
            assert not {int(zoo["inr"].source[n]) for n in networks_of(part)} & {
                int(zoo["inr"].source[n]) for n in networks_of(other)
            }


def test_splits_that_are_drawn_anew_differ_with_the_seed():
    zoo = Zoo({"inr": checkpoints()})
    found = [
        frozenset(networks_of(ZooDataset(zoo, "test", fractions=(0.5, 0.2, 0.3), split_seed=seed)))
        for seed in range(5)
    ]
    assert len(set(found)) == 5
    assert {len(networks) for networks in found} == {9}


# -- trajectories ------------------------------------------------------------------------------------------


def test_a_member_is_the_trajectory_of_a_network(path):
    dataset = ZooDataset(path, None, target="accuracy", sequences=True)
    population = dataset.population
    assert len(dataset) == NETWORKS
    assert dataset.lengths.tolist() == [CHECKPOINTS] * NETWORKS
    for at in (0, 7, NETWORKS - 1):
        weights, targets = dataset[at]
        rows = [row for row in range(population.rows) if population.network[row] == at]
        rows.sort(key=lambda row: population.step[row])
        assert torch.equal(dataset.spec.flatten(weights), population.read(rows))
        assert targets.tolist() == population.metrics["accuracy"][rows].tolist()
        assert dataset.rows[at].tolist() == rows
    weights, targets = next(iter(DataLoader(dataset, batch_size=8, shuffle=True)))
    assert weights["layers.0.weight"].shape == (8, CHECKPOINTS, 8, 2)
    assert targets.shape == (8, CHECKPOINTS)
    drift = weights["layers.0.weight"][:, 1:] - weights["layers.0.weight"][:, :-1]
    torch.testing.assert_close(drift, torch.full_like(drift, 0.01), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["label", "rate"])
def test_labels_and_hyperparameters_are_one_per_trajectory(path, target):
    dataset = ZooDataset(path, "test", target=target, sequences=True)
    networks = dataset.population.network[dataset.rows[:, 0]]
    table = dataset.population.labels if target == "label" else dataset.population.hyperparameters
    assert dataset.targets.tolist() == table[target][networks].tolist()
    assert dataset.read([1, 0])[1].tolist() == dataset.targets[[1, 0]].tolist()


def test_short_trajectories_repeat_their_last_row():
    counts = np.tile([4, 1, 3], NETWORKS // 3)
    dataset = ZooDataset(Zoo({"inr": checkpoints(counts)}), None, target=None, sequences=True)
    assert dataset.lengths.tolist() == counts.tolist()
    weights, rows = dataset.read(range(NETWORKS))
    assert torch.equal(rows, torch.from_numpy(dataset.rows))
    flat = dataset.spec.flatten(weights)
    for at, count in enumerate(counts):
        assert dataset.population.step[dataset.rows[at]].tolist() == [
            10 * min(k, count - 1) for k in range(4)
        ]
        assert torch.equal(flat[at, count - 1 :], flat[at, count - 1].expand(4 - count + 1, -1))
    accuracy = ZooDataset(dataset.zoo, None, target="accuracy", sequences=True)
    assert accuracy.targets[1].tolist() == [float(accuracy.targets[1, 0])] * 4


def test_bad_and_filtered_rows_shorten_a_trajectory(path):
    population = Zoo.open(path)["inr"]
    weights = np.array(population.weights)
    bad = int(np.flatnonzero((population.network == 5) & (population.step == 10))[0])
    weights[bad] = np.inf
    zoo = Zoo({"inr": replace(population, weights=weights)})
    dataset = ZooDataset(zoo, None, sequences=True, where="network != 2 and not (network == 3 and epoch > 0)")
    assert dataset.skipped == 1
    networks = population.network[dataset.rows[:, 0]].tolist()
    assert networks == [n for n in range(NETWORKS) if n != 2]
    assert dict(zip(networks, dataset.lengths.tolist(), strict=True)) == {
        **dict.fromkeys(networks, 4),
        5: 3,
        3: 1,
    }
    assert population.step[dataset.rows[networks.index(5)]].tolist() == [0, 20, 30, 30]


def test_trajectories_stay_in_memory_and_normalise_over_all_rows():
    counts = np.tile([4, 1, 3], NETWORKS // 3)
    zoo = Zoo({"inr": checkpoints(counts)})
    dataset = ZooDataset(zoo, None, sequences=True)
    read = dataset.read([3, 1])
    resident = dataset.to("cpu").read([3, 1])
    assert all(torch.equal(read[0][name], resident[0][name]) for name in read[0])
    rows, plain = Normalisation.fit(dataset, "entry"), Normalisation.fit(ZooDataset(zoo, None), "entry")
    assert torch.equal(rows.mean, plain.mean)
    assert torch.equal(rows.std, plain.std)
    normalised = rows(read[0])["layers.1.weight"]
    assert normalised.shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    "names", ["permutation", "permutation, sign", "sign, noise(0.0), permutation", "phase, permutation"]
)
def test_a_symmetry_moves_all_checkpoints_alike(path, names):
    """Each computes what it did, and they still drift in a straight line, as one network does."""
    augment = parse_augmentations(names)
    plain, moved = (
        ZooDataset(path, None, sequences=True, augment=augment).read(range(NETWORKS))[0]
        for augment in (None, augment)
    )
    net, grid = MLP((2, 8, 8, 1), output_offset=0.5), coordinate_grid((4, 4))
    rendered = [
        evaluate_batch(net, {name: w.flatten(0, 1) for name, w in weights.items()}, grid)
        for weights in (plain, moved)
    ]
    torch.testing.assert_close(*rendered, rtol=1e-3, atol=1e-4)
    drift = moved["layers.1.weight"].diff(dim=1)
    torch.testing.assert_close(drift, drift[:, :1].expand_as(drift), rtol=0, atol=1e-6)
    assert not torch.equal(moved["layers.1.weight"], plain["layers.1.weight"])
    single = ZooDataset(path, None, augment=Permutation()).read([0, 1])[0]
    assert single["layers.1.weight"].shape == (2, 8, 8)


def test_a_rotation_is_the_same_for_all_checkpoints_and_mixed_trajectories_still_drift_alike(path):
    augment = parse_augmentations("rotation(90), mixup(aligned)")
    dataset = ZooDataset(path, None, sequences=True, augment=augment)
    weights, shares = dataset.read(range(NETWORKS))
    assert weights["layers.0.weight"].shape == (NETWORKS, CHECKPOINTS, 8, 2)
    assert shares.shape == (NETWORKS, dataset.classes)
    for w in weights.values():
        drift = w.diff(dim=1)
        torch.testing.assert_close(drift, drift[:, :1].expand_as(drift), rtol=0, atol=1e-6)


def test_metrics_of_trajectories_are_mixed_at_every_checkpoint(path):
    augment = parse_augmentations("mixup(direct)")
    plain, mixed = (
        ZooDataset(path, None, target="accuracy", sequences=True, augment=one).read(range(NETWORKS))
        for one in (None, augment)
    )
    flat = [ZooDataset(path, None).spec.flatten(weights)[:, 0] for weights, _ in (plain, mixed)]
    # the same affine combination of the same two networks gives weights and metrics
    both = [torch.cat(parts, -1).double() for parts in ((flat[0], plain[1]), (flat[1], mixed[1]))]
    for own, found in zip(*both, strict=True):
        directions = both[0] - own
        share = (directions * (found - own)).sum(-1) / directions.square().sum(-1).clamp_min(1e-12)
        error = (own + share[:, None] * directions - found).norm(dim=-1)
        assert error.min() < 1e-5


def test_noise_is_drawn_for_every_checkpoint(path):
    noisy = ZooDataset(path, None, sequences=True, augment=Compose([GaussianNoise(0.5)])).read([0, 1])[0]
    drift = noisy["layers.1.weight"].diff(dim=1)
    assert float((drift - drift[:, :1]).abs().max()) > 0.01
