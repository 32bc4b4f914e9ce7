"""MixUp: one lambda for weights and targets, the partner that was asked for, and never oneself."""

import re
from collections import Counter

import pytest
import torch

from weightspace.align import weight_matching
from weightspace.datasets.augment import Batch, Compose, MixUp, Permutation, SignFlip
from weightspace.errors import ConfigError
from weightspace.nets import MLP, ResNet, coordinate_grid, evaluate_batch
from weightspace.spec import Group, TensorSpec, WeightSpec
from weightspace.testing import mixed_spec, random_weights, tiny_zoo
from weightspace.zoo import spec_of

COUNT = 24
KINDS = ["direct", "permuted", "aligned"]
NETS = {
    "sine": MLP((2, 10, 8, 1), w0=3.0).double(),
    "tanh": MLP((2, 10, 8, 1), activation="tanh").double(),
    "relu": MLP((2, 10, 8, 1), activation="relu").double(),
}
GRID = coordinate_grid((5, 5)).double()


def batch_of(kind="sine", shape=(COUNT,), seed=0):
    """Every network is of a class of its own, so that mixed targets say who was mixed with whom, and how."""
    spec = spec_of(NETS[kind])
    weights = random_weights(spec, shape, seed, dtype=torch.float64)
    return Batch(spec, weights, torch.arange(shape[0]), classes=shape[0])


def told(targets):
    """Lambda and partner of each network, from mixed classes of one network each."""
    own = targets.diagonal()
    others = targets - torch.diag(own)
    assert ((others > 0).sum(1) <= 1).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
    return own.double(), others.argmax(1)


def partners(batch, mixed, share):
    """``(W' - lambda W) / (1 - lambda)``: what each network was mixed with."""
    own, after = (batch.spec.flatten(found.weights) for found in (batch, mixed))
    share = share.view(-1, *[1] * (own.ndim - 1))
    return (after - share * own) / (1.0 - share)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [None, 0.4, 5.0])
def test_weights_and_labels_share_one_lambda(beta, seed):
    batch = batch_of(seed=seed)
    mixed = MixUp("direct", beta=beta)(batch, seed=seed)
    share, partner = told(mixed.targets)
    assert 0 <= share.min() <= share.max() <= 1
    flat = batch.spec.flatten(batch.weights)
    expected = share[:, None] * flat + (1 - share[:, None]) * flat[partner]
    torch.testing.assert_close(batch.spec.flatten(mixed.weights), expected, rtol=1e-6, atol=1e-6)
    assert (share - share.mean()).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_is_mixed_with_somebody_else_and_all_in_one_circle(kind):
    for seed in range(20):
        batch = batch_of(shape=(5,), seed=seed)
        _, partner = told(MixUp(kind)(batch, seed=seed).targets)
        at, seen = 0, []
        for _ in range(5):
            at = int(partner[at])
            seen.append(at)
        assert sorted(seen) == list(range(5))


def test_partners_are_drawn_anew():
    batch = batch_of()
    found = {tuple(told(MixUp("direct")(batch, seed=seed).targets)[1].tolist()) for seed in range(10)}
    assert len(found) == 10


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_partner_computes_what_the_other_network_does(kind, net):
    batch = batch_of(net)
    mixed = MixUp(kind)(batch, seed=2)
    share, partner = told(mixed.targets)
    clear = share < 0.9
    other = batch.spec.unflatten(partners(batch, mixed, share)[clear])
    signals = evaluate_batch(NETS[net], batch.weights, GRID)[partner[clear]]
    # lambda is known from float32 shares
    torch.testing.assert_close(evaluate_batch(NETS[net], other, GRID), signals, rtol=1e-3, atol=1e-3)
    moved = (batch.spec.flatten(other) - batch.spec.flatten(batch.weights)[partner[clear]]).abs().amax(1)
    assert (moved < 1e-4).all() if kind == "direct" else (moved > 0.1).float().mean() > 0.9


