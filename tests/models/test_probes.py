"""Probes, free and generated: through coordinate networks and classifiers of images."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weightspace.errors import ConfigError, SpecError
from weightspace.models import (
    GeneratedProbes,
    Probe,
    ProbedGraphNetwork,
    ProbeFeatures,
    model_config,
    unit_activations,
)
from weightspace.nets import MLP
from weightspace.spec import WeightSpec
from weightspace.testing import assert_equivariant, assert_invariant, mixed_spec, networks, random_weights
from weightspace.zoo import spec_of


def siren():
    return MLP((2, 6, 5, 2), w0=2.0, output_offset=0.5)


def classifier():
    """Images of 2 x 9 x 8 to three classes: convolutions, a norm with statistics, a flattened image."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 7),
        nn.GELU(),
        nn.Linear(7, 3),
    ).eval()


IMAGE = (2, 9, 8)
CLASSIFIER = classifier()
CLASSIFIER_SPEC = WeightSpec.trace(CLASSIFIER, torch.zeros(2, *IMAGE))
CASES = {
    "coordinates": (siren(), spec_of(siren()), (2,)),
    "images": (CLASSIFIER, CLASSIFIER_SPEC, IMAGE),
}


def positive_variances(spec, weights):
    """Weights with running variances that can be ones."""
    return {
        name: tensor.abs() + 0.1 if name.endswith("running_var") else tensor
        for name, tensor in weights.items()
    }


def batch_of(spec, size=6, seed=0, dtype=torch.float32):
    return positive_variances(spec, random_weights(spec, (size,), seed, dtype))


def affine(probes):
    """Biases that are not zero, as after training."""
    for layer in probes.generator:
        nn.init.normal_(layer.bias)
    return probes


# -- generated probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 11), (1, 9, 8), (2, 4, 5, 3)])
@pytest.mark.parametrize("layers", [None, 1, 2, 3])
def test_generated_probes_are_affine_in_their_codes(shape, layers):
    torch.manual_seed(0)
    probes = GeneratedProbes(shape, 40, latent=6, layers=layers, width=4)
    assert probes().shape == (40, *shape)
    assert probes().square().mean().sqrt().item() == pytest.approx(3**-0.5, rel=1e-4)
    affine(probes.double())
    a, b = torch.randn(2, 5, 6, dtype=torch.float64)
    between = probes.generate(0.3 * a + 0.7 * b)
    torch.testing.assert_close(between, 0.3 * probes.generate(a) + 0.7 * probes.generate(b))
    assert (probes.generate(a) - probes.generate(b)).abs().max() > 1e-2
    assert len(probes.generator) == (layers or (2 if len(shape) == 1 else 5))


def test_bound_probes_stay_within_one():
    torch.manual_seed(0)
    images = GeneratedProbes((1, 8, 8), 30, bound=True)
    images.codes.data.mul_(100)
    assert 0.99 < images().abs().max() <= 1
    coordinates = GeneratedProbes((2,), 30, bound=True)
    coordinates.codes.data.mul_(100)
    assert coordinates().abs().max() > 10, "coordinates are never bound"


# -- the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["none", "linear"])
@pytest.mark.parametrize("name", CASES)
def test_probes_see_the_function_alone(name, generator):
    network, spec, shape = CASES[name]
    torch.manual_seed(0)
    model = Probe(network, 3, input_shape=shape, probes=5, generator=generator, hidden=(16,))
    for seed in range(3):
        model(batch_of(spec, 16, seed))
    model.eval()
    assert_invariant(
        lambda weights: model.to(next(iter(weights.values())).dtype)(positive_variances(spec, weights)),
        spec,
        symmetries=("permutation", "sign", "phase"),
        tolerance={torch.float64: 1e-10},
    )


