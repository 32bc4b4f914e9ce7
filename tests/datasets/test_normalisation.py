"""Normalisation: the statistics by hand, what it commutes with, what it leaves out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from weightspace.datasets import Normalisation, ZooDataset
from weightspace.errors import ConfigError, TaskError
from weightspace.spec import WeightSpec
from weightspace.testing import assert_equivariant, random_weights, tiny_zoo
from weightspace.zoo import Zoo


def dataset_of(rows, widths=(1, 2, 1)) -> ZooDataset:
    """A zoo whose networks have exactly these parameters."""
    spec = WeightSpec.mlp(list(widths), bias=False)
    rows = np.asarray(rows, dtype=np.float32)
    inr = tiny_zoo(networks=len(rows), views=1)["inr"]
    return ZooDataset(Zoo({"a": replace(inr, spec=spec, weights=rows, architecture=None)}), None)


def test_statistics_per_tensor_by_hand():
    """W0 holds 1, 3 and 5, 7: mean 4, variance 5. W1 holds 0, 0 and 2, 2: mean 1, variance 1."""
    dataset = dataset_of([[1, 3, 0, 0], [5, 7, 2, 2]])
    normalise = Normalisation.fit(dataset)
    assert normalise.mean.tolist() == [4.0, 1.0]
    assert normalise.std.tolist() == pytest.approx([5**0.5, 1.0])
    out = normalise(dataset.read([0])[0])
    assert out["layers.0.weight"].flatten().tolist() == pytest.approx([-3 / 5**0.5, -1 / 5**0.5])
    assert out["layers.1.weight"].flatten().tolist() == [-1.0, -1.0]


def test_statistics_per_entry_by_hand():
    dataset = dataset_of([[1, 3, 0, 0], [5, 7, 2, 4]])
    normalise = Normalisation.fit(dataset, "entry")
    assert normalise.mean.tolist() == [3.0, 5.0, 1.0, 2.0]
    assert normalise.std.tolist() == pytest.approx([2.0, 2.0, 1.0, 2.0])
    out = dataset.spec.flatten(normalise(dataset.read([0, 1])[0]))
    assert out.tolist() == [[-1.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("mode", ["tensor", "entry"])
def test_blocks_decide_nothing(mode):
    dataset = ZooDataset(tiny_zoo(networks=20), None)
    whole, parts = Normalisation.fit(dataset, mode), Normalisation.fit(dataset, mode, block=3)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.std, whole.std)
    flat = dataset.population.read(slice(None)).double()
    if mode == "entry":
        torch.testing.assert_close(whole.mean.double(), flat.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole.std.double(), flat.std(0, correction=0), rtol=1e-5, atol=1e-7)


def test_only_the_training_split_counts():
    zoo = tiny_zoo(networks=20)
    train = ZooDataset(zoo, "train")
    weights = zoo["inr"].weights.copy()
    weights[~np.isin(np.arange(20), train.rows)] = 1e6
    other = ZooDataset(Zoo({"inr": replace(zoo["inr"], weights=weights)}), "train")
    assert torch.equal(Normalisation.fit(train).mean, Normalisation.fit(other).mean)


def test_one_scale_per_tensor_commutes_with_permutations():
    dataset = ZooDataset(tiny_zoo(networks=20), None)
    assert_equivariant(Normalisation.fit(dataset), dataset.spec)
    with pytest.raises(AssertionError, match="relative error"):
        assert_equivariant(Normalisation.fit(dataset, "entry"), dataset.spec)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0, 3.0, 1000.0, 1e-6, 31.797, -62.809])
@pytest.mark.parametrize("mode", ["tensor", "entry"])
def test_what_never_varies_becomes_zero(value, mode):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(370, 4))
    rows[:, :2] = value
    dataset = dataset_of(rows)
    normalise = Normalisation.fit(dataset, mode)
    assert normalise.std[: 2 if mode == "entry" else 1].tolist() == [1.0] * (2 if mode == "entry" else 1)
    out = normalise(dataset.read(range(370))[0])
    assert out["layers.0.weight"].abs().max() <= 1e-6 * max(1.0, abs(value))
    assert out["layers.1.weight"].std() == pytest.approx(1.0, abs=0.05)


def test_small_weights_are_still_weights():
    rows = np.random.default_rng(0).normal(size=(50, 4)) * 1e-5
    dataset = dataset_of(rows)
    out = Normalisation.fit(dataset)(dataset.read(range(50))[0])
    assert out["layers.0.weight"].std(correction=0).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_networks_are_left_out(bad):
    rows = np.random.default_rng(0).normal(size=(10, 4))
    healthy = Normalisation.fit(dataset_of(rows))
    broken = Normalisation.fit(dataset_of(np.concatenate([rows, [[bad, 1, 1, 1]]])))
    assert torch.equal(broken.mean, healthy.mean)
    assert torch.equal(broken.std, healthy.std)
    with pytest.raises(TaskError, match="no networks with finite weights in split None"):
        dataset_of([[bad] * 4] * 3)


@pytest.mark.parametrize("mode", ["tensor", "entry"])
def test_its_statistics_travel_in_the_state_dict(mode):
    dataset = ZooDataset(tiny_zoo(networks=20), None)
    fitted, fresh = Normalisation.fit(dataset, mode), Normalisation(dataset.spec, mode)
    weights = random_weights(dataset.spec, (3,))
    assert torch.equal(dataset.spec.flatten(fresh(weights)), dataset.spec.flatten(weights))
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(dataset.spec.flatten(fresh(weights)), dataset.spec.flatten(fitted(weights)))
    assert set(fitted.state_dict()) == {"mean", "std"}


def test_unknown_modes_are_refused():
    with pytest.raises(ConfigError, match="normalisation: expected tensor, entry, fan_in, found 'layer'"):
        Normalisation(WeightSpec.mlp([2, 3, 1]), "layer")


def test_scales_that_depend_on_shapes_alone():
    """A layer with four inputs: weights times two; biases as they are."""
    spec = WeightSpec.mlp([4, 3, 1])
    normalise = Normalisation(spec, "fan_in")
    weights = random_weights(spec, (2,))
    out = normalise(weights)
    assert torch.equal(out["layers.0.weight"], weights["layers.0.weight"] * 2)
    assert torch.equal(out["layers.0.bias"], weights["layers.0.bias"])
    torch.testing.assert_close(out["layers.1.weight"], weights["layers.1.weight"] * 3**0.5)
    back = normalise.restore_change(out)
    torch.testing.assert_close(back["layers.1.weight"], weights["layers.1.weight"])
    fitted = Normalisation.fit(ZooDataset(tiny_zoo(networks=10), None), "fan_in")
    assert fitted.std.tolist() == pytest.approx([2**-0.5, 1, 8**-0.5, 1, 8**-0.5, 1])
    assert_equivariant(normalise, spec, symmetries=["permutation"])


def test_scales_count_what_is_summed():
    """A transposed convolution with 3 input channels and 3 x 3 kernels sums 27 entries; a table sums nothing."""

    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.places = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 4, 6))
            self.out = nn.Linear(6, 2)

        def forward(self, index):
            return self.out(torch.tanh(self.table(index) + self.places))

    images = nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    for net, inputs, expected in (
        (images, torch.randn(2, 3, 6, 6), {"0.weight": 27, "0.bias": 1, "2.weight": 9, "2.bias": 1}),
        (
            Tables(),
            torch.randint(11, (2, 4)),
            {"places": 1, "table.weight": 1, "out.weight": 6, "out.bias": 1},
        ),
    ):
        spec = WeightSpec.trace(net, inputs)
        counts = Normalisation(spec, "fan_in").std ** -2
        assert dict(zip(spec.tensors, counts.tolist(), strict=True)) == pytest.approx(expected)
