"""Activation matching: planted permutations, and every number of it against a slow computation."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from weightspace import WeightSpec
from weightspace.align import activation_matching, align_networks
from weightspace.align._activation_matching import match_units
from weightspace.align._activations import Similarities, similarities
from weightspace.errors import ConfigError, DataError, SpecError, SpecWarning
from weightspace.spec import Cell, Dim, Group, TensorSpec, Watch, trace
from weightspace.testing import networks, random_weights

SPEC = WeightSpec.mlp([5, 12, 9, 3], layers=["0", "2", "4"])


def batches(inputs, size):
    return [(part, torch.zeros(len(part))) for part in inputs.split(size)]


def mlp(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, 3))


class Attention(nn.Module):
    """A transformer block."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class ResNet(nn.Module):
    """Two residual blocks with batch norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.wide, self.short, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(6, 8, 1), nn.Linear(8, 3)
        self.wide_norm = nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        inside = torch.relu(self.norms[0](self.first(x)))
        x = torch.relu(x + self.norms[1](self.second(inside)))
        x = torch.relu(self.short(x) + self.wide_norm(self.wide(x)))
        return self.head(x.mean((-1, -2)))


def built(name):
    """A module and inputs."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    if name == "mlp":
        return mlp(), torch.randn(80, 5, generator=generator)
    if name == "transformer block":
        return Attention().eval(), torch.randn(80, 4, 5, generator=generator)
    if name == "resnet":
        return ResNet().eval(), torch.randn(60, 1, 6, 6, generator=generator)
    module = networks()[name].build()
    shape = networks()[name].inputs()[0].shape[1:]
    return module, torch.randn(60, *shape, generator=generator)


