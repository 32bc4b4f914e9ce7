"""What is estimated from data: Fisher information and the Gram matrices of inputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from weightspace import merge
from weightspace.errors import ConfigError, DataError, SpecError
from weightspace.merge import fisher_information, input_grams
from weightspace.merge._fisher_information import _sampled
from weightspace.testing import networks as cases


def data_of(shape, classes=3, batches=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator))
        for _ in range(batches)
    ]


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


# -- Fisher information ------------------------------------------------------------------------------------


def looped(module, data, targets_of):
    """One sample after another, by the ordinary backward pass."""
    total = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    count = 0
    for inputs, targets in data:
        chosen = targets_of(module, inputs, targets)
        for row in range(len(inputs)):
            module.zero_grad()
            F.cross_entropy(module(inputs[row : row + 1]), chosen[row : row + 1]).backward()
            for name, parameter in module.named_parameters():
                total[name] += parameter.grad**2
            count += 1
    return {name: tensor / count for name, tensor in total.items()}


def test_the_empirical_fisher_is_that_of_a_loop_over_samples():
    module, data = small().eval(), data_of((7, 4))
    found = fisher_information(module, module.state_dict(), data, labels="given", chunk=3)
    expected = looped(module, data, lambda module, inputs, targets: targets)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-7), name


def test_sampled_labels_give_the_fisher_information_of_a_loop_over_all_labels():
    """In expectation: 3,000 copies of each input, against the sum over labels weighted by their probability."""
    torch.manual_seed(0)
    module, inputs = nn.Linear(2, 3, bias=False), torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    expected = torch.zeros(3, 2)
    for x in inputs:
        probabilities = module(x).softmax(0).detach()
        for label in range(3):
            residual = probabilities - F.one_hot(torch.tensor(label), 3)
            expected += probabilities[label] * torch.outer(residual, x) ** 2 / len(inputs)
    data = [(inputs.repeat(3000, 1), torch.zeros(6000, dtype=torch.long))]
    found = fisher_information(module, module.state_dict(), data, chunk=1000)["weight"]
    assert torch.allclose(found, expected, rtol=0.06)


def test_labels_follow_the_networks_own_softmax_and_the_seed():
    module, inputs = nn.Linear(1, 3, bias=False), torch.ones(20_000, 1)
    probabilities = torch.tensor([0.7, 0.1, 0.2])
    weights = {"weight": probabilities.log()[:, None]}
    draws = [_sampled(module, weights, (inputs,), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.allclose(draws[0].bincount(minlength=3) / 20_000, probabilities, atol=0.02)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_data_in_other_batches_and_chunks_give_the_same():
    module, data = small(), data_of((8, 4), batches=1)
    halves = [
        (inputs, targets) for inputs, targets in zip(data[0][0].split(3), data[0][1].split(3), strict=True)
    ]
    found = fisher_information(module, module.state_dict(), data)
    other = fisher_information(module, module.state_dict(), halves, chunk=2)
    assert all(torch.allclose(found[name], other[name], rtol=1e-4, atol=1e-8) for name in found)


def test_a_network_sure_of_its_answers_has_no_information_and_the_empirical_one_of_wrong_labels_has():
    module = nn.Linear(1, 2, bias=False)
    weights, data = {"weight": torch.tensor([[50.0], [-50.0]])}, [(torch.ones(4, 1), torch.ones(4).long())]
    assert fisher_information(module, weights, data)["weight"].tolist() == [[0.0], [0.0]]
    empirical = fisher_information(module, weights, data, labels="given")["weight"]
    assert empirical.flatten().tolist() == pytest.approx([1.0, 1.0])


def test_positions_of_a_sequence_are_one_joint_answer():
    """The squared gradient of a sum, which is not the sum of squares."""
    module = nn.Linear(1, 2, bias=False)
    data = [(torch.tensor([[[1.0], [1.0]]]), torch.tensor([[0, 0]]))]  # p = 1/2 at both positions
    weights = {"weight": torch.zeros(2, 1)}
    values = {
        fisher_information(module, weights, data, seed=seed)["weight"][0, 0].item() for seed in range(12)
    }
    assert values == {0.0, 1.0}, "labels that agree: (1/2 + 1/2)^2; labels that do not: 0"


class Unbatchable(nn.Module):
    """Its path depends on a value, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-x)


