"""Values of units found from the spec: the right ones, moved by permutations as the spec says, for any module."""

import warnings

import pytest
import torch
from torch import nn

from weightspace import WeightSpec
from weightspace.errors import SpecError, SpecWarning
from weightspace.spec import Group, TensorSpec, Watch, trace
from weightspace.spec._cells import pull
from weightspace.spec.tracing import _watch
from weightspace.testing import networks, random_weights

# one of each way in which units stand in values: flattened, concatenated, shuffled, nested, split in heads, recurrent
KINDS = [
    "mixture_of_experts",
    "vgg_flatten",
    "deep_sets",
    "group_norm",
    "pixel_shuffle",
    "multihead_attention_weights",
    "vit",
    "rnn",
]


@pytest.mark.parametrize("name", KINDS)
def test_permuted_weights_permute_the_values(name):
    case = networks()[name]
    module, inputs = case.build(), case.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        spec = trace(module, inputs, verify=False)
    weights = {name: 0.5 * tensor.abs() for name, tensor in random_weights(spec, seed=1).items()}
    element = spec.random_element(symmetries=["permutation"], generator=torch.Generator().manual_seed(2))
    watch = Watch(spec, module)
    before = list(watch.run(weights, inputs))
    after = list(watch.run(spec.act(element, weights), inputs))
    assert [site for site, _ in before] == [site for site, _ in after]
    moved = 0
    for (site, values), (_, found) in zip(before, after, strict=True):
        assert values.shape[:-1] == spec.unit_shape(site.group)
        expected = pull(spec, site.group, element, values.movedim(-1, 0)).movedim(0, -1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
        moved += not torch.allclose(found, values)
    assert moved
    seen = {at for site, _ in before for at in (site.group, *spec.groups[site.group].within)}
    assert set(spec.groups) - seen <= ({"hidden0", "hidden1"} if name == "rnn" else set())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        stream = self.stem(x)
        stream = stream + self.down(torch.tanh(self.up(self.norm(stream))))
        return self.head(stream)


def test_values_are_those_that_layers_read():
    module, inputs = Residual(), torch.randn(6, 3)
    spec = trace(module, inputs)
    found = list(Watch(spec, module).run(module.state_dict(), inputs))
    with torch.no_grad():
        stem = module.stem(inputs)
        normed = module.norm(stem)
        hidden = torch.tanh(module.up(normed))
        wanted = [("hidden0", normed), ("hidden1", hidden), ("hidden0", stem + module.down(hidden))]
    assert [site.group for site, _ in found] == [group for group, _ in wanted]
    for (_, values), (_, expected) in zip(found, wanted, strict=True):
        torch.testing.assert_close(values, expected.mT)


def test_every_value_of_a_group_on_demand():
    module, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(6, 3)
    watch = Watch(trace(module, inputs), module)
    values = [values for _, values in watch.widened(["hidden0"]).run(module.state_dict(), inputs)]
    expected = module[0](inputs).mT.detach()
    assert len(values) == 2
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(values[1], expected.relu())


def test_names_are_those_of_the_given_spec():
    module, inputs = Residual(), torch.randn(6, 3)
    tensors = {
        "stem.weight": TensorSpec.dense((5, 3), ["stream", None]),
        "stem.bias": TensorSpec.dense((5,), ["stream"]),
        "up.weight": TensorSpec.dense((7, 5), [None, "stream"]),  # coarser than what could be traced
        "up.bias": TensorSpec.dense((7,), [None]),
        "down.weight": TensorSpec.dense((5, 7), ["stream", None]),
        "down.bias": TensorSpec.dense((5,), ["stream"]),
        "norm.weight": TensorSpec.dense((5,), ["stream"]),
        "norm.bias": TensorSpec.dense((5,), ["stream"]),
        "head.weight": TensorSpec.dense((2, 5), [None, "stream"]),
        "head.bias": TensorSpec.dense((2,), [None]),
    }
    spec = WeightSpec.build([Group("stream", 5)], tensors)
    assert {site.group for site in Watch(spec, module).sites(module.state_dict(), inputs)} == {"stream"}


class Ramp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.second(self.first(x) * torch.arange(4.0))


def test_a_spec_of_another_module_is_refused():
    inputs = torch.randn(6, 3)
    spec = WeightSpec.mlp([3, 4, 1], layers=["first", "second"])
    weights = random_weights(spec)
    with pytest.raises(SpecError, match=r"^spec: group 'hidden0' is none of Ramp: .*mul"):
        list(Watch(spec, Ramp()).run(weights, inputs))
    wide = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    renamed = WeightSpec.mlp([3, 4, 1], layers=["0", "2"])
    with pytest.raises(
        SpecError, match=r"'0.weight' of Sequential should have shape \[4, 3\], found \[5, 3\]"
    ):
        list(Watch(renamed, wide).run(random_weights(renamed), inputs))
    with pytest.raises(SpecError, match=r"it has no tensor '0.weight', which Sequential uses"):
        list(Watch(spec, wide).run(weights, inputs))


def test_weights_that_do_not_fit_are_refused():
    module, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(6, 3)
    watch = Watch(trace(module, inputs), module)
    with pytest.raises(SpecError, match=r"expected one network, found batch shape \[2\]"):
        list(watch.run(random_weights(watch.spec, (2,)), inputs))
    with pytest.raises(SpecError, match=r"parameter '2.bias' is missing"):
        list(watch.run({n: w for n, w in module.state_dict().items() if n != "2.bias"}, inputs))


def test_half_precision_is_computed_in_single():
    module, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(6, 3)
    halved = {name: tensor.bfloat16() for name, tensor in module.state_dict().items()}
    watch = Watch(trace(module, inputs), module)
    ((_, values),) = watch.run(halved, inputs.bfloat16())
    expected = torch.relu(
        nn.functional.linear(inputs.bfloat16().float(), halved["0.weight"].float(), halved["0.bias"].float())
    )
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected.mT)


class Buffered(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        self.register_buffer("gain", torch.tensor(1.0))

    def forward(self, x):
        return super().forward(x * self.gain)


def test_constants_are_those_of_the_weights():
    module, inputs = Buffered(), torch.randn(6, 3)
    watch = Watch(trace(module, inputs), module)
    ((_, before),) = watch.run(module.state_dict(), 2 * inputs)
    ((_, after),) = watch.run({**module.state_dict(), "gain": torch.tensor(2.0)}, inputs)
    torch.testing.assert_close(after, before)


def test_one_export_for_each_shape_and_nothing_is_changed(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).train()
    spec = trace(module, torch.randn(6, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    exported = []
    export = _watch.export
    monkeypatch.setattr(_watch, "export", lambda *args: exported.append(args) or export(*args))
    watch = Watch(spec, module)
    for items in (6, 6, 4, 6):
        for _, values in watch.run(before, torch.randn(items, 3)):
            assert torch.is_grad_enabled()
            assert values.shape == (4, items)
    assert len(exported) == 2
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
