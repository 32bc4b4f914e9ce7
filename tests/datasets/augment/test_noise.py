"""What knows nothing of the function: noise of the stated spread, stated shares of zeros, smoothed labels."""

import re

import pytest
import torch

from weightspace.datasets.augment import (
    Batch,
    Draws,
    GaussianNoise,
    LabelSmoothing,
    QuantileDropout,
    WeightDropout,
    parse_augmentations,
)
from weightspace.datasets.augment._noise import _with_noise
from weightspace.errors import ConfigError
from weightspace.nets import CNN
from weightspace.spec import WeightSpec
from weightspace.testing import random_weights
from weightspace.zoo import spec_of

SPEC = WeightSpec.mlp([3, 20, 20, 2], activation="tanh")
CASES = [((300,), torch.float32), ((300,), torch.float64), ((100, 3), torch.float32)]


def uneven(batch, dtype=torch.float32, seed=0):
    """Networks whose tensors, and which among themselves, have very different means and spreads."""
    weights = {}
    for at, (name, w) in enumerate(random_weights(SPEC, batch, seed, dtype).items()):
        spread = 10.0 ** torch.linspace(-2, 1, batch[0], dtype=dtype).view(-1, *[1] * (w.ndim - 1))
        weights[name] = (2.0 + w) * spread * 10.0 ** (at - 3)
    return weights


@pytest.mark.parametrize("scale", [0.05, 0.5])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_noise_is_relative_to_the_spread_of_each_tensor_of_each_network(scale, shape, dtype):
    weights = uneven(shape, dtype)
    noisy = GaussianNoise(scale)(Batch(SPEC, weights)).weights
    for name, w in weights.items():
        own = w.flatten(len(shape))
        noise = (noisy[name] - w).flatten(len(shape)) / (scale * own.std(-1, correction=0, keepdim=True))
        assert noise.std().item() == pytest.approx(1.0, rel=0.05)
        assert noise.mean().abs() < 0.1
        if own.shape[-1] >= 20:
            each = noise.std(-1)
            assert each.min() > 0.4
            assert each.max() < 1.8
    firsts = torch.stack(
        [(noisy[name] - w).flatten(len(shape))[..., 0].flatten() for name, w in weights.items()]
    )
    ranks = firsts.sign()  # the sizes differ by magnitudes
    assert torch.corrcoef(ranks).fill_diagonal_(0).abs().max() < 0.25


def test_the_compiled_noise_is_what_pytorch_computes():
    flat = SPEC.flatten(uneven((7,)))
    sizes = [tensor.numel for tensor in SPEC.tensors.values()]
    noise = Draws.of(0, 7).normal(1, SPEC.num_parameters)
    slow = _with_noise(flat[:, None].double(), noise.clone(), sizes, 0.3)
    fast = _with_noise(flat[:, None], noise.clone(), sizes, 0.3)
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-7)


def test_a_constant_tensor_gets_no_noise():
    spec = WeightSpec.mlp([2, 4, 1])
    weights = random_weights(spec, (5,))
    noisy = GaussianNoise(1.0)(Batch(spec, weights)).weights
    assert torch.equal(noisy["layers.1.bias"], weights["layers.1.bias"])
    assert not torch.equal(noisy["layers.0.bias"], weights["layers.0.bias"])
    none = GaussianNoise(0.0)(Batch(spec, weights)).weights
    assert torch.equal(spec.flatten(none), spec.flatten(weights))


def test_gradients_flow_through_noise():
    spec = WeightSpec.mlp([2, 4, 1])
    flat = spec.flatten(random_weights(spec, (5,))).requires_grad_()
    noisy = GaussianNoise(0.1)(Batch(spec, spec.unflatten(flat)))
    spec.flatten(noisy.weights).sum().backward()
    assert flat.grad is not None
    torch.testing.assert_close(flat.grad.mean().item(), 1.0, rtol=0.2, atol=0)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_so_many_weights_are_dropped_and_the_others_stay(p, shape, dtype):
    weights = random_weights(SPEC, shape, dtype=dtype)
    flat, dropped = SPEC.flatten(weights), SPEC.flatten(WeightDropout(p)(Batch(SPEC, weights)).weights)
    gone = dropped == 0
    assert torch.equal(dropped[~gone], flat[~gone])
    assert gone.float().mean().item() == pytest.approx(p, abs=0.005)
    for share in (gone.float().mean(-1), gone.flatten(0, -2).float().mean(0)):
        assert (share - p).abs().max() < 6 * (p * (1 - p) / min(300, SPEC.num_parameters)) ** 0.5 + 1e-6