@pytest.mark.parametrize("name", CASES)
def test_a_batch_answers_as_each_network_alone(name):
    network, spec, shape = CASES[name]
    options = {"input_shape": shape, "probes": 4, "generator": "linear", "norm": "none", "dropout": 0.0}
    model = Probe(network, 3, hidden=(8,), **options)
    weights = batch_of(spec)
    network = siren() if name == "coordinates" else classifier()
    for row, found in enumerate(model(weights)):
        network.load_state_dict({k: tensor[row] for k, tensor in weights.items()}, strict=False)
        alone = model.read(network(model.probes).flatten()[None])[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_trained_and_no_network_is(name):
    network, spec, shape = CASES[name]
    torch.manual_seed(0)
    model = Probe(network, 3, input_shape=shape, probes=5, generator="linear", latent=4, hidden=(16,))
    model(batch_of(spec)).square().sum().backward()
    # BatchNorm of the answers takes their mean away, and BatchNorm behind a linear layer its bias
    idle = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert idle == []
    assert all(p.grad is None for p in network.parameters())
    assert not any("network" in k for k in model.state_dict())


def test_generated_probes_learn_labels_by_heart():
    spec = spec_of(siren())
    weights = batch_of(spec, 20)
    labels = torch.randint(4, (20,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Probe(siren(), 4, probes=16, generator="linear", latent=8, hidden=(64,))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.probes.detach().clone()
    for _ in range(120):
        optimiser.zero_grad()
        loss = cross_entropy(model(weights), labels)
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.05
    assert (model.probes - before).abs().max() > 0.05, "the probes have moved"


def test_the_preset_is_what_was_published():
    net = MLP((2, 5, 1))
    model = model_config("probe", {"preset": "paper"}).build(
        spec_of(net), {"kind": "mlp", "arguments": net.arguments()}, 10
    )
    assert model.probes.shape == (128, 2)
    assert model.source.codes.shape == (128, 32)
    assert [(layer.in_features, layer.out_features) for layer in model.source.generator] == [
        (32, 32),
        (32, 2),
    ]
    linear = [layer for layer in model.read if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [256] * 5 + [10]
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in model.read)


def test_the_preset_binds_images():
    """As in the authors' code; coordinates never are."""
    options = {"preset": "paper", "input_shape": (2,)}
    assert model_config("probe", options).bound
    assert GeneratedProbes((3, 8, 8), 2, bound=True).bound
    assert not GeneratedProbes((2,), 2, bound=True).bound


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["numbers", "units", "some units"])
def test_networks_are_complete_or_refused(name, kind):
    """What is missing would be that of the network that lends its computation."""
    network, spec, shape = CASES[name]
    if kind == "numbers":
        model = Probe(network, 3, input_shape=shape, probes=2).eval()
    else:
        model = ProbeFeatures(network, spec, input_shape=shape, probes=2, partial=kind == "some units")
    weights = batch_of(spec)
    model(weights)
    for missing in weights:
        with pytest.raises(
            SpecError, match=f"weights: '{missing}' is missing, which the network that is run"
        ):
            model({key: w for key, w in weights.items() if key != missing})
    with pytest.raises(SpecError, match="weights: the network that is run has no tensor 'other'"):
        model({**weights, "other": torch.zeros(6)})
    first = next(iter(weights))
    for wrong in (weights[first][..., :1], weights[first][0], weights[first][None]):
        with pytest.raises(SpecError, match=rf"expected '{first}' of shape \(batch, .*, found "):
            model({**weights, first: wrong})
    with pytest.raises(SpecError, match="expected the same number of networks in every tensor"):
        model({**weights, first: weights[first][:2]})


def test_tied_tensors_have_two_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x).tanh())

    model = Probe(Tied(), 2, input_shape=(3,), probes=2).eval()
    weights = {
        "up.weight": torch.randn(4, 3, 3),
        "up.bias": torch.randn(4, 3),
        "down.bias": torch.randn(4, 3),
    }
    other = {("down.weight" if name == "up.weight" else name): w for name, w in weights.items()}
    torch.testing.assert_close(model(weights), model(other))


def test_modules_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(input=self.first(x).tanh())

    network = Keyword()
    spec = WeightSpec.trace(network, torch.zeros(2, 3), verify=False)
    weights, probes = batch_of(spec), torch.randn(5, 3)
    (found,) = unit_activations(network, spec, weights, probes).values()
    z = torch.einsum("nij,pj->nip", weights["first.weight"], probes) + weights["first.bias"][..., None]
    torch.testing.assert_close(found, z.tanh())


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="generator: expected one of none, linear, found 'deep'"):
        Probe(siren(), 3, generator="deep")
    with pytest.raises(ConfigError, match="norm: expected batch or none, found 'layer'"):
        Probe(siren(), 3, norm="layer")
    with pytest.raises(ConfigError, match=r"inputs of shape \(4, 3\): .*missing 1 required positional"):
        Probe(nn.Bilinear(3, 3, 2), 3, input_shape=(4, 3))
    with pytest.raises(ConfigError, match="hidden units of at least 1, found 3 and -1"):
        Probe(siren(), 3, hidden=(-1,))
    with pytest.raises(ConfigError, match=r"probes: expected at least one, .*, found 0 of shape \(2,\)"):
        Probe(siren(), 3, probes=0)
    with pytest.raises(
        ConfigError, match="generator: expected probes, latent, layers and width of at least 1"
    ):
        Probe(siren(), 3, generator="linear", latent=0)
    with pytest.raises(ConfigError, match="input_shape: a Sequential does not show the shape of its inputs"):
        Probe(CLASSIFIER, 3)
    with pytest.raises(
        ConfigError, match=r"the network cannot be run in a batch on inputs of shape \(3,\): "
    ):
        Probe(siren(), 3, input_shape=(3,))
    with pytest.raises(ConfigError, match=r"in a batch on inputs of shape \(7, 4\): .*gru"):
        Probe(networks()["gru"].build(), 3, input_shape=(7, 4))
    with pytest.raises(
        ConfigError, match=r"model\.generator: input should be 'none' or 'linear', found 'gan'"
    ):
        model_config("probe", {"generator": "gan"})


