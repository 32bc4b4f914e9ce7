"""A user's own networks as a zoo, and the specs that need no describing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from weightspace.errors import ConfigError, SpecError
from weightspace.nets import MLP
from weightspace.spec import WeightSpec
from weightspace.zoo import SPLITS, Zoo, spec_of, split_items


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)
    )


def test_networks_of_a_sequential_come_back(tmp_path):
    networks = [sequential() for _ in range(4)]
    zoo = Zoo.from_state_dicts(
        [net.state_dict() for net in networks],
        module=networks[0],
        labels={"class": [0, 1, 0, 1], "flag": [True, False, True, True]},
        metrics={"accuracy": torch.tensor([0.5, 0.6, 0.7, 0.8])},
    )
    opened = Zoo.open(zoo.save(tmp_path / "mine.h5"))["networks"]
    for row, net in enumerate(networks):
        weights = opened.weights_of(row)
        assert list(weights) == list(net.state_dict())
        for name, tensor in net.state_dict().items():
            assert torch.equal(weights[name], tensor)
    assert opened.labels["class"].tolist() == [0, 1, 0, 1]
    assert opened.labels["flag"].tolist() == [1, 0, 1, 1]
    assert opened.labels["flag"].dtype == np.int64
    assert opened.metrics["accuracy"].dtype == np.float32
    assert opened.architecture is None
    x = torch.randn(7, 3)
    rebuilt = torch.func.functional_call(networks[2].eval(), opened.weights_of(2), (x,))
    assert torch.equal(rebuilt, networks[2](x))


def test_an_mlp_says_how_to_rebuild_it():
    net = MLP((2, 6, 1), activation="gaussian", w0=3.0, output_offset=0.25)
    zoo = Zoo.from_state_dicts([net.state_dict()], module=net)
    assert list(zoo) == ["mlp"]
    assert zoo["mlp"].architecture == {"kind": "mlp", "arguments": net.arguments()}
    assert zoo["mlp"].spec == WeightSpec.mlp((2, 6, 1), activation="gaussian", w0=3.0)


def test_a_spec_serves_where_the_module_is_unknown():
    spec = WeightSpec.mlp([2, 3, 1], layers=["enter", "leave"])
    state = {"enter.weight": torch.ones(3, 2), "enter.bias": torch.zeros(3)}
    state |= {"leave.weight": torch.ones(1, 3), "leave.bias": torch.zeros(1)}
    zoo = Zoo.from_state_dicts([state], spec=spec, name="mine")
    assert zoo["mine"].spec is spec
    assert zoo["mine"].read(0).tolist() == [1.0] * 6 + [0.0] * 3 + [1.0] * 3 + [0.0]
    with pytest.raises(ConfigError, match="expected module= or spec=, found neither"):
        Zoo.from_state_dicts([state])


def test_a_state_dict_that_does_not_fit_is_named_by_its_index():
    nets = [MLP((2, 4, 1)) for _ in range(3)]
    states = [dict(net.state_dict()) for net in nets]
    cases = [
        ({"layers.0.bias": None}, r"state_dicts\[2\]: weights: tensor 'layers.0.bias' is missing"),
        ({"head.bias": torch.zeros(1)}, r"state_dicts\[2\]: weights: unknown tensor 'head.bias'"),
        (
            {"layers.1.weight": torch.zeros(1, 5)},
            r"state_dicts\[2\]: weights: 'layers.1.weight' should end in shape \[1, 4\], found \[1, 5\]",
        ),
    ]
    for change, message in cases:
        wrong = {name: tensor for name, tensor in {**states[2], **change}.items() if tensor is not None}
        with pytest.raises(SpecError, match=message):
            Zoo.from_state_dicts([*states[:2], wrong], module=nets[0])
    with pytest.raises(ConfigError, match="state_dicts: expected at least one, found none"):
        Zoo.from_state_dicts([], module=nets[0])


@pytest.mark.parametrize("table", ["labels", "metrics"])
def test_columns_of_the_wrong_length_or_type_are_named(table):
    net = MLP((2, 4, 1))
    states = [net.state_dict()] * 3
    with pytest.raises(ConfigError, match=rf"{table}/y: expected 3 numbers, found shape \[2\] of int64"):
        Zoo.from_state_dicts(states, module=net, **{table: {"y": [0, 1]}})
    with pytest.raises(ConfigError, match=rf"{table}/y: expected 3 numbers, found shape \[3\] of <U1"):
        Zoo.from_state_dicts(states, module=net, **{table: {"y": ["a", "b", "c"]}})


def test_networks_of_one_item_share_a_split_and_are_counted_as_views():
    net = MLP((2, 4, 1))
    source = [7, 3, 7, 5, 3, 7, 9, 11]
    zoo = Zoo.from_state_dicts([net.state_dict()] * 8, module=net, source=source, fractions=(0.4, 0.2, 0.4))
    inr = zoo["mlp"]
    assert inr.source.tolist() == source
    assert inr.view.tolist() == [0, 0, 1, 0, 1, 2, 0, 0]
    by_item = {item: {int(s) for s in inr.split[inr.source == item]} for item in source}
    assert all(len(splits) == 1 for splits in by_item.values())
    assert set(inr.split.tolist()) == {0, 1, 2}


# -- splits ------------------------------------------------------------------------------------------------

shares = st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)).filter(any)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), shares, st.integers(0, 2**32))
def test_splits_follow_items_and_have_the_asked_sizes(items, parts, seed):
    items = np.array(items)
    fractions = [part / sum(parts) for part in parts]
    split = split_items(items, fractions, seed)
    assert split.dtype == np.uint8
    assert split.shape == items.shape
    distinct, first = np.unique(items, return_index=True)
    by_item = split[first]
    np.testing.assert_array_equal(split, by_item[np.searchsorted(distinct, items)])
    sizes = np.bincount(by_item, minlength=3)
    assert len(sizes) == len(SPLITS)
    for size, fraction in zip(sizes, fractions, strict=True):
        assert abs(size - fraction * len(distinct)) <= 1
        assert size == 0 or fraction > 0
    np.testing.assert_array_equal(split, split_items(items, fractions, seed))
    order = np.random.default_rng(0).permutation(len(items))
    np.testing.assert_array_equal(split[order], split_items(items[order], fractions, seed))


def test_splits_depend_on_the_seed():
    items = np.arange(100)
    one, two = (split_items(items, (0.5, 0.25, 0.25), seed) for seed in (0, 1))
    assert np.bincount(one).tolist() == np.bincount(two).tolist() == [50, 25, 25]
    assert (one != two).sum() > 20


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2), (float("nan"), 0.5, 0.5)]
)
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(ConfigError, match="fractions: expected three shares that sum to 1, found"):
        split_items(np.arange(4), fractions, 0)


# -- specs of modules --------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_spec_of_a_sequential_holds_on_the_module(name):
    act = ACTIVATIONS[name]
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, 3))
    spec = spec_of(module)
    assert list(spec.tensors) == list(module.state_dict())
    assert {group.activation for group in spec.groups.values()} == {name}
    report = spec.verify(module, torch.randn(9, 2, 3))
    report.raise_if_wrong(1e-10)
    assert report.illegal_change > 1e-3


def test_a_sequential_without_biases():
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    assert spec_of(module).num_parameters == 20
    spec_of(module).verify(module, torch.randn(5, 3)).raise_if_wrong(1e-10)


def test_what_a_sequential_holds_does_not_matter():
    module = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)
    )
    spec = spec_of(module)
    assert [group.size for group in spec.groups.values()] == [3, 5]
    spec.verify(module, torch.randn(5, 2)).raise_if_wrong(1e-10)


def test_other_modules_are_traced_with_example_inputs():
    module = nn.Conv2d(1, 4, 3)
    with pytest.raises(
        SpecError, match=r"module: Conv2d is traced with example inputs; pass example_inputs="
    ):
        spec_of(module)
    assert spec_of(module, torch.zeros(2, 1, 5, 5)).num_parameters == 40


@pytest.mark.parametrize("activation", ["relu", "tanh", "sine", "gaussian"])
def test_the_spec_that_is_written_down_for_mlps_is_the_traced_one(activation):
    net = MLP([2, 5, 6, 4, 3], activation=activation)
    assert spec_of(net) == WeightSpec.trace(net, torch.zeros(2, 2), more_inputs=[torch.zeros(3, 2)])


def test_networks_of_any_module_make_a_zoo(tmp_path):
    def network():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 2),
        )

    networks = [network() for _ in range(3)]
    zoo = Zoo.from_state_dicts(
        [net.state_dict() for net in networks], module=networks[0], example_inputs=torch.zeros(2, 1, 5, 5)
    )
    opened = Zoo.open(zoo.save(tmp_path / "cnn.h5"))["networks"]
    assert opened.spec == WeightSpec.trace(networks[0], torch.zeros(2, 1, 5, 5))
    assert list(opened.spec.constants) == ["1.num_batches_tracked"]
    assert torch.equal(opened.weights_of(2)["1.running_mean"], networks[2].state_dict()["1.running_mean"])
