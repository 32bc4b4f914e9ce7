"""What holds for every network of zoos: descriptions, shapes, specs, populations."""

import json

import pytest
import torch

from weightspace.errors import ConfigError
from weightspace.nets import (
    ACTIVATIONS,
    CNN,
    MLP,
    NETWORKS,
    RNN,
    ResNet,
    architecture_of,
    build,
    evaluate_batch,
    forward_and_statistics,
    statistic_names,
)
from weightspace.spec import verify
from weightspace.zoo import spec_of


def test_a_description_in_json_builds_the_same_network(net, inputs_of):
    architecture = json.loads(json.dumps(architecture_of(net)))
    again = build(architecture).eval()
    assert architecture_of(again) == architecture
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {
        name: tensor.shape for name, tensor in net.state_dict().items()
    }
    again.load_state_dict(net.state_dict())
    assert again(inputs_of(net)).equal(net(inputs_of(net)))
    assert architecture["kind"] in NETWORKS
    assert repr(again) == repr(net)


def test_shapes(net):
    inputs = net.example_inputs(7)
    assert inputs.shape == (7, *net.input_shape)
    assert net(inputs).shape == (7, net.out_features)
    drawn = net.random_inputs(7, torch.Generator().manual_seed(0))
    assert (drawn.shape, drawn.dtype) == (inputs.shape, inputs.dtype)
    assert drawn.equal(net.random_inputs(7, torch.Generator().manual_seed(0)))
    assert net(drawn).std() > 0


def test_the_state_dict_is_parameters_and_statistics(net):
    parameters = dict(net.named_parameters())
    assert {*net.state_dict()} == {*parameters, *statistic_names(net)}


def test_the_spec_holds(net, inputs_of):
    spec = spec_of(net)
    assert list(spec.constants) == []
    assert {*spec.tensors} == {*net.state_dict()}
    statistics = {name for name, tensor in spec.tensors.items() if tensor.kind == "statistic"}
    assert statistics == {*statistic_names(net)}
    report = verify(spec, net, inputs_of(net, 16)).raise_if_wrong()
    assert report.illegal_change > 1e-3


def test_the_spec_is_the_same_in_training(net):
    assert spec_of(net.train()) == spec_of(net.eval())


def test_every_hidden_unit_is_in_a_group(net):
    spec = spec_of(net)
    covered = {
        name: {dim.axis for cell in tensor.cells for dim in cell.dims if dim.group is not None}
        for name, tensor in spec.tensors.items()
    }
    outputs = {name for name in spec.tensors if name.startswith("classifier.")} or {*[*spec.tensors][-2:]}
    hidden = set(spec.tensors) - outputs - {"embed.weight"}
    assert all(0 in covered[name] for name in hidden)
    assert sum(group.size for group in spec.groups.values()) > 0


def test_a_population_is_each_network_by_itself(net, population, inputs_of):
    weights, inputs = population(net), inputs_of(net)
    together = evaluate_batch(net, weights, inputs)
    assert together.shape == (3, 5, net.out_features)
    for place in range(3):
        net.load_state_dict({name: tensor[place] for name, tensor in weights.items()})
        torch.testing.assert_close(together[place], net(inputs), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_a_population_trains_as_each_network_by_itself(net, population, inputs_of):
    """One step of gradient descent on batches of one's own, in training mode; the statistics move too."""
    net = build({**architecture_of(net), "arguments": {**net.arguments(), "dropout": 0.0}}).train()
    weights, names = population(net), statistic_names(net)
    parameters = {name: tensor for name, tensor in weights.items() if name not in names}
    statistics = {name: weights[name] for name in names}
    inputs = torch.stack([inputs_of(net, 6, seed) for seed in range(3)])
    untouched = {name: tensor.clone() for name, tensor in {**weights, **net.state_dict()}.items()}

    def step(parameters, statistics, x):
        def loss(parameters):
            output, moved = forward_and_statistics(net, {**parameters, **statistics}, x)
            return output.square().mean(), moved

        gradients, moved = torch.func.grad(loss, has_aux=True)(parameters)
        return {name: value - 0.1 * gradients[name] for name, value in parameters.items()}, moved

    found, moved = torch.vmap(step)(parameters, statistics, inputs)
    assert {*moved} == {*names}
    assert all(tensor.equal(untouched[name]) for name, tensor in net.state_dict().items())
    for place in range(3):
        net.load_state_dict({name: tensor[place] for name, tensor in weights.items()})
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer.zero_grad()
        net(inputs[place]).square().mean().backward()
        optimizer.step()
        for name, expected in net.state_dict().items():
            torch.testing.assert_close({**found, **moved}[name][place], expected, atol=1e-5, rtol=1e-4)


def test_a_state_dict_survives_in_double(net, inputs_of):
    inputs = inputs_of(net)
    expected = net(inputs)
    wide = inputs.double() if inputs.is_floating_point() else inputs
    torch.testing.assert_close(net.double()(wide).float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_has_a_spec_that_holds(activation, inputs_of):
    for net in (
        MLP((6, 8, 7, 3), activation=activation, w0=2.0),
        CNN((2, 6, 6), (5, 4), 3, activation=activation, w0=2.0),
    ):
        spec = spec_of(net)
        assert [group.activation for group in spec.groups.values()] == [activation] * 2
        verify(spec, net, inputs_of(net, 16)).raise_if_wrong()


def test_unknown_kinds_and_arguments_are_named():
    with pytest.raises(ConfigError, match="expected kind cnn or mlp or resnet or rnn, found 'vgg'"):
        build({"kind": "vgg", "arguments": {}})
    with pytest.raises(ConfigError, match=r"wrong arguments for kind 'cnn': .*'depth'"):
        build({"kind": "cnn", "arguments": {**CNN((1, 8, 8), (3,), 2).arguments(), "depth": 3}})
    with pytest.raises(ConfigError, match=r"expected \{kind: rnn, arguments: \{\.\.\.\}\}, found"):
        build({"kind": "rnn"})


def test_a_foreign_module_has_no_description():
    assert architecture_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((4,)), r"widths: expected at least two positive layer sizes, found \[4\]"),
        (lambda: MLP((4, 2), activation="selu"), "activation: expected one of sine, relu, .*, found 'selu'"),
        (
            lambda: MLP((4, 3, 2), dropout=1.5),
            "dropout: expected a rate of at least 0 and below 1, found 1.5",
        ),
        (
            lambda: MLP((784, 2), input_shape=(1, 28, 27)),
            r"input_shape: expected 784 numbers, the first width, found \[1, 28, 27\]",
        ),
        (
            lambda: ResNet((3, 8), 10),
            r"input_shape: expected channels, height and width, found \(3, 8\)",
        ),
        (lambda: ResNet((3, 8, 8), 0), "out_features: expected a whole number of at least 1, found 0"),
        (lambda: ResNet((3, 8, 8), 2, blocks=()), r"blocks: expected some whole numbers, found \[\]"),
        (
            lambda: ResNet((3, 8, 8), 2, blocks=(1, 0)),
            r"blocks\[1\]: expected a whole number of at least 1, found 0",
        ),
        (lambda: ResNet((3, 8, 8), 2, norm="none"), "norm: expected one of batch, layer, found 'none'"),
        (lambda: ResNet((3, 8, 8), 2, width=0.01), "width: expected at least 0.03125, .*, found 0.01"),
        (
            lambda: ResNet((3, 8, 8), 2, activation="sine"),
            "activation: expected one of relu, .*, found 'sine'",
        ),
        (lambda: RNN(4, 0, 2), "hidden: expected a whole number of at least 1, found 0"),
        (lambda: RNN(4, 3, 2, cell="ugrnn"), "cell: expected one of rnn, gru, lstm, found 'ugrnn'"),
        (lambda: RNN(4, 3, 2, sequence="bytes"), "sequence: expected one of tokens, floats, found 'bytes'"),
        (lambda: RNN(4, 3, 2, length=0), "length: expected a whole number of at least 2, found 0"),
    ],
)
def test_impossible_networks_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# -- perceptrons