# -- activations of units ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["sine", "tanh", "relu", "gaussian"])
def test_activations_by_hand(activation):
    net = MLP((3, 4, 2), activation=activation, w0=1.5)
    spec = spec_of(net)
    weights, probes = batch_of(spec), torch.randn(7, 3)
    z = net.w0 * (
        torch.einsum("nij,pj->nip", weights["layers.0.weight"], probes) + weights["layers.0.bias"][..., None]
    )
    functions = {
        "sine": torch.sin,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "gaussian": lambda x: (-x * x).exp(),
    }
    found = unit_activations(net, spec, weights, probes)
    assert list(found) == ["hidden0"]
    torch.testing.assert_close(found["hidden0"], functions[activation](z))


@pytest.mark.parametrize("name", CASES)
def test_features_move_with_their_units(name):
    network, spec, shape = CASES[name]
    torch.manual_seed(0)
    features = ProbeFeatures(network, spec, input_shape=shape, probes=5, generator="linear", latent=4)
    features = features.double()
    weights = batch_of(spec, dtype=torch.float64)
    element = spec.random_element(
        (6,), symmetries=["permutation"], generator=torch.Generator().manual_seed(1)
    )
    before, after = features(weights), features(spec.act(element, weights))
    assert list(before) == list(spec.groups)
    for group, found in before.items():
        assert found.shape == (6, spec.groups[group].size, 5)
        assert found.std(1).max() > 1e-3
        order = element[group][..., None].expand_as(found)
        torch.testing.assert_close(after[group], found.gather(1, order))