@pytest.mark.parametrize("net", NETS)
def test_an_aligned_partner_is_the_match_and_closer_than_the_partner_itself(net):
    batch = batch_of(net)
    own = batch.spec.flatten(batch.weights)
    distance = {}
    for kind in KINDS:
        mixed = MixUp(kind)(batch, seed=2)
        share, partner = told(mixed.targets)
        distance[kind] = (partners(batch, mixed, share) - own).norm(dim=1)[share < 0.9]
    assert (distance["aligned"] < distance["direct"] + 1e-3).all()
    assert distance["aligned"].mean() < 0.95 * distance["direct"].mean()
    assert distance["permuted"].mean().item() == pytest.approx(distance["direct"].mean().item(), rel=0.1)
    kinds = [kind for kind in ("permutation", "sign", "phase") if kind in batch.spec.symmetries]
    others = {name: w[partner] for name, w in batch.weights.items()}
    _, report = weight_matching(
        batch.spec, batch.weights, others, symmetries=kinds, restarts=1, first="layers"
    )
    torch.testing.assert_close(distance["aligned"], report.distance_after[share < 0.9], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("net", ["sine", "tanh"])
def test_copies_in_another_order_and_with_other_signs_are_recovered(net):
    """Networks that are all one, up to symmetries: mixed when aligned, they still are it."""
    batch = batch_of(net, (200,))
    one = {name: w[:1].expand(200, *w.shape[1:]) for name, w in batch.weights.items()}
    moved = Compose([Permutation(), SignFlip()])(batch.with_(weights=one), seed=1)
    signal = evaluate_batch(NETS[net], one, GRID)
    error = {}
    for kind in KINDS:
        mixed = evaluate_batch(NETS[net], MixUp(kind)(moved, seed=1).weights, GRID)
        error[kind] = (mixed - signal).abs().amax((1, 2))
    assert (error["aligned"] < 1e-9).float().mean() > 0.95
    assert (error["direct"] < 1e-9).float().mean() < 0.05
    assert (error["permuted"] < 1e-9).float().mean() < 0.05


@pytest.mark.parametrize("targets", ["mix", "larger"])
def test_self_mixes_a_network_with_a_copy_in_another_order_and_keeps_its_label(targets):
    batch = batch_of()
    mixed = MixUp("self", targets=targets)(batch, seed=3)
    assert mixed.targets is batch.targets
    flat, after = batch.spec.flatten(batch.weights), batch.spec.flatten(mixed.weights)
    assert not torch.allclose(after, flat)
    # the last bias belongs to no unit: it is mixed with itself
    torch.testing.assert_close(mixed.weights["layers.2.bias"], batch.weights["layers.2.bias"])
    for name in ("layers.0.bias", "layers.1.weight"):
        before, total = (found.weights[name].flatten(1).sum(1) for found in (batch, mixed))
        torch.testing.assert_close(total, before)
    again = MixUp("self")(Batch(batch.spec, batch.weights), seed=3)
    assert torch.equal(batch.spec.flatten(again.weights), after)
    assert again.targets is None


@pytest.mark.parametrize("kind", KINDS)
def test_weights_only_keeps_the_label_of_the_larger_share(kind):
    batch = batch_of()
    share, partner = told(MixUp(kind)(batch, seed=2).targets)
    mixed = MixUp(kind, targets="larger")(batch, seed=2)
    assert torch.equal(mixed.targets, torch.where(share >= 0.5, batch.targets, partner))
    assert mixed.targets.dtype == torch.int64
    same = MixUp(kind)(batch, seed=2).weights
    assert torch.equal(batch.spec.flatten(mixed.weights), batch.spec.flatten(same))


@pytest.mark.parametrize("shape", [(COUNT,), (COUNT, 3)])
def test_numbers_to_regress_share_the_lambda_too(shape):
    batch = batch_of()
    share, partner = told(MixUp("direct")(batch, seed=2).targets)
    numbers = torch.randn(shape, dtype=torch.float64)
    mixed = MixUp("direct")(batch.with_(targets=numbers, classes=None), seed=2).targets
    share = share.view(-1, *[1] * (len(shape) - 1))
    torch.testing.assert_close(mixed, share * numbers + (1 - share) * numbers[partner], rtol=1e-6, atol=1e-6)
    larger = MixUp("direct", targets="larger")(batch.with_(targets=numbers, classes=None), seed=2).targets
    assert torch.equal(larger, torch.where(share >= 0.5, numbers, numbers[partner]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["mix", "larger"])
def test_targets_that_are_weights_are_moved_as_the_partner_is(kind, targets):
    """With each network as its own target, targets are what the mixed weights are, or what one of the two is."""
    batch = batch_of()
    share, partner = told(MixUp(kind)(batch, seed=2).targets)
    copies = {name: w.clone() for name, w in batch.weights.items()}
    mixed = MixUp(kind, targets=targets)(batch.with_(targets=copies, classes=None), seed=2)
    found = batch.spec.flatten(mixed.targets)
    if targets == "mix":
        assert torch.equal(found, batch.spec.flatten(mixed.weights))
    else:
        own = share >= 0.5
        assert torch.equal(found[own], batch.spec.flatten(batch.weights)[own])
        other = partners(batch, mixed, share)
        torch.testing.assert_close(found[~own], other[~own], rtol=1e-5, atol=1e-5)
        signals = evaluate_batch(NETS["sine"], batch.weights, GRID)
        torch.testing.assert_close(
            evaluate_batch(NETS["sine"], mixed.targets, GRID)[~own],
            signals[partner][~own],
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("beta", [None, 0.4, 4.0])
def test_lambda_has_the_moments_of_its_distribution(beta):
    spec = WeightSpec.mlp([1, 1, 1])
    weights = random_weights(spec, (8000,))
    numbers = torch.arange(2.0).repeat(4000)
    share, known = [], []
    for seed in range(4):
        mixed = MixUp("direct", beta=beta)(Batch(spec, weights, numbers), seed=seed).targets
        # whoever was mixed with one of the other kind tells lambda; the others stay 0 or 1
        between = (mixed != 0) & (mixed != 1)
        share.append(torch.where(numbers == 1, mixed, 1 - mixed)[between])
        known.append(between.float().mean())
    share = torch.cat(share).double()
    assert torch.stack(known).mean().item() == pytest.approx(0.5, abs=0.02)
    shape = beta or 1.0
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * shape + 1)), rel=0.04)