def randomised(spec, module):
    """Weights of the size that the module has, biases and statistics drawn too."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name, tensor in module.state_dict().items():
        if name in spec.tensors:
            noise = torch.randn(tensor.shape, generator=generator)
            found[name] = (
                0.5 + noise.abs() if spec.tensors[name].kind == "statistic" else tensor + 0.2 * noise
            )
    return found


@pytest.mark.parametrize("name", ["mlp", "vgg_flatten", "resnet", "transformer block"])
def test_a_planted_permutation_is_found_under_noise(name):
    module, inputs = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpecWarning)
        spec = trace(module, inputs[:2], verify=False)
    weights = randomised(spec, module)
    generator = torch.Generator().manual_seed(7)
    noisy = {
        name: tensor + 0.03 * (tensor.std() if tensor.numel() > 1 else 0) * torch.randn(tensor.shape, generator=generator)
        if spec.tensors[name].kind == "parameter"
        else tensor
        for name, tensor in weights.items()
    }  # fmt: skip
    element = spec.random_element(symmetries=["permutation"], generator=generator)
    other = spec.act(element, noisy)
    aligned, report = activation_matching(spec, weights, other, module=module, data=batches(inputs, 32))
    for tensor in spec.tensors:
        assert torch.equal(aligned[tensor], noisy[tensor])
    assert int(report.sweeps) == 1
    outputs = [functional_call(module, found, (inputs,)) for found in (aligned, other)]
    change = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
    assert change < 1e-5


def test_correlations_are_pearsons():
    module, inputs, spec = mlp(), torch.randn(50, 5), SPEC
    first, second = random_weights(spec, seed=1), random_weights(spec, seed=2)
    found = similarities(Watch(spec, module), first, second, batches(inputs, 16), "correlation")
    hidden = [
        torch.relu(inputs @ net["0.weight"].T + net["0.bias"]).double().numpy() for net in (first, second)
    ]
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(hidden[0].T, hidden[1].T)[:12, 12:])
    np.testing.assert_allclose(found["hidden0"].even.numpy(), expected, atol=1e-6)
    inner = similarities(Watch(spec, module), first, second, batches(inputs, 16), "inner")
    np.testing.assert_allclose(inner["hidden0"].even.numpy(), hidden[0].T @ hidden[1], rtol=1e-5)


class Stream(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inside, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        stream = self.stem(x)
        return self.head(stream + 10.0 * torch.tanh(self.inside(stream)) + 100.0)


def test_values_of_a_stream_share_one_statistic():
    torch.manual_seed(0)
    module, inputs = Stream(), torch.randn(40, 3)
    spec = trace(module, inputs)
    (stream,) = spec.groups
    assert spec.tensors["inside.weight"].cells[0].dims[0].group == stream
    nets = random_weights(spec, seed=1), random_weights(spec, seed=2)
    found = similarities(Watch(spec, module), *nets, batches(inputs, 7), "correlation")[stream].even

    def values(net):
        first = inputs @ net["stem.weight"].T + net["stem.bias"]
        inside = torch.tanh(first @ net["inside.weight"].T + net["inside.bias"])
        return [first.double(), (first + 10.0 * inside + 100.0).double()]

    centred = [[value - value.mean(0) for value in values(net)] for net in nets]
    covariance = sum(a.T @ b for a, b in zip(*centred, strict=True))
    spread = [sum(value.square().sum(0) for value in side).sqrt() for side in centred]
    torch.testing.assert_close(found, covariance / torch.outer(*spread), atol=1e-5, rtol=1e-5)


def test_batches_of_any_size_give_the_same():
    module, inputs = built("vgg_flatten")
    spec = trace(module, inputs[:2])
    first, second = random_weights(spec, seed=1), random_weights(spec, seed=2)
    watch = Watch(spec, module)
    tables = [similarities(watch, first, second, batches(inputs, size), "correlation") for size in (60, 13)]
    for group in spec.groups:
        torch.testing.assert_close(tables[0][group].even, tables[1][group].even, rtol=0, atol=1e-6)


def test_names_of_modules_do_not_matter():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.zeta, self.alpha, self.middle = nn.Linear(5, 12), nn.Linear(12, 9), nn.Linear(9, 3)

        def forward(self, x):
            return self.middle(torch.relu(self.alpha(torch.relu(self.zeta(x)))))

    inputs = torch.randn(50, 5)
    names = {"0": "zeta", "2": "alpha", "4": "middle"}
    nets = [random_weights(SPEC, seed=seed) for seed in (1, 2)]
    renamed = [{f"{names[name[0]]}{name[1:]}": tensor for name, tensor in net.items()} for net in nets]
    found = []
    for module, (first, second) in ((mlp(), nets), (Named(), renamed)):
        spec = trace(module, inputs, verify=False)
        _, report = activation_matching(spec, first, second, module=module, data=batches(inputs, 25))
        found.append(list(report.element.values()))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_dead_units_are_told_apart_by_what_enters_them():
    module, inputs, spec = mlp(), torch.randn(50, 5), SPEC
    weights = random_weights(spec, seed=1)
    weights["0.bias"][:5] = -1000.0
    other = spec.act(
        spec.random_element(symmetries=["permutation"], generator=torch.Generator().manual_seed(1)), weights
    )
    table = similarities(Watch(spec, module), weights, weights, batches(inputs, 25), "correlation")["hidden0"]
    assert int(table.dead.sum()) == 25
    assert float(table.even[:5, 5:].abs().max()) == 0.0
    assert float(table.even[:5, :5].abs().max()) < 1e-5
    for similarity in ("correlation", "inner"):
        aligned, _ = activation_matching(
            spec, weights, other, module=module, data=batches(inputs, 25), similarity=similarity
        )
        assert torch.equal(aligned["0.weight"], weights["0.weight"])


def test_outer_units_are_worth_the_best_of_what_is_in_them():
    heads, features = Group("heads", 3), Group("features", 2, ("heads",))
    both = TensorSpec((6,), (Cell((Dim(0, 2, 3, "heads"), Dim(0, 1, 2, "features", (0,)))),))
    spec = WeightSpec.build([heads, features], {"both": both})
    generator = torch.Generator().manual_seed(0)
    own, inner = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 6))
    found = {
        name: Similarities(table, None, torch.zeros_like(table, dtype=torch.bool))
        for name, table in (("heads", own), ("features", inner))
    }
    element = match_units(spec, found)

    def worth(outer, inners):
        return sum(
            float(own[i, outer[i]] + sum(inner[2 * i + k, 2 * outer[i] + inners[i][k]] for k in range(2)))
            for i in range(3)
        )

    orders = list(itertools.permutations(range(2)))
    best = max(
        worth(outer, inners)
        for outer in itertools.permutations(range(3))
        for inners in itertools.product(orders, repeat=3)
    )
    assert worth(element["heads"].tolist(), element["features"].tolist()) == pytest.approx(best)


def test_signs_are_found_where_activations_are_odd():
    module, inputs = mlp(nn.Tanh), torch.randn(60, 5)
    spec = WeightSpec.mlp([5, 12, 9, 3], "tanh", layers=["0", "2", "4"])
    weights = random_weights(spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    element = spec.random_element(symmetries=["permutation", "sign"], generator=generator)
    other = spec.act(element, weights)
    data = batches(inputs, 30)
    plain, _ = activation_matching(spec, weights, other, module=module, data=data)
    aligned, report = activation_matching(spec, weights, other, module=module, data=data, signs=True)
    assert all(torch.equal(aligned[name], weights[name]) for name in weights)
    assert {"hidden0", "sign(hidden0)"} <= set(report.element)
    assert not torch.equal(plain["0.weight"], weights["0.weight"])
    rectified = mlp()
    assert set(
        activation_matching(SPEC, weights, weights, module=rectified, data=data, signs=True)[1].element
    ) == {
        "hidden0",
        "hidden1",
    }


def test_groups_that_no_value_shows_are_matched_by_weights():
    case = networks()["rnn_relu"]
    module, inputs = case.build(), case.inputs()
    spec = trace(module, inputs, verify=False)
    weights = random_weights(spec, seed=1)
    element = spec.random_element(symmetries=["permutation"], generator=torch.Generator().manual_seed(1))
    data = [(torch.randn(50, *inputs[0].shape[1:]), torch.zeros(50))]
    aligned, _ = activation_matching(spec, weights, spec.act(element, weights), module=module, data=data)
    assert all(torch.equal(aligned[name], weights[name]) for name in weights)


def test_it_is_registered_with_its_options():
    module, inputs, spec = mlp(), torch.randn(40, 5), SPEC
    weights = random_weights(spec, seed=1)
    other = spec.act(spec.random_element(symmetries=["permutation"]), weights)
    (_, aligned), report = align_networks(
        spec,
        [weights, other],
        "activation-matching",
        module=module,
        data=batches(inputs, 20),
        similarity="inner",
        signs="false",
    )
    assert report.method == "activation-matching"
    assert torch.equal(aligned["0.weight"], weights["0.weight"])


def test_bad_input_is_refused_in_one_sentence():
    module, inputs, spec = mlp(), torch.randn(40, 5), SPEC
    weights, data = random_weights(spec, seed=1), batches(inputs, 20)

    def match(first=weights, second=weights, data=data, spec=spec, **options):
        return activation_matching(spec, first, second, module=module, data=data, **options)

    with pytest.raises(ConfigError, match="activation-matching: similarity"):
        align_networks(
            spec, [weights, weights], "activation-matching", module=module, data=data, similarity="cosine"
        )
    with pytest.raises(DataError, match=r"data: the module cannot be called with float32\[4, 6\]"):
        match(data=batches(torch.randn(4, 6), 4))
    with pytest.raises(SpecError, match=r"weights: expected finite values, found others in tensor '2.bias'"):
        match(second={**weights, "2.bias": torch.full((9,), torch.nan)})
    with pytest.raises(SpecError, match=r"reference: parameter '4.bias' is missing"):
        match(first={name: tensor for name, tensor in weights.items() if name != "4.bias"})
    with pytest.raises(SpecError, match=r"weights: expected one network, found batch shape \[2\]"):
        match(second=random_weights(spec, (2,)))
    with pytest.raises(DataError, match="data: expected finite values of the units of 'hidden0'"):
        match(data=batches(torch.full((4, 5), torch.nan), 4))
    other = WeightSpec.mlp([5, 12, 9, 3], layers=["a", "b", "c"])
    with pytest.raises(
        SpecError,
        match=r"module: expected a tensor 'a\.weight' of shape \[12, 5\]",
    ):
        match(random_weights(other), random_weights(other), spec=other)


def test_half_precision_is_matched_in_single():
    inputs, weights = torch.randn(40, 5), random_weights(SPEC, seed=1)
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    other = SPEC.act(SPEC.random_element(symmetries=["permutation"]), halved)
    for module in (mlp(), mlp().bfloat16()):
        aligned, _ = activation_matching(SPEC, halved, other, module=module, data=batches(inputs, 20))
        assert all(torch.equal(aligned[name], halved[name]) for name in halved)