def test_implicit_representations_are_described_as_in_older_files():
    assert architecture_of(MLP((2, 32, 32, 1), output_offset=0.5)) == {
        "kind": "mlp",
        "arguments": {"widths": [2, 32, 32, 1], "activation": "sine", "w0": 30.0, "output_offset": 0.5},
    }


def test_a_perceptron_flattens_images(population):
    flat, net = MLP((12, 8, 3), activation="relu"), MLP((12, 8, 3), activation="relu", input_shape=(3, 2, 2))
    net.load_state_dict(flat.state_dict())
    images = torch.randn(5, 3, 2, 2)
    assert net(images).equal(flat(images.flatten(1)))
    assert net.arguments()["input_shape"] == [3, 2, 2]
    assert spec_of(net) == spec_of(flat)


# -- residual networks


def test_resnet_20_has_the_published_size():
    net = ResNet((3, 32, 32), 10, blocks=(3, 3, 3))
    assert sum(tensor.numel() for tensor in net.parameters()) == 272_474
    assert net.stages(net.stem(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 8, 8)


def test_the_parameters_of_a_resnet_by_hand():
    net = ResNet((1, 8, 8), 3, blocks=(1, 1), channels=4, width=0.5)
    convolutions = 1 * 2 * 9 + 2 * 2 * 9 * 2 + 2 * 4 * 9 + 4 * 4 * 9 + 2 * 4
    norms = 2 * (2 * 3 + 4 * 3)
    assert sum(tensor.numel() for tensor in net.parameters()) == convolutions + norms + 4 * 3 + 3
    layered = ResNet((1, 8, 8), 3, blocks=(1, 1), channels=4, width=0.5, norm="layer")
    biases = 2 * 3 + 4 * 3
    assert sum(tensor.numel() for tensor in layered.parameters()) == convolutions + norms + 15 + biases


# -- recurrent networks


@pytest.mark.parametrize(
    ("kind", "reference"), [("rnn", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)]
)
def test_cells_compute_what_those_of_pytorch_do(kind, reference):
    net = RNN(3, 6, 4, cell=kind, sequence="floats", layers=2)
    whole = reference(3, 6, num_layers=2, batch_first=True)
    whole.load_state_dict(
        {
            f"{name.split('.')[2]}_l{name.split('.')[1]}": value
            for name, value in net.state_dict().items()
            if "cells" in name
        }
    )
    x = torch.randn(5, 9, 3)
    torch.testing.assert_close(net(x), net.classifier(whole(x)[0][:, -1]))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_the_spec_of_a_recurrent_network_holds_at_other_lengths(cell):
    net = RNN(5, 6, 4, cell=cell, length=2, layers=2)
    verify(spec_of(net), net, torch.arange(22).view(2, 11) % 5).raise_if_wrong()


def test_recurrent_parameters_by_hand():
    net = RNN(11, 6, 4, cell="lstm", embedding=5)
    assert sum(tensor.numel() for tensor in net.parameters()) == 55 + 4 * (6 * 5 + 6 * 6 + 12) + 28
    assert net.example_inputs().dtype == torch.int64