@pytest.mark.parametrize("activation", ["sine", "tanh", "relu", "gaussian"])
def test_scalings_multiply_features_by_what_divides_their_readers(activation):
    net = MLP((2, 4, 3, 1), activation=activation, w0=2.0)
    spec = spec_of(net)
    weights, probes = batch_of(spec, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    before = unit_activations(net, spec, weights, probes)
    for name, scaling in spec.scalings.items():
        drawn = spec.random_element(
            (6,), symmetries=[scaling.kind], generator=torch.Generator().manual_seed(2)
        )
        after = unit_activations(net, spec, spec.act({name: drawn[name]}, weights), probes)
        reader = f"layers.{1 + int(scaling.group.removeprefix('hidden'))}.weight"
        power = sum(place.power for place in scaling.exponents if place.tensor == reader)
        step = (-1.0) ** drawn[name] if scaling.kind == "phase" else drawn[name]
        factor = step.double() ** -power
        torch.testing.assert_close(
            after[scaling.group], factor[..., None] * before[scaling.group], rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(
    ("name", "unread"),
    [
        ("lenet", {}),
        ("unet", {}),
        ("norm_free_residual", {}),
        ("tied_autoencoder", {"hidden1": "no linear layer or convolution takes its units as input"}),
        ("conv1d", {f"features{at}": "it is nested within blocks0" for at in range(3)}),
    ],
)
def test_activations_of_networks_that_nobody_prepared(name, unread):
    """What is read moves as the spec says; what is not is refused by name."""
    case = networks()[name]
    module = case.build().eval()
    spec = WeightSpec.trace(module, case.inputs(), verify=False)
    (probes,) = case.inputs()
    weights = batch_of(spec, 2)
    for group, reason in unread.items():
        with pytest.raises(SpecError, match=f"group '{group}': its activations cannot be read: {reason}"):
            unit_activations(module, spec, weights, probes, groups=[group])
    read = [group for group in spec.groups if group not in unread]
    element = spec.random_element(
        (2,), symmetries=["permutation"], generator=torch.Generator().manual_seed(1)
    )
    before = unit_activations(module, spec, weights, probes, groups=read)
    after = unit_activations(module, spec, spec.act(element, weights), probes, groups=read)
    for group, found in before.items():
        assert found.std(1).max() > 1e-3
        order = element[group][..., None].expand_as(found)
        torch.testing.assert_close(after[group], found.gather(1, order), rtol=1e-3, atol=1e-4)


def test_gradients_reach_probes_and_weights():
    net = siren()
    spec = spec_of(net)
    features = ProbeFeatures(net, spec, probes=3)
    weights = {k: tensor.requires_grad_() for k, tensor in batch_of(spec).items()}
    features(weights)["hidden1"].square().sum().backward()
    assert features.source.values.grad.abs().min() > 0
    assert weights["layers.1.weight"].grad.abs().max() > 0
    assert weights["layers.2.weight"].grad is None, "it reads them, and is no part of them"


def test_what_cannot_be_read_is_named():
    net = siren()
    spec = spec_of(net)
    weights = batch_of(spec)
    with pytest.raises(SpecError, match="groups: expected some of hidden0, hidden1, found 'hidden2'"):
        unit_activations(net, spec, weights, torch.zeros(3, 2), groups=["hidden2"])
    with pytest.raises(
        SpecError, match="'features': its activations cannot be read: it is nested within heads"
    ):
        unit_activations(net, mixed_spec(), weights, torch.zeros(3, 2), groups=["features"])
    message = (
        "group 'hidden0': its activations cannot be read: no linear layer or convolution takes its units"
    )
    with pytest.raises(SpecError, match=re.escape(message)):
        ProbeFeatures(nn.Sequential(nn.Linear(2, 3)), spec)
    assert not any(module._forward_pre_hooks for module in net.modules()), "no hook is left behind"


# -- on the nodes of graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"style": "gmn", "generator": "linear"}])
@pytest.mark.parametrize("name", CASES)
def test_graphs_with_activations_on_their_nodes(name, options):
    """Invariant, equivariant without a head, and unlike the same graph without them."""
    network, spec, shape = CASES[name]
    torch.manual_seed(0)
    for out_features, check in ((3, assert_invariant), (None, assert_equivariant)):
        model = ProbedGraphNetwork(
            network, spec, out_features, probes=5, input_shape=shape, hidden=4, layers=2, **options
        )

        def read(weights, model=model):
            weights = positive_variances(spec, weights)
            return model.to(next(iter(weights.values())).dtype)(weights, raw=weights)

        check(read, spec, symmetries=["permutation"], tolerance={torch.float64: 1e-9})
    weights = batch_of(spec)
    found = read(weights)
    found["0.weight" if name == "images" else "layers.0.weight"].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().any() for p in model.float().probe.parameters())


def test_nodes_hold_what_units_answer():
    """Hidden, input and output nodes, by hand."""
    network, spec, _ = CASES["coordinates"]
    model = ProbedGraphNetwork(network, spec, 3, probes=5, hidden=4, layers=1)
    weights = batch_of(spec, 2)
    units, answers = model.probe.with_answers(weights)
    inputs, outputs = model.probe.probes.mT, answers.mT
    assert torch.equal(units["hidden0"], ProbeFeatures.forward(model.probe, weights)["hidden0"])
    network = siren()
    network.load_state_dict({name: tensor[1] for name, tensor in weights.items()})
    torch.testing.assert_close(outputs[1], network(model.probe.probes).mT)
    seen = {}
    model.graph.register_forward_pre_hook(
        lambda _, args, named: seen.update(named["node_inputs"]), with_kwargs=True
    )
    model(weights, raw=weights)
    assert list(seen) == ["hidden0", "hidden1", "end0", "end1"]
    assert torch.equal(seen["end0"][0], inputs)
    assert torch.equal(seen["end1"], outputs)


def test_units_within_heads_have_none():
    case = networks()["transformer_encoder"]
    network, inputs = case.build(), case.inputs()[0]
    spec = WeightSpec.trace(network, inputs, verify=False)
    shape = tuple(inputs.shape[1:])
    model = ProbedGraphNetwork(network, spec, 3, probes=3, input_shape=shape, hidden=4, layers=1)
    nested = {name for name, group in spec.groups.items() if group.within}
    assert nested
    weights = batch_of(spec, 2)
    read = set(model.probe(weights))
    assert read
    assert not nested & read
    assert model(weights, raw=weights).isfinite().all()


def test_the_head_reads_what_the_networks_answer():
    """By itself, and not only by way of the output nodes."""
    network, spec, _ = CASES["coordinates"]
    torch.manual_seed(0)
    model = ProbedGraphNetwork(network, spec, 3, probes=5, hidden=4, layers=1)
    weights = batch_of(spec)
    model(weights, raw=weights).square().sum().backward()
    linear = model.answers[1]
    assert linear.weight.grad.abs().max() > 1e-6
