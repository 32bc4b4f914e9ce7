"""Dropout by key: the bits of a network are its own, wherever it is trained."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightspace.errors import ConfigError
from weightspace.nets import CNN, MLP, RNN, Dropout, ResNet, dropout_state, evaluate_batch, random_keys
from weightspace.nets._dropout import keep_mask, random_words

NETWORKS = [
    CNN((1, 8, 8), (4, 5), 3, norm="layer"),
    MLP((12, 16, 16, 3), activation="relu"),
    ResNet((1, 8, 8), 3, blocks=(1, 1), channels=4),
    RNN(7, 9, 3, cell="gru", layers=2),
]


def oracle(key, count):
    """The same numbers with Python's integers."""

    def mixed(x):
        return x ^ (x >> 16)

    words, low, high = [], key & 0x7FFFFFFF, key >> 32
    for x in range(count):
        for factor in (0x45D9F3B, 0x45D9F3B):
            x = mixed(x) * factor % 2**32
        x = (mixed(mixed(x) ^ low) * 0x45D9F3B + high) % 2**32
        x = mixed(mixed(x) * 0x45D9F3B % 2**32)
        words.append(x if x < 2**31 else x - 2**32)
    return words


@pytest.mark.parametrize("key", [0, 1, 2**62 - 1, 0x1234567812345678])
def test_random_words_are_those_of_exact_arithmetic(key):
    assert random_words(torch.tensor(key), 1000).tolist() == oracle(key, 1000)


def test_words_look_random():
    keys = random_keys(0, torch.arange(64), step=3)
    words = torch.vmap(lambda key: random_words(key, 4096))(keys)
    bits = ((words[..., None] >> torch.arange(32)) & 1).double()
    assert (bits.mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / 512  # each bit: 2**18 coins
    signs = bits[..., 31] * 2 - 1
    between = signs @ signs.T / 4096 - torch.eye(64)
    assert between.abs().max() < 6 / 64  # two networks share nothing: the mean of 4096 coins
    for lag in (1, 2, 16, 256):
        assert (signs[:, lag:] * signs[:, :-lag]).mean().abs() < 5 / 500


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_entries_stay_at_the_rate(rate):
    kept = keep_mask(torch.tensor(5), torch.tensor(rate), (400, 1000)).double()
    assert kept.mean() == pytest.approx(1 - rate, abs=4e-3)
    assert kept.mean(0).sub(1 - rate).abs().max() < 0.15
    assert bool(kept.all()) == (rate == 0.0)


def test_keys_are_functions_of_seed_network_and_step_alone():
    networks = torch.tensor([0, 1, 5, 2**40])
    keys = random_keys(3, networks, step=7)
    alone = torch.stack([random_keys(3, number, step=7) for number in networks])
    assert keys.equal(alone)
    assert random_keys(3, networks, torch.full((4,), 7)).equal(keys)
    assert keys.min() >= 0
    many = torch.cat(
        [random_keys(seed, torch.arange(500), step) for seed in (0, 1, 2**32, 2**62) for step in range(50)]
    )
    assert len(many.unique()) == len(many)


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: net.kind)
def test_masks_do_not_depend_on_the_neighbours(net):
    layers = [name for name, layer in net.named_modules() if isinstance(layer, Dropout)]
    rates = torch.tensor([0.0, 0.3, 0.6, 0.3])
    keys = random_keys(1, torch.arange(4), step=2)
    state = dropout_state(net, keys, rates)
    assert list(state) == [f"{name}.{part}" for name in layers for part in ("key", "rate")]

    def masks(chosen):
        def one(drop):
            return torch.func.functional_call(Dropout().train(), drop, (torch.ones(6, 50),))

        return [
            torch.vmap(one)({part: state[f"{name}.{part}"][chosen] for part in ("key", "rate")})
            for name in layers
        ]

    everyone, swapped, single = masks([0, 1, 2, 3]), masks([3, 2, 1, 0]), masks([2])
    for together, backwards, alone in zip(everyone, swapped, single, strict=True):
        assert together.flip(0).equal(backwards)
        assert together[2:3].equal(alone)
        assert not together[1].equal(together[3])  # one rate, two networks
        assert together[0].equal(torch.ones(6, 50))
    if len(layers) > 1:
        assert not everyone[0][1].equal(everyone[1][1])  # one network, two layers


@pytest.mark.parametrize("net", NETWORKS, ids=lambda net: net.kind)
def test_a_population_with_rates_is_each_network_by_itself(net):
    net = net.train()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.1 * torch.randn(3, *tensor.shape, generator=generator)
        for name, tensor in net.named_parameters()
    }
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    drop = dropout_state(net, random_keys(0, torch.arange(3), step=0), torch.tensor([0.0, 0.3, 0.6]))
    inputs = net.example_inputs(6)
    inputs = inputs + torch.randn(inputs.shape, generator=generator) if inputs.is_floating_point() else inputs
    together = evaluate_batch(net, {**weights, **drop}, inputs)
    for place in range(3):
        state = {name: tensor[place] for name, tensor in {**weights, **drop}.items()}
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        statistics = {name: buffer.clone() for name, buffer in before.items()}
        alone = torch.func.functional_call(net, {**statistics, **state}, (inputs,))
        torch.testing.assert_close(together[place], alone, atol=1e-5, rtol=1e-4)
    plain = evaluate_batch(net, {**weights, **dropout_state(net, torch.arange(3))}, inputs)
    assert not torch.allclose(plain[2], together[2])  # its own rate is 0
    torch.testing.assert_close(plain[0], together[0])


def test_by_itself_it_is_the_dropout_of_pytorch():
    layer, x = Dropout(0.4).train(), torch.randn(100, 7)
    torch.manual_seed(0)
    expected = F.dropout(x, 0.4)
    torch.manual_seed(0)
    assert layer(x).equal(expected)
    assert layer.eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert list(nn.Sequential(layer).state_dict()) == []


def test_kept_entries_are_scaled():
    layer, x = Dropout(0.75).train(), torch.randn(1000)
    state = {"key": torch.tensor(9)}
    found = torch.func.functional_call(layer, state, (x,))
    kept = keep_mask(torch.tensor(9), torch.tensor(0.75), (1000,))
    torch.testing.assert_close(found, torch.where(kept, 4 * x, 0.0))
    assert layer.key is None


def test_gradients_flow_through_what_stays():
    state = {"key": torch.tensor(9), "rate": torch.tensor(0.5)}
    layer = Dropout().train()

    def loss(x):
        return torch.func.functional_call(layer, state, (x,)).sum()

    gradient = torch.func.grad(loss)(torch.ones(100))
    assert gradient.equal(torch.where(keep_mask(torch.tensor(9), torch.tensor(0.5), (100,)), 2.0, 0.0))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, float("nan")])
def test_impossible_rates_are_named(rate):
    with pytest.raises(ConfigError, match="dropout: expected a rate of at least 0 and below 1, found"):
        Dropout(rate)


def test_impossible_rates_of_a_population_are_named():
    net, keys = MLP((4, 3, 2)), torch.arange(2)
    with pytest.raises(ConfigError, match="rates: expected rates of at least 0 and below 1, found 1"):
        dropout_state(net, keys, torch.tensor([0.5, 1.0]))
    with pytest.raises(ConfigError, match=r"rates: expected shape \[2\], found \[3\]"):
        dropout_state(net, keys, torch.zeros(3))