def test_modules_that_cannot_be_batched_are_run_sample_by_sample():
    torch.manual_seed(0)
    module, data = Unbatchable(), data_of((5, 2))
    found = fisher_information(module, module.state_dict(), data, labels="given")
    single = [(inputs[row : row + 1], targets[row : row + 1]) for inputs, targets in data for row in range(5)]
    expected = looped(module, single, lambda module, inputs, targets: targets)
    assert all(torch.allclose(found[name], tensor, atol=1e-7) for name, tensor in expected.items())


def test_tied_weights_count_both_their_uses():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    data = data_of((6, 3))
    found = fisher_information(module, module.state_dict(), data, labels="given")
    assert list(found) == ["0.weight"]
    expected = looped(module, data, lambda module, inputs, targets: targets)
    assert torch.allclose(found["0.weight"], expected["0.weight"])
    other = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    other["1.weight"] = other["0.weight"]
    merge.fisher([module.state_dict(), other], statistics=[found, found])


def test_the_callers_module_stays_as_it_is():
    module = small()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for estimate in (fisher_information, input_grams):
        estimate(module, {name: tensor + 1 for name, tensor in before.items()}, data_of((4, 4)))
    assert module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


class Scalars(nn.Linear):
    """One number per sample."""

    def forward(self, x):
        return super().forward(x).sum(-1)


def test_data_and_options_that_do_not_suit_are_refused():
    module = small()
    weights = module.state_dict()
    for estimate in (fisher_information, input_grams):
        with pytest.raises(DataError, match=r"data: the module cannot be called with float32\[2, 3\]"):
            estimate(module, weights, data_of((2, 3)))
        with pytest.raises(DataError, match="data: expected at least one batch, found none"):
            estimate(module, weights, [])
    with pytest.raises(DataError, match="labels can be sampled from logits of shape"):
        fisher_information(Scalars(3, 2), Scalars(3, 2).state_dict(), data_of((2, 3)))
    with pytest.raises(
        DataError, match="labels can be sampled from logits of at least two classes, found one"
    ):
        fisher_information(nn.Linear(3, 1), nn.Linear(3, 1).state_dict(), data_of((2, 3)))
    with pytest.raises(ConfigError, match="labels: expected one of sampled, given, found 'empirical'"):
        fisher_information.__wrapped__(module, weights, data_of((2, 4)), labels="empirical")
    for estimate in (fisher_information, input_grams):
        with pytest.raises(SpecError, match=r"network: 'module\.0\.weight' is no tensor of the module"):
            estimate(module, {f"module.{name}": tensor for name, tensor in weights.items()}, data_of((2, 4)))
        with pytest.raises(SpecError, match=r"network: parameter '0\.bias' of the module is missing"):
            estimate(module, {n: t for n, t in weights.items() if n != "0.bias"}, data_of((2, 4)))
    with pytest.raises(ConfigError, match="chunk: expected at least 1, found 0"):
        fisher_information(module, weights, data_of((2, 4)), chunk=0)


# -- Gram matrices -----------------------------------------------------------------------------------------


def answers_by_grams(layer, found):
    """``sum ||W x||^2`` over all rows is what the Gram matrix says."""
    rows = layer.weight.detach().flatten(1).double()
    return (rows @ found @ rows.T).trace()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 3, bias=False), (5, 4)),
        (nn.Linear(4, 3, bias=False), (5, 2, 4)),
        (nn.Conv1d(2, 3, 3, bias=False, padding=1, dilation=2), (5, 2, 9)),
        (nn.Conv2d(2, 3, (3, 2), bias=False, stride=2, padding=(1, 0)), (5, 2, 6, 7)),
        (nn.Conv2d(2, 3, (2, 4), bias=False, padding="same"), (5, 2, 6, 7)),
        (nn.Conv2d(2, 3, 3, bias=False, padding=2, padding_mode="circular"), (5, 2, 6, 7)),
        (nn.Conv2d(2, 3, 3, bias=False, padding="valid"), (5, 2, 6, 7)),
    ],
)
def test_gram_matrices_give_the_size_of_what_layers_answer(layer, shape):
    data = data_of(shape)
    found = input_grams(layer, layer.state_dict(), data)["weight"]
    expected = sum(layer(inputs).double().square().sum() for inputs, _ in data)
    assert torch.allclose(answers_by_grams(layer, found), expected, rtol=1e-5)
    assert found.dtype == torch.float64


