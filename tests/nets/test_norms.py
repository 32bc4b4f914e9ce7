"""Batch norms in populations: their statistics come out, and nothing is written into."""

import copy

import pytest
import torch
from torch import nn

from weightspace.errors import ConfigError
from weightspace.nets import CNN, BatchNorm, evaluate_batch, forward_and_statistics, statistic_names


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3)])
def test_it_is_the_batch_norm_of_pytorch(shape):
    ours = BatchNorm(4, momentum=0.3)
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    theirs = kind(4, momentum=0.3)
    torch.manual_seed(0)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.7)
        nn.init.constant_(norm.bias, -0.2)
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x))
    for name, expected in theirs.state_dict().items():
        if name != "num_batches_tracked":
            torch.testing.assert_close(ours.state_dict()[name], expected)
    x = torch.randn(shape)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_statistics_by_hand():
    norm = BatchNorm(1)
    x = torch.tensor([[1.0], [3.0]])
    output, statistics = forward_and_statistics(norm, {}, x)
    torch.testing.assert_close(output, torch.tensor([[-1.0], [1.0]]), atol=1e-4, rtol=0)
    assert statistics["running_mean"].item() == pytest.approx(0.2)  # 0.9 * 0 + 0.1 * 2
    assert statistics["running_var"].item() == pytest.approx(1.1)  # 0.9 * 1 + 0.1 * 2, unbiased
    assert norm.running_mean.item() == 0.0
    assert not statistics["running_var"].requires_grad
    assert forward_and_statistics(norm.eval(), {}, x)[1]["running_mean"] is norm.running_mean


def test_statistics_stay_buffers_that_move_with_the_module():
    norm = BatchNorm(3).train()
    norm(torch.randn(5, 3))
    assert [name for name, _ in norm.named_buffers()] == ["running_mean", "running_var"]
    again = copy.deepcopy(norm).double()
    again(torch.randn(5, 3).double())
    assert again.running_mean.dtype == torch.float64
    norm.load_state_dict(again.state_dict())


def test_a_population_in_training_leaves_no_trace_in_the_module(population):
    net = CNN((1, 6, 6), (4, 3), 2, norm="batch").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weights, x = population(net), torch.randn(5, 1, 6, 6)
    trained = {name: tensor for name, tensor in weights.items() if name not in statistic_names(net)}
    found = evaluate_batch(net, weights, x)
    torch.testing.assert_close(evaluate_batch(net, trained, x), found)  # batch statistics alone count
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())


def test_statistics_that_are_not_batched_are_named(population):
    net = CNN((1, 6, 6), (4, 3), 2, norm="batch").train()
    weights = {name: tensor for name, tensor in population(net).items() if "running" not in name}
    x = torch.randn(5, 1, 6, 6)
    with pytest.raises(ConfigError, match="running_mean: expected statistics batched like the parameters"):
        torch.vmap(lambda parameters: torch.func.functional_call(net, parameters, (x,)))(weights)
    assert net(x).shape == (5, 2)  # unharmed


def test_a_batch_of_one_value_per_channel_has_no_variance():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        BatchNorm(3).train()(torch.randn(1, 3))
