"""Symmetries: the function stays, networks move independently, and values have the stated distributions."""

import math

import pytest
import torch

from weightspace.datasets.augment import (
    Batch,
    Compose,
    Permutation,
    PhaseShift,
    PositiveScaling,
    SignFlip,
)
from weightspace.errors import ConfigError
from weightspace.nets import CNN, MLP, RNN, coordinate_grid, evaluate_batch
from weightspace.spec import WeightSpec
from weightspace.testing import mixed_spec, random_weights, tiny_zoo
from weightspace.zoo import spec_of

GRID = coordinate_grid((5, 5)).double()


def image():
    return torch.randn(4, 1, 9, 9, generator=torch.Generator().manual_seed(0)).double()


NETS = {
    "siren": (lambda: MLP((2, 9, 7, 3), w0=4.0, output_offset=0.5), GRID),
    "relu": (lambda: MLP((2, 9, 7, 3), activation="relu"), GRID),
    "tanh": (lambda: MLP((2, 9, 7, 3), activation="tanh"), GRID),
    "gaussian": (lambda: MLP((2, 9, 7, 3), activation="gaussian"), GRID),
    "cnn": (lambda: CNN((1, 9, 9), [4, 5], 3), image()),
    "lstm": (lambda: RNN(7, 6, 3, cell="lstm", embedding=5, length=4), torch.arange(12).view(3, 4) % 7),
}
KINDS = {
    "permutation": Permutation(),
    "sign": SignFlip(0.4),
    "positive": PositiveScaling(3.0),
    "phase": PhaseShift(3),
}


def batch_of(spec, count=6, dtype=torch.float64):
    return Batch(spec, random_weights(spec, (count,), dtype=dtype))


def changed(before, after):
    """Share of parameters that are not what they were."""
    spec = before.spec
    return (spec.flatten(before.weights) != spec.flatten(after.weights)).float().mean().item()


@pytest.mark.parametrize("kind", NETS)
def test_every_symmetry_that_a_network_has_keeps_its_function(kind):
    build, inputs = NETS[kind]
    net = build()
    batch = batch_of(spec_of(net))
    net = net.double()
    before = evaluate_batch(net, batch.weights, inputs)
    has = [KINDS[name] for name in batch.spec.symmetries]
    assert has
    for augmentation in (*has, Compose(has)):
        moved = augmentation(batch, seed=1)
        torch.testing.assert_close(evaluate_batch(net, moved.weights, inputs), before, rtol=1e-9, atol=1e-9)
        assert changed(batch, moved) > 0.1
    for name in KINDS.keys() - set(batch.spec.symmetries):
        with pytest.raises(
            ConfigError, match=f"{name}: expected a weight space with the symmetry {name}, found "
        ):
            KINDS[name](batch)


def test_a_space_without_symmetries_is_refused():
    batch = batch_of(WeightSpec.mlp([3, 2]))
    with pytest.raises(
        ConfigError, match="permutation: expected a weight space with groups of units, found none"
    ):
        Permutation()(batch)
    with pytest.raises(ConfigError, match="sign: expected a weight space with the symmetry sign, found none"):
        SignFlip()(batch)
    relu = batch_of(WeightSpec.mlp([3, 4, 2]))
    with pytest.raises(ConfigError, match="the symmetry sign, found permutation, positive"):
        SignFlip()(relu)


def test_augmented_networks_of_a_zoo_render_the_same_signals():
    inr = tiny_zoo(networks=10)["inr"]
    net, grid = MLP((2, 8, 8, 1), output_offset=0.5), coordinate_grid((6, 6))
    batch = Batch(inr.spec, inr.weights_of(slice(None)))
    moved = Compose([Permutation(), SignFlip(), PhaseShift()])(batch)
    before, after = (evaluate_batch(net, found.weights, grid) for found in (batch, moved))
    assert (after - before).abs().max() < 1e-4
    assert before.std() > 0.05
    assert changed(batch, moved) > 0.8