@pytest.mark.parametrize("kind", [*KINDS, "self"])
def test_trajectories_are_mixed_as_one(kind):
    """All checkpoints with one lambda and one partner, whose checkpoints are moved alike."""
    batch = batch_of(shape=(COUNT, 3))
    last = batch.with_(weights={name: w[:, -1] for name, w in batch.weights.items()})
    mixed, alone = MixUp(kind)(batch, seed=2), MixUp(kind)(last, seed=2)
    assert torch.equal(mixed.targets, alone.targets)
    torch.testing.assert_close(
        batch.spec.flatten(mixed.weights)[:, -1], batch.spec.flatten(alone.weights), rtol=1e-12, atol=1e-12
    )
    if kind != "self":
        share, partner = told(mixed.targets)
        clear = share < 0.9
        other = partners(batch, mixed, share)[clear].flatten(0, 1)
        signals = evaluate_batch(NETS["sine"], batch.spec.unflatten(other), GRID).unflatten(0, (-1, 3))
        before = batch.spec.flatten(batch.weights)[partner[clear]].flatten(0, 1)
        expected = evaluate_batch(NETS["sine"], batch.spec.unflatten(before), GRID).unflatten(0, (-1, 3))
        torch.testing.assert_close(signals, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_stays(kind):
    batch = batch_of(shape=(1,))
    mixed = MixUp(kind)(batch)
    torch.testing.assert_close(batch.spec.flatten(mixed.weights), batch.spec.flatten(batch.weights))
    assert mixed.targets.argmax(1).tolist() == [0]
    assert MixUp(kind)(Batch(batch.spec, batch.weights)).targets is None


def test_labels_without_a_number_of_classes_are_refused():
    batch = batch_of().with_(classes=None)
    message = (
        "mixup: expected class numbers with a known number of classes, numbers, or weights as targets, found int64 of "
        "shape [24]; mixup(direct, targets=larger) mixes the weights alone"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        MixUp("direct")(batch)
    assert MixUp("direct", targets="larger")(batch).targets.dtype == torch.int64
    assert MixUp("self")(batch).targets is batch.targets


def test_what_cannot_be_matched_is_refused_and_mixes_directly():
    spec = WeightSpec.build([Group("units", 3)], {"cube": TensorSpec.dense((3, 3, 3), ["units"] * 3)})
    batch = Batch(spec, random_weights(spec, (4,)))
    with pytest.raises(ConfigError, match=r"mixup: .*; mixup\(direct\) needs no matching"):
        MixUp("aligned")(batch)
    assert not torch.equal(MixUp("direct")(batch).weights["cube"], batch.weights["cube"])


def test_nested_and_repeated_groups_are_aligned():
    """A partner that is the same network in another order: mixed with it, every network stays what it was."""
    spec = mixed_spec()
    one = random_weights(spec)
    elements = spec.random_element((4,), generator=torch.Generator().manual_seed(0))
    mixed = MixUp("aligned")(Batch(spec, spec.act(elements, one)), seed=0)
    for name, w in spec.act(elements, one).items():
        torch.testing.assert_close(mixed.weights[name], w)


def test_a_space_without_symmetries_is_mixed_directly():
    spec = WeightSpec.mlp([3, 2])
    batch = Batch(spec, random_weights(spec, (6,)))
    aligned, direct = (MixUp(kind)(batch).weights for kind in ("aligned", "direct"))
    assert torch.equal(spec.flatten(aligned), spec.flatten(direct))


def test_float32_siren_zoos_mix():
    inr = tiny_zoo(networks=30)["inr"]
    weights = inr.weights_of(slice(None))
    mixed = MixUp("aligned")(Batch(inr.spec, weights, torch.arange(30), classes=30), seed=1)
    share, partner = told(mixed.targets)
    clear = share < 0.8
    other = inr.spec.unflatten(partners(Batch(inr.spec, weights), mixed, share.float())[clear])
    net, grid = MLP((2, 8, 8, 1)), coordinate_grid((5, 5))
    signals = evaluate_batch(net, weights, grid)[partner[clear]]
    torch.testing.assert_close(evaluate_batch(net, other, grid), signals, rtol=1e-3, atol=1e-3)


def test_a_group_with_two_sign_scalings_is_matched_by_permutations():
    """Batch normalisation flips a unit before and after itself."""
    torch.manual_seed(0)
    spec = spec_of(ResNet((1, 8, 8), 3, blocks=(1,), channels=4))
    counts = Counter((s.group, s.kind) for s in spec.scalings.values())
    assert max(counts.values()) > 1
    batch = Batch(spec, spec.unflatten(torch.rand(6, spec.num_parameters) + 0.1), torch.arange(6), classes=6)
    mixed = MixUp("aligned")(batch, seed=0)
    assert mixed.targets.shape == (6, 6)


def test_class_numbers_beyond_the_classes_are_refused():
    spec = spec_of(NETS["sine"])
    batch = Batch(spec, random_weights(spec, (3,), 0), torch.tensor([0, 1, 5]), classes=3)
    with pytest.raises(ConfigError, match=r"expected class numbers in 0 \.\. 2, found 0 \.\. 5"):
        MixUp("direct")(batch, seed=0)