@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.parametrize("most", [0.1, 1.0])
def test_exactly_the_smallest_weights_of_each_tensor_are_dropped(most, shape, dtype):
    weights = random_weights(SPEC, shape, dtype=dtype)
    after = QuantileDropout(most)(Batch(SPEC, weights), seed=4).weights
    quantiles = (Draws.of(4, shape[0]).uniform(*shape[1:], len(SPEC.tensors)) * most).unbind(-1)
    for quantile, (name, w) in zip(quantiles, weights.items(), strict=True):
        own, kept = w.flatten(len(shape)), after[name].flatten(len(shape))
        count = (quantile * own.shape[-1]).floor().long()
        assert torch.equal((kept == 0).sum(-1), count)
        assert torch.equal(kept[kept != 0], own[kept != 0])
        largest = torch.where(kept == 0, own.abs(), 0).amax(-1)
        least = torch.where(kept == 0, torch.inf, own.abs()).amin(-1)
        assert (largest < least).all()
        assert count.float().mean() > 0.3 * most * own.shape[-1] - 1


def test_quantiles_of_half_precision_are_dropped_too():
    spec = WeightSpec.mlp([2, 16, 1])
    weights = {name: w.bfloat16() for name, w in random_weights(spec, (50,)).items()}
    after = QuantileDropout(0.5)(Batch(spec, weights)).weights
    gone = (after["layers.0.weight"] == 0).float().mean().item()
    assert gone == pytest.approx(0.25, abs=0.06)
    assert after["layers.0.weight"].dtype == torch.bfloat16


def test_smoothed_labels_by_hand():
    weights = random_weights(SPEC, (3,))
    batch = Batch(SPEC, weights, torch.tensor([0, 3, 1]), classes=4)
    smooth = LabelSmoothing(0.2)(batch)
    expected = [[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85], [0.05, 0.85, 0.05, 0.05]]
    torch.testing.assert_close(smooth.targets, torch.tensor(expected))
    assert smooth.weights is weights
    twice = LabelSmoothing(0.2)(smooth).targets
    torch.testing.assert_close(twice[0], torch.tensor([0.73, 0.09, 0.09, 0.09]))
    assert torch.equal(LabelSmoothing(0.0)(batch).targets, torch.eye(4)[[0, 3, 1]])


@pytest.mark.parametrize(
    ("targets", "classes", "message"),
    [
        (None, None, "smoothing: expected class numbers as targets, found none"),
        (torch.zeros(2), None, "smoothing: expected class numbers as targets, found float32 of shape [2]"),
        (torch.zeros(2), 3, "smoothing: expected class numbers as targets, found float32 of shape [2]"),
        (random_weights(SPEC, (2,)), None, "smoothing: expected class numbers as targets, found weights"),
        (
            torch.zeros(2, dtype=torch.long),
            None,
            "batch: expected classes=, the number of classes, beside class numbers, found none",
        ),
    ],
)
def test_only_classes_can_be_smoothed(targets, classes, message):
    batch = Batch(SPEC, random_weights(SPEC, (2,)), targets, classes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        LabelSmoothing()(batch)


@pytest.mark.parametrize("text", ["noise(0.5)", "dropout(0.9)", "quantile(1)"])
def test_statistics_stay_as_they_are(text):
    """A running variance of zero or less would change everything."""
    torch.manual_seed(0)
    spec = spec_of(CNN((1, 8, 8), (4, 4), 3, norm="batch"))
    kinds = {name: tensor.kind for name, tensor in spec.tensors.items()}
    assert "statistic" in kinds.values()
    batch = Batch(spec, spec.unflatten(torch.rand(5, spec.num_parameters) + 0.5))
    found = parse_augmentations(text)(batch, seed=0).weights
    for name, kind in kinds.items():
        assert torch.equal(found[name], batch.weights[name]) == (kind == "statistic"), name