def test_regmean_of_a_convolution_minimises_the_differences_of_outputs():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 2, bias=False).double() for _ in range(2)]
    data = [[(torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.zeros(4))] for _ in layers]
    grams = [input_grams(layer, layer.state_dict(), given) for layer, given in zip(layers, data, strict=True)]
    merged = merge.regmean([layer.state_dict() for layer in layers], statistics=grams, alpha=1.0)["weight"]

    def difference(weight):
        pairs = zip(layers, data, strict=True)
        return sum(
            (F.conv2d(given[0][0], weight) - layer(given[0][0])).square().sum() for layer, given in pairs
        )

    gradient = torch.func.grad(difference)(merged)
    assert gradient.abs().max() < 1e-6
    assert difference(merged) < difference(sum(layer.weight for layer in layers) / 2)


# -- whole networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lenet", "vit", "tied_autoencoder"])
def test_whole_networks_have_statistics_and_merge_with_themselves(name):
    """Convolutions, attention, tied weights: what is merged computes what the network computed."""
    case = cases()[name]
    module = case.build()
    (inputs,) = case.inputs()
    data = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
    weights = module.state_dict()
    information, grams = (estimate(module, weights, data) for estimate in (fisher_information, input_grams))
    assert set(information) == {name for name, _ in module.named_parameters()}
    layers = {
        f"{path}.weight" for path, layer in module.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)
    } & set(information)
    assert set(grams) == layers
    for method, statistics in (("fisher", information), ("regmean", grams)):
        merged = merge.merge_networks(method, [weights, weights], statistics=[statistics, statistics])
        answer = torch.func.functional_call(module, merged, (inputs,))
        assert torch.allclose(answer, module(inputs), atol=1e-5)


def test_merging_by_answers_beats_the_plain_average():
    """Networks fitted to different halves of the inputs: what each half's network answers there is kept better."""
    generator = torch.Generator().manual_seed(0)
    halves = [
        torch.randn(200, 4, generator=generator) * scale
        for scale in (torch.tensor([3.0, 3.0, 0.1, 0.1]), torch.tensor([0.1, 0.1, 3.0, 3.0]))
    ]
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=False) for _ in halves]
    networks = [layer.state_dict() for layer in layers]
    data = [[(half, torch.zeros(200, dtype=torch.long))] for half in halves]

    def difference(merged):
        pairs = zip(layers, halves, strict=True)
        return sum((half @ merged["weight"].T - layer(half)).square().sum().item() for layer, half in pairs)

    plain = difference(merge.average(networks))
    for method, estimate in (("fisher", fisher_information), ("regmean", input_grams)):
        found = [estimate(layer, n, d) for layer, n, d in zip(layers, networks, data, strict=True)]
        assert difference(merge.merge_networks(method, networks, statistics=found)) < 0.5 * plain


@pytest.mark.parametrize("inputs", [torch.float16, torch.float32])
def test_networks_of_half_precision_are_run_in_float32(inputs):
    module, data = small(), data_of((8, 4))
    half = {n: t.half() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    wide = {n: t.float() if t.is_floating_point() else t for n, t in half.items()}
    cast = [(x.half().to(inputs), y) for x, y in data]
    same = [(x.half().float(), y) for x, y in data]
    for estimate in (fisher_information, input_grams):
        found, expected = estimate(module, half, cast), estimate(module, wide, same)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class Named(nn.Module):
    """Two inputs, and a layer that is given its own by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.layer(input=x + y)


def test_several_inputs_from_a_data_loader_and_layers_that_are_called_by_name():
    """A DataLoader makes lists of tuples."""
    torch.manual_seed(0)
    module, ((x, targets),) = Named(), data_of((6, 4), batches=1)
    loader = DataLoader([((row, row), target) for row, target in zip(x, targets, strict=True)], batch_size=4)
    weights = module.state_dict()
    gram = input_grams(module, weights, loader)["layer.weight"]
    assert torch.allclose(gram, (2 * x).double().T @ (2 * x).double())
    found = fisher_information(module, weights, loader, labels="given")
    expected = fisher_information(module, weights, [((x, x), targets)], labels="given")
    assert all(torch.allclose(found[name], expected[name]) for name in expected)
