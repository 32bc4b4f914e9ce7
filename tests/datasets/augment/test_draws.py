"""Random numbers keyed by network: their quality, their independence, and one path equal to the other."""

import numpy as np
import pytest
import torch
from scipy import stats

from weightspace.datasets.augment import Draws
from weightspace.datasets.augment._draws import normal_numbers, uniform_numbers

SEEDS = [0, 1, 2**62, -5]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [0, 1, 1185])
def test_the_kernel_computes_what_pytorch_does(seed, count):
    kernel, slow = Draws.of(seed, 7), Draws.of(seed, 7)
    for _ in range(3):
        assert torch.equal(kernel.uniform(count), uniform_numbers(*slow.halves(), count))
        torch.testing.assert_close(
            kernel.normal(count), normal_numbers(*slow.halves(), count), rtol=1e-5, atol=1e-5
        )


def test_shapes_and_ranges():
    draws = Draws.of(0, 5)
    assert draws.uniform().shape == (5,)
    assert draws.uniform(2, 3).shape == (5, 2, 3)
    assert draws.normal(4).shape == (5, 4)
    assert draws.together(4).shape == (4,)
    assert len(draws) == 5
    many = Draws.of(0, 64).uniform(20000)
    assert many.dtype == torch.float32
    assert 0.0 <= many.min() < 1e-5
    assert 1 - 1e-5 < many.max() < 1.0
    assert torch.equal(many * 2**24, (many * 2**24).round())
    assert Draws.of(0, 64).normal(20000).abs().max() < 6.5
    assert Draws.of(0, 0).uniform(3).shape == (0, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_have_the_stated_distribution(seed):
    draws = Draws.of(seed, 200)
    for found, law in ((draws.uniform(1000), "uniform"), (draws.normal(1000), "norm")):
        # in all, along one network, and along the networks
        for sample in (found.flatten(), found[0], found[:, 0]):
            assert stats.kstest(sample.numpy(), law).pvalue > 1e-4
    assert stats.kurtosis(draws.normal(5000).flatten().numpy()) == pytest.approx(0, abs=0.02)


def test_the_lowest_bits_are_random_too():
    bits = (Draws.of(3, 100).uniform(1000).double() * 2**24).long()
    for at in range(24):
        share = ((bits >> at) & 1).double().mean().item()
        assert share == pytest.approx(0.5, abs=5 * 0.5 / 100000**0.5)
    assert len(bits.unique()) > 0.99 * 100000 - 1000  # birthdays among 2^24


def sample(seed=0, epoch=0, items=None, calls=0, count=4000):
    items = torch.arange(3) if items is None else torch.as_tensor(items)
    draws = Draws.for_items(items, seed=seed, epoch=epoch)
    for _ in range(calls):
        draws.uniform()
    return draws.uniform(count)


STREAMS = {
    "networks": lambda: sample(),
    "calls": lambda: torch.cat([sample(calls=calls)[:1] for calls in range(4)]),
    "epochs": lambda: torch.cat([sample(epoch=epoch)[:1] for epoch in range(4)]),
    "seeds": lambda: torch.cat([sample(seed=seed)[:1] for seed in (0, 1, 2, 2**40)]),
    "far networks": lambda: sample(items=[0, 2**31, 2**32, 2**33, 2**32 + 1]),
    "seed and epoch": lambda: torch.cat([sample(seed=1)[:1], sample(epoch=1)[:1]]),
    "neighbours in a stream": lambda: sample()[:1].unfold(1, 3990, 1)[0, :6],
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_are_independent(kind):
    found = STREAMS[kind]()
    for values in (found, (found - 0.5).abs(), (found * 256) % 1):
        correlation = np.corrcoef(values.numpy()) - np.eye(len(found))
        assert np.abs(correlation).max() < 5 / 4000**0.5
    for one in range(len(found)):
        for other in range(one):
            assert (found[one] == found[other]).sum() < 5


def test_a_networks_numbers_do_not_depend_on_its_neighbours():
    whole = Draws.for_items(torch.tensor([3, 9, 4, 7]), seed=1, epoch=2)
    part = Draws.for_items(torch.tensor([7, 9]), seed=1, epoch=2)
    for name, shape in (("uniform", (5,)), ("normal", (2, 3)), ("uniform", ())):
        one, two = getattr(whole, name)(*shape), getattr(part, name)(*shape)
        assert torch.equal(one[[3, 1]], two)


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(Draws.of(0, 3).uniform(10)[:, :4], Draws.of(0, 3).uniform(4))


def test_numbers_of_the_batch_as_a_whole_depend_on_all_of_it():
    def together(items, calls=0):
        draws = Draws.for_items(torch.tensor(items), seed=0)
        for _ in range(calls):
            draws.uniform()
        return draws.together(6)

    first = together([1, 2, 3])
    assert torch.equal(first, together([1, 2, 3]))
    for other in (together([1, 2, 4]), together([1, 3, 2]), together([1, 2]), together([1, 2, 3], calls=1)):
        assert not torch.equal(first, other)
    draws = Draws.of(0, 3)
    one, two = draws.together(2000), draws.together(2000)
    assert abs(np.corrcoef(one.numpy(), two.numpy())[0, 1]) < 0.1
    assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-4
    after = Draws.of(0, 3)
    after.together(1)
    assert not torch.equal(after.uniform(4), Draws.of(0, 3).uniform(4)), "it counts as a call"
