"""Statistics of merged networks: exact on the data, folded into the weights, and what is left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from weightspace import WeightSpec, nets
from weightspace.align import activation_matching, layer_statistics, repair, reset_batch_norm
from weightspace.errors import ConfigError, DataError, SpecError


def batches(inputs, size, targets=None):
    targets = torch.zeros(len(inputs)) if targets is None else targets
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def drawn(module, seed):
    """Weights of any module, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 1.0
        found[name] = noise.abs() + 0.5 if "running_var" in name else scale * noise
        found[name] = found[name] if tensor.is_floating_point() else tensor
    return found


def average(first, second):
    return {
        name: (first[name] + second[name]) / 2 if first[name].is_floating_point() else first[name]
        for name in first
    }


def convolutional():
    """Convolutions of every kind, one of them before a batch norm, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.Flatten(), nn.Dropout(), nn.Linear(288, 10), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip


# -- batch norms -------------------------------------------------------------------------------------------


def test_the_first_norm_gets_the_exact_statistics_however_batches_fall():
    module = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2)
    )
    weights, inputs = drawn(module, 1), torch.randn(23, 2, 5, 5) + torch.arange(23.0).view(-1, 1, 1, 1) / 10
    values = F.conv2d(inputs, weights["0.weight"], weights["0.bias"]).transpose(0, 1).flatten(1)
    for size in (23, 8, 11):  # the last batch of 11 holds a single item
        found = reset_batch_norm(module, weights, batches(inputs, size))
        torch.testing.assert_close(found["1.running_mean"], values.mean(1))
        torch.testing.assert_close(found["1.running_var"], values.var(1))
        assert all(torch.equal(found[name], weights[name]) for name in weights if "running" not in name)


def test_one_batch_is_what_training_mode_computes():
    module = convolutional()
    module[11] = nn.Identity()
    weights, inputs = drawn(module, 1), torch.randn(16, 2, 6, 6)
    before = copy.deepcopy(module.state_dict())
    found = reset_batch_norm(module.train(), weights, batches(inputs, 16))
    trained = functional_call(module, {name: tensor.clone() for name, tensor in weights.items()}, (inputs,))
    # by the variance of the batch in training, by the unbiased one afterwards
    torch.testing.assert_close(
        functional_call(module.eval(), found, (inputs,)), trained, rtol=5e-3, atol=5e-3
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_batch_norms_of_ones_own_are_found_by_their_buffers():
    own = nets.BatchNorm(3)
    weights = {
        f"0.{name}": tensor for name, tensor in drawn(nn.BatchNorm2d(3), 1).items() if "num" not in name
    }
    inputs = torch.randn(16, 3, 4, 4) * 2 + 1
    found = reset_batch_norm(nn.Sequential(own), weights, batches(inputs, 8))
    values = inputs.transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["0.running_mean"], values.mean(1))
    torch.testing.assert_close(found["0.running_var"], values.var(1))


def test_dropout_stays_off_and_modules_untouched():
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    weights, data = drawn(module, 1), batches(torch.randn(40, 4), 10)
    first, second = (reset_batch_norm(module, weights, data) for _ in range(2))
    expected = (torch.cat([x for x, _ in data]) @ weights["1.weight"].T + weights["1.bias"]).mean(0)
    torch.testing.assert_close(first["2.running_mean"], expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert module.training
    assert torch.equal(module[2].running_mean, torch.zeros(3))


def test_without_norms_weights_come_back():
    module = nn.Linear(2, 1)
    weights = drawn(module, 1)
    assert all(found is weights[name] for name, found in reset_batch_norm(module, weights, []).items())


def test_a_first_batch_of_one_item_is_refused():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(DataError, match="more than one value per channel, found a first batch of one item"):
        reset_batch_norm(module, drawn(module, 1), batches(torch.randn(3, 2), 1))


# -- REPAIR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2)])
def test_every_channel_varies_as_the_endpoints_do(shares):
    module, inputs = convolutional(), torch.randn(60, 2, 6, 6)
    data = batches(inputs, 17)
    ends = [reset_batch_norm(module, drawn(module, seed), data) for seed in (1, 2)]
    merged = average(*ends)
    repaired = repair(module, merged, ends, data, coefficients=shares)
    first, second, after = (layer_statistics(module, net, data) for net in (*ends, repaired))
    assert list(after.mean) == ["0", "2", "4", "12", "14"]
    assert after.final == ("14",)
    assert after.skipped == {"6": "a batch norm reads it", "9": "it has no bias"}
    for name in ("0", "2", "4", "12"):
        std = shares[0] * first.std[name] + shares[1] * second.std[name]
        mean = shares[0] * first.mean[name] + shares[1] * second.mean[name]
        torch.testing.assert_close(after.std[name], std, rtol=1e-3, atol=0.0)
        assert bool(((after.mean[name] - mean).abs() < 1e-3 * std).all())
    assert torch.equal(repaired["14.weight"], merged["14.weight"])
    assert torch.equal(repaired["9.weight"], merged["9.weight"])
    torch.testing.assert_close(
        repaired["7.running_mean"], reset_batch_norm(module, repaired, data)["7.running_mean"]
    )


def test_statistics_are_those_of_what_a_layer_computes():
    module, inputs = convolutional(), torch.randn(30, 2, 6, 6)
    weights = drawn(module, 1)
    found = layer_statistics(module, weights, batches(inputs, 7))
    values = (
        F.conv2d(inputs, weights["0.weight"], weights["0.bias"], padding=1)
        .double()
        .transpose(0, 1)
        .flatten(1)
    )
    torch.testing.assert_close(found.mean["0"], values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.std["0"], values.std(1, correction=0), rtol=1e-5, atol=1e-6)


def test_an_endpoint_repaired_with_itself_does_not_change():
    module, data = convolutional(), batches(torch.randn(30, 2, 6, 6), 10)
    end = reset_batch_norm(module, drawn(module, 1), data)
    found = repair(module, end, [end, end], data)
    assert all(torch.equal(found[name], end[name]) for name in end)


def test_a_linear_layer_by_hand():
    module = nn.Sequential(nn.Linear(1, 1), nn.Identity())
    data = [(torch.tensor([[-1.0], [1.0]]), torch.zeros(2))]

    def net(weight, bias):
        return {"0.weight": torch.tensor([[weight]]), "0.bias": torch.tensor([bias])}

    ends = [net(2.0, 1.0), net(-4.0, 5.0)]
    # standard deviations 2 and 4, means 1 and 5; the merged network's are 1 and 3
    plain = repair(module, net(-1.0, 3.0), ends, data)
    assert torch.equal(plain["0.weight"], torch.tensor([[-1.0]]))
    found = repair(module, net(-1.0, 3.0), ends, data, final=True)
    torch.testing.assert_close(found, net(-3.0, 3.0))
    known = [layer_statistics(module, end, data) for end in ends]
    uneven = repair(module, net(-1.0, 3.0), [], data, final=True, coefficients=(3.0, 1.0), statistics=known)
    torch.testing.assert_close(uneven, net(-2.5, 2.0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice, self.head = (nn.Linear(3, 3) for _ in range(4))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(torch.tanh(self.second(self.first(x)))))))


def test_layers_that_cannot_be_corrected_are_left_and_named():
    module, data = Tied(), batches(torch.randn(20, 3), 10)
    ends = [drawn(module, seed) for seed in (1, 2)]
    for end in ends:
        end["second.weight"] = end["first.weight"]
    merged = average(*ends)
    assert layer_statistics(module, merged, data).skipped == {
        "first": "its weight is tied to another's",
        "second": "its weight is tied to another's",
        "twice": "it is called more than once",
    }
    found = repair(module, merged, ends, data)
    assert all(torch.equal(found[name], merged[name]) for name in merged)


def test_half_precision_and_dead_channels():
    module, data = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), batches(torch.randn(64, 3), 20)
    ends = [drawn(module, seed) for seed in (1, 2)]
    merged = average(*ends)
    merged["0.weight"][0] = 0.0
    halved = {name: tensor.bfloat16() for name, tensor in merged.items()}
    found = repair(module, halved, ends, data)
    stds = [layer_statistics(module, end, data).std["0"] for end in ends]
    after = layer_statistics(module, found, data)
    assert found["0.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(after.std["0"][1:], ((stds[0] + stds[1]) / 2)[1:], rtol=1e-2, atol=0.0)
    assert float(after.std["0"][0]) == 0.0
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def trained(seed, inputs, targets):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(8, 48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.ReLU(),
        nn.Linear(48, 4),
    )
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(120):
        loss = F.cross_entropy(net(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net, {name: tensor.detach() for name, tensor in net.state_dict().items()}


def test_variance_collapses_in_a_merged_network_and_is_restored():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 8, generator=generator)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long() + 2 * (inputs[:, 2] + inputs[:, 3] ** 2 > 1).long()
    (net, first), (_, second) = (trained(seed, inputs, targets) for seed in (1, 2))
    data = batches(inputs, 100, targets)
    spec = WeightSpec.mlp([8, 48, 48, 48, 4], layers=["0", "2", "4", "6"])
    aligned, _ = activation_matching(spec, first, second, module=net, data=data)
    merged = average(first, aligned)
    repaired = repair(net, merged, [first, aligned], data)
    one, other, before, after = (layer_statistics(net, w, data) for w in (first, aligned, merged, repaired))
    wanted = (one.std["4"] + other.std["4"]) / 2
    assert float((before.std["4"] / wanted).mean()) < 0.9
    torch.testing.assert_close(after.std["4"], wanted, rtol=1e-3, atol=0.0)
    losses = [F.cross_entropy(functional_call(net, w, (inputs,)), targets) for w in (merged, repaired)]
    assert losses[1] < 0.8 * losses[0]


def test_bad_input_is_refused_in_one_sentence():
    module, data = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), batches(torch.randn(20, 3), 10)
    end = drawn(module, 1)
    with pytest.raises(ConfigError, match="coefficients: expected one for each of 2 endpoints, found 3"):
        repair(module, end, [end, end], data, coefficients=(1.0, 1.0, 1.0))
    with pytest.raises(ConfigError, match=r"coefficients: expected a positive sum, found 0\.0"):
        repair(module, end, [end, end], data, coefficients=(1.0, -1.0))
    with pytest.raises(ConfigError, match="endpoints: expected at least one, found none"):
        repair(module, end, [], data)
    known = layer_statistics(module, end, data)
    with pytest.raises(ConfigError, match="statistics: expected one for each of 2 endpoints, found 1"):
        repair(module, end, [end, end], data, statistics=[known])
    wide = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(SpecError, match="statistics: expected those of 5 channels of layer '0', found none"):
        repair(wide, drawn(wide, 1), [], data, statistics=[known])
    with pytest.raises(DataError, match=r"data: the module cannot be called with float32\[4, 2\]"):
        repair(module, end, [end], batches(torch.randn(4, 2), 4))
    broken = {**end, "0.bias": torch.full((4,), torch.nan)}
    with pytest.raises(
        DataError, match="data: expected finite values of layer '0', found infinite ones or NaN"
    ):
        repair(module, broken, [end, end], data)