def test_networks_of_a_batch_are_moved_independently():
    spec = WeightSpec.mlp([2, 8, 1], activation="tanh")
    same = {name: tensor.expand(50, *tensor.shape) for name, tensor in random_weights(spec).items()}
    moved = spec.flatten(Permutation()(Batch(spec, same)).weights)
    assert len({tuple(row.tolist()) for row in moved}) > 45
    flipped = SignFlip()(Batch(spec, same)).weights["layers.0.bias"] / same["layers.0.bias"]
    assert set(flipped.flatten().tolist()) == {-1.0, 1.0}
    assert len({tuple(row.tolist()) for row in flipped}) > 40


def test_nested_units_are_permuted_within_their_own_outer_unit():
    """The same rows, seen as (heads, features), in another order of heads and of the features in each."""
    spec = mixed_spec()
    batch = batch_of(spec, 200)
    moved = Permutation()(batch).weights["query"].view(200, 3, 2, 4).sum(-1)
    before = batch.weights["query"].view(200, 3, 2, 4).sum(-1)
    pairs = [{frozenset(round(v, 9) for v in head.tolist()) for head in network} for network in before]
    found = [{frozenset(round(v, 9) for v in head.tolist()) for head in network} for network in moved]
    assert pairs == found
    assert (moved != before).any(-1).float().mean() > 0.7


def test_all_permutations_are_equally_likely():
    spec = WeightSpec.mlp([1, 3, 1], activation="tanh")
    count = 6000
    weights = {name: w.expand(count, *w.shape) for name, w in random_weights(spec).items()}
    bias = Permutation()(Batch(spec, weights)).weights["layers.0.bias"]
    _, found = bias.unique(dim=0, return_counts=True)
    assert len(found) == 6
    assert (found - count / 6).abs().max() < 5 * math.sqrt(count / 6)


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_signs_flip_as_often_as_asked(p):
    batch = batch_of(WeightSpec.mlp([2, 8, 1], activation="sine", w0=30.0), 4000)
    signs = SignFlip(p)(batch).weights["layers.0.bias"] / batch.weights["layers.0.bias"]
    assert (signs < 0).float().mean().item() == pytest.approx(p, abs=0.01)


def test_factors_are_log_uniform():
    batch = batch_of(WeightSpec.mlp([2, 8, 1]), 4000)
    moved = PositiveScaling(3.0)(batch).weights
    factor = moved["layers.0.bias"] / batch.weights["layers.0.bias"]
    logarithm = factor.log() / math.log(3.0)
    assert -1.0001 < logarithm.min() < -0.99
    assert 0.99 < logarithm.max() < 1.0001
    assert logarithm.mean().abs() < 0.02
    assert logarithm.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.01)
    leaving = moved["layers.1.weight"] / batch.weights["layers.1.weight"]
    torch.testing.assert_close(leaving[:, 0] * factor, torch.ones(4000, 8, dtype=torch.float64))


def test_phases_are_steps_of_pi_over_w0():
    batch = batch_of(WeightSpec.mlp([2, 8, 1], activation="sine", w0=5.0), 2000)
    moved = PhaseShift(4)(batch).weights
    steps = (moved["layers.0.bias"] - batch.weights["layers.0.bias"]) / (math.pi / 5.0)
    assert (steps - steps.round()).abs().max() < 1e-9
    values, counts = steps.round().unique(return_counts=True)
    assert values.tolist() == [*range(-4, 4)]
    assert (counts / 2000).tolist() == pytest.approx([1.0] * 8, abs=0.15)
    flipped = moved["layers.1.weight"][:, 0] / batch.weights["layers.1.weight"][:, 0]
    torch.testing.assert_close(flipped, 1.0 - 2.0 * (steps.round() % 2))


def test_targets_that_are_weights_move_along():
    spec = WeightSpec.mlp([2, 8, 6, 1], activation="sine", w0=3.0)
    weights = random_weights(spec, (5,))
    chain = Compose([Permutation(), SignFlip(), PhaseShift()])
    after = chain(Batch(spec, weights, {name: w.clone() for name, w in weights.items()}))
    assert torch.equal(spec.flatten(after.weights), spec.flatten(after.targets))
