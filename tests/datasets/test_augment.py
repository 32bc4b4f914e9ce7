"""Augmentations: exact ones keep every network's function, the others are measured."""

import numpy as np
import pytest
import torch

from weightspace.datasets import (
    AUGMENTATIONS,
    Compose,
    GaussianNoise,
    Permutation,
    SignFlip,
    parse_augmentations,
)
from weightspace.errors import ConfigError
from weightspace.nets import MLP, coordinate_grid, evaluate_batch
from weightspace.spec import WeightSpec
from weightspace.testing import random_weights, tiny_zoo
from weightspace.zoo import spec_of


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(spec, before, after):
    """Share of parameters that are not what they were."""
    return (spec.flatten(before) != spec.flatten(after)).float().mean().item()


@pytest.mark.parametrize("activation", ["sine", "tanh", "relu", "gaussian"])
@pytest.mark.parametrize("augmentation", [Permutation(), SignFlip(), Compose([Permutation(), SignFlip(0.3)])])
def test_exact_symmetries_keep_the_function(activation, augmentation):
    net = MLP((2, 9, 7, 3), activation=activation, w0=4.0, output_offset=0.5)
    spec = spec_of(net)
    weights = random_weights(spec, (6,), dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    moved = augmentation(spec, weights, draw())
    grid = coordinate_grid((5, 5)).double()
    torch.testing.assert_close(
        evaluate_batch(net.double(), moved, grid), evaluate_batch(net, weights, grid), rtol=1e-9, atol=1e-9
    )
    assert torch.equal(spec.flatten(weights), spec.flatten(before)), "nothing is changed in place"
    if activation != "relu" or not isinstance(augmentation, SignFlip):
        assert changed(spec, before, moved) > 0.2


def test_augmented_networks_of_a_zoo_render_the_same_signals():
    inr = tiny_zoo(networks=10)["inr"]
    net = MLP((2, 8, 8, 1), output_offset=0.5)
    grid = coordinate_grid((6, 6))
    weights = inr.weights_of(slice(None))
    moved = parse_augmentations("permutation, sign")(inr.spec, weights, draw())
    before, after = (evaluate_batch(net, w, grid) for w in (weights, moved))
    assert (after - before).abs().max() < 1e-4
    assert before.std() > 0.05
    assert changed(inr.spec, weights, moved) > 0.8


def test_networks_of_a_batch_are_moved_independently():
    spec = WeightSpec.mlp([2, 8, 1], activation="tanh")
    weights = {name: tensor.expand(50, *tensor.shape) for name, tensor in random_weights(spec).items()}
    moved = spec.flatten(Permutation()(spec, weights, draw()))
    assert len({tuple(row.tolist()) for row in moved}) > 45
    flipped = SignFlip()(spec, weights, draw())["layers.0.bias"] / weights["layers.0.bias"]
    assert set(flipped.flatten().tolist()) == {-1.0, 1.0}
    assert len({tuple(row.tolist()) for row in flipped}) > 40


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_signs_flip_as_often_as_asked(p):
    spec = WeightSpec.mlp([2, 8, 1], activation="sine", w0=30.0)
    weights = random_weights(spec, (4000,))
    signs = SignFlip(p)(spec, weights, draw())["layers.0.bias"] / weights["layers.0.bias"]
    assert (signs < 0).float().mean().item() == pytest.approx(p, abs=0.01)


def test_neighbouring_symmetries_are_applied_as_one():
    spec = WeightSpec.mlp([2, 6, 5, 1], activation="sine", w0=3.0)
    weights = random_weights(spec, (4,), dtype=torch.float64)
    chain = [SignFlip(), Permutation(), SignFlip(), GaussianNoise(0.1), Permutation(), Permutation()]
    together = Compose(chain)(spec, weights, draw(5))
    generator, one_by_one = draw(5), weights
    for augmentation in chain:
        one_by_one = augmentation(spec, one_by_one, generator)
    torch.testing.assert_close(spec.flatten(together), spec.flatten(one_by_one), rtol=1e-12, atol=1e-12)
    assert changed(spec, weights, together) > 0.9


def test_nothing_to_do_changes_nothing():
    spec = WeightSpec.mlp([2, 6, 1])
    weights = random_weights(spec, (4,))
    assert changed(spec, weights, Compose([])(spec, weights, draw())) == 0.0
    assert changed(spec, weights, GaussianNoise(0.0)(spec, weights, draw())) == 0.0
    assert changed(spec, weights, SignFlip()(spec, weights, draw())) == 0.0, "ReLU has no signs to flip"


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_noise_is_relative_to_each_tensors_spread(scale):
    spec = WeightSpec.mlp([3, 20, 20, 2], activation="tanh")
    sizes = {name: 10.0 ** (at - 3) for at, name in enumerate(spec.tensors)}
    weights = {name: 2.0 * sizes[name] + t * sizes[name] for name, t in random_weights(spec, (300,)).items()}
    noisy = GaussianNoise(scale)(spec, weights, draw())
    for name, tensor in weights.items():
        noise = noisy[name] - tensor
        assert noise.std().item() == pytest.approx(scale * tensor.std().item(), rel=0.07)
        assert abs(noise.mean().item()) < 0.2 * noise.std().item()
    parts = [(noisy[name] - weights[name]).flatten(1)[:, 0].numpy() for name in spec.tensors]
    correlation = np.corrcoef(parts) - np.eye(len(parts))
    assert np.abs(correlation).max() < 0.25


def test_the_generator_decides_everything():
    spec = WeightSpec.mlp([2, 6, 1], activation="sine", w0=2.0)
    weights = random_weights(spec, (4,))
    augment = parse_augmentations("permutation, sign(0.4), noise(0.1)")
    first, same, other = (spec.flatten(augment(spec, weights, draw(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_text_to_augmentations():
    assert parse_augmentations("") is None
    assert parse_augmentations(" , ") is None
    found = parse_augmentations(" permutation,sign( 0.25 ) , noise(0.5),noise").augmentations
    assert [type(a).__name__ for a in found] == ["Permutation", "SignFlip", "GaussianNoise", "GaussianNoise"]
    assert (found[1].p, found[2].scale, found[3].scale) == (0.25, 0.5, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixup", r"augment: expected some of permutation, sign, noise, found 'mixup'"),
        ("noise(0.1", r"augment: expected some of .*, found 'noise\(0.1'"),
        ("sign()x", r"augment: expected some of .*, found 'sign\(\)x'"),
        ("permutation(3)", r"augment: 'permutation\(3\)' has unsuitable arguments"),
        ("noise(a)", r"augment: 'noise\(a\)' has unsuitable arguments \(could not convert string to float"),
        ("noise(0.1, 0.2)", r"augment: 'noise\(0.1, 0.2\)' has unsuitable arguments"),
        ("noise(-1)", r"noise: expected a scale of at least 0, found -1.0"),
        ("noise(nan)", r"noise: expected a scale of at least 0, found nan"),
        ("sign(1.5)", r"sign: expected a probability in \[0, 1\], found 1.5"),
    ],
)
def test_mistakes_in_the_text_are_named(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_augmentations(f"permutation, {text}")
    assert "\n" not in str(caught.value)


def test_names_register_once():
    assert set(AUGMENTATIONS) == {"permutation", "sign", "noise"}
    with pytest.raises(ValueError, match="augmentation 'noise' is registered twice"):
        AUGMENTATIONS.register("noise")(GaussianNoise)
