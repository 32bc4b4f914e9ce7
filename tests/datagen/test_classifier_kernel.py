"""The compiled classifiers against PyTorch, one network at a time, and their promises about neighbours and NaN."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from weightspace.datagen._classifier_kernel import ClassifierKernel
from weightspace.errors import ConfigError, DataError
from weightspace.nets import (
    ACTIVATIONS,
    CNN,
    MLP,
    PRESETS,
    RNN,
    Network,
    ResNet,
    build,
    dropout_state,
    random_keys,
)

ITEMS = 150
NETS = [
    build(PRESETS["small-cnn-zoo"]),
    CNN((3, 11, 9), (7, 12), 5, stride=(1, 2), activation=("tanh", "relu"), residual=True, norm="layer"),
    MLP((20, 16, 9, 4), activation="silu"),
]


def initial_weights(net: Network, networks: int, seed: int = 0) -> np.ndarray:
    """Of a scale that keeps activations alive in every layer, biases and norms included."""
    rng = np.random.default_rng(seed)
    parts = []
    for tensor in net.state_dict().values():
        scale = 1.4 / np.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.5
        parts.append(rng.normal(0, scale, (networks, tensor.numel())))
    return np.concatenate(parts, 1).astype(np.float32)


def problem(
    net: Network, networks: int, batch: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weights, inputs, and each network's own rows and labels."""
    rng = np.random.default_rng(seed + 1)
    inputs = rng.normal(size=(ITEMS, *net.input_shape)).astype(np.float32)
    rows = rng.integers(0, ITEMS, (networks, batch))
    return initial_weights(net, networks, seed), inputs, rows, rng.integers(0, net.out_features, rows.shape)


def dropout(networks: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys, and rates from none at all to a half."""
    keys = random_keys(7, torch.arange(networks) + 2**33, step=11).numpy()
    return keys, np.linspace(0.0, 0.5, networks).astype(np.float32)


def oracle(
    net: Network,
    flat: np.ndarray,
    inputs: np.ndarray,
    labels: np.ndarray,
    drop: tuple[np.ndarray, np.ndarray] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, np.ndarray]:
    """Loss and gradient of one network in PyTorch."""
    copy = type(net)(**net.arguments()).to(dtype).train(drop is not None)
    leaf = torch.from_numpy(flat).to(dtype).requires_grad_()
    shapes = {name: tensor.shape for name, tensor in copy.state_dict().items()}
    parts = leaf.split([shape.numel() for shape in shapes.values()])
    state = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    if drop is not None:
        state |= dropout_state(copy, *(torch.as_tensor(value) for value in drop))
    logits = functional_call(copy, state, (torch.from_numpy(inputs).to(dtype),))
    loss = cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    return loss.item(), leaf.grad.numpy()


def assert_agrees(net: Network, networks: int, batch: int, *, drop: bool, seed: int = 0) -> None:
    """Within 1e-4 of float64, or, where that is beyond float32, as near as PyTorch comes in float32."""
    weights, inputs, rows, labels = problem(net, networks, batch, seed)
    keys, rates = dropout(networks) if drop else (None, None)
    losses, gradients = ClassifierKernel(net, inputs, 1).gradients(weights, rows, labels, keys, rates)
    for k in range(networks):
        case = net, weights[k], inputs[rows[k]], labels[k], (keys[k], rates[k]) if drop else None
        loss, gradient = oracle(*case)
        single_loss, single = oracle(*case, dtype=torch.float32)
        allowed = max(1e-4 * np.abs(gradient).max(), 8 * np.abs(single - gradient).max())
        assert np.abs(gradients[k] - gradient).max() <= allowed
        assert abs(float(losses[k]) - loss) <= max(1e-5 * max(1.0, loss), 8 * abs(single_loss - loss))


@st.composite
def cnns(draw: st.DrawFn, residual: bool = False, norms: tuple[str, ...] = ("none",)) -> dict[str, Any]:
    """Convolutions of any geometry; images may be smaller than a kernel's padded window, and not square."""
    layers = draw(st.integers(1, 4))
    height, width = draw(st.integers(5, 20)), draw(st.integers(5, 20))
    size, kernels, strides, paddings = min(height, width), [], [], []
    for _ in range(layers):
        kernel = draw(st.integers(1, min(5, size)))
        padding, stride = draw(st.integers(0, kernel - 1)), draw(st.integers(1, 3))
        size = (size + 2 * padding - kernel) // stride + 1
        kernels, strides, paddings = [*kernels, kernel], [*strides, stride], [*paddings, padding]
    pooling = draw(st.sampled_from(["mean", "max", "flatten"]))
    # Where an activation is flat at its maximum, which pixels tie is a matter of rounding.
    activations = ACTIVATIONS if pooling != "max" else ("relu", "leaky_relu", "gelu", "silu")
    return {
        "input_shape": (draw(st.sampled_from([1, 2, 3])), height, width),
        "channels": draw(st.lists(st.integers(1, 19), min_size=layers, max_size=layers)),
        "out_features": draw(st.integers(2, 11)),
        "kernel_size": kernels,
        "stride": strides,
        "padding": paddings,
        "activation": draw(st.lists(st.sampled_from(activations), min_size=layers, max_size=layers)),
        "w0": draw(st.sampled_from([1.0, 2.0])),
        "pooling": pooling,
        "norm": draw(st.sampled_from(norms)),
        "residual": [draw(st.integers(-1, layer - 1)) for layer in range(layers)] if residual else False,
    }


BATCHES = st.sampled_from([1, 7, 33, 128])
MORE_THAN_ONE = st.sampled_from([7, 33, 128])  # PyTorch refuses to normalise a single value


@settings(max_examples=60)
@given(arguments=cnns(), batch=BATCHES, drop=st.booleans(), seed=st.integers(0, 99))
def test_gradients_of_cnns(arguments, batch, drop, seed):
    assert_agrees(CNN(**arguments), 2, batch, drop=drop, seed=seed)


@settings(max_examples=40)
@given(
    arguments=cnns(residual=True, norms=("none", "layer")),
    batch=MORE_THAN_ONE,
    drop=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_with_shortcuts_and_layer_norm(arguments, batch, drop, seed):
    net = CNN(**arguments)
    try:
        net(torch.zeros(2, *net.input_shape))
    except RuntimeError:  # PyTorch cannot pad by so much less than nothing as this projection asks for
        assume(False)
    assert_agrees(net, 2, batch, drop=drop, seed=seed)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_gradients_with_shared_shortcuts(norm):
    net = CNN((2, 9, 7), (6, 11, 4, 5), 3, residual=(-1, -1, 0, 1), shortcut="shared", norm=norm)
    assert_agrees(net, 2, 20, drop=True)


@settings(max_examples=40)
@given(
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    activation=st.sampled_from(ACTIVATIONS),
    batch=BATCHES,
    drop=st.booleans(),
    seed=st.integers(0, 99),
)
@example(widths=[784, 64, 10], activation="relu", batch=128, drop=True, seed=0)
def test_gradients_of_mlps(widths, activation, batch, drop, seed):
    net = MLP((*widths, 10), activation=activation, w0=2.0, input_shape=(1, widths[0], 1), output_offset=0.5)
    assert_agrees(net, 2, batch, drop=drop, seed=seed)


def test_the_reference_network_is_as_near_the_truth_as_float32_allows():
    net = build(PRESETS["small-cnn-zoo"])
    weights, inputs, rows, labels = problem(net, 2, 128)
    losses, gradients = ClassifierKernel(net, inputs).gradients(weights, rows, labels)
    for k in range(2):
        loss, gradient = oracle(net, weights[k], inputs[rows[k]], labels[k])
        assert float(losses[k]) == pytest.approx(loss, rel=1e-6)
        assert np.abs(gradients[k] - gradient).max() <= 1e-6 * np.abs(gradient).max()


def test_one_value_by_hand():
    """Logits (w x, 0) with w = 1, x = log 3: probabilities 3/4 and 1/4."""
    net = MLP((1, 2), activation="relu")
    inputs = np.array([[np.log(3.0)]], np.float32)
    weights = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)  # both weights, then both biases
    one = np.zeros((1, 1), np.int64)
    losses, gradients = ClassifierKernel(net, inputs).gradients(weights, one, one)
    assert losses[0] == pytest.approx(np.log(4 / 3))
    expected = [-np.log(3.0) / 4, np.log(3.0) / 4, -1 / 4, 1 / 4]
    assert gradients[0] == pytest.approx(np.array(expected, np.float32))


@pytest.mark.parametrize("net", NETS, ids=["cnn", "wide", "mlp"])
@pytest.mark.parametrize("items", [1, 40, 150])
def test_evaluate(net, items):
    weights, inputs, rows, labels = problem(net, 5, items)
    losses, accuracies = ClassifierKernel(net, inputs).evaluate(weights, rows[0], labels[0])
    for k in range(5):
        loss, _ = oracle(net, weights[k], inputs[rows[0]], labels[0])
        copy = type(net)(**net.arguments()).double()
        torch.nn.utils.vector_to_parameters(torch.from_numpy(weights[k]).double(), copy.parameters())
        answers = copy(torch.from_numpy(inputs[rows[0]]).double()).argmax(1).numpy()
        assert float(losses[k]) == pytest.approx(loss, rel=1e-5)
        assert float(accuracies[k]) == pytest.approx((answers == labels[0]).mean())


def test_evaluate_with_labels_of_each_networks_own():
    net = NETS[0]
    weights, inputs, rows, labels = problem(net, 3, 20)
    kernel = ClassifierKernel(net, inputs)
    together = kernel.evaluate(weights, rows[0], labels)
    for k in range(3):
        alone = kernel.evaluate(weights[k : k + 1], rows[0], labels[k])
        assert [float(values[k]) for values in together] == [float(values[0]) for values in alone]
    assert len(set(together[0].tolist())) == 3


def test_the_first_of_equal_logits_is_the_answer():
    net = MLP((3, 4), activation="relu")
    kernel = ClassifierKernel(net, np.ones((4, 3), np.float32))
    losses, accuracies = kernel.evaluate(np.zeros((1, 16), np.float32), np.arange(4), np.array([0, 0, 0, 1]))
    assert losses[0] == pytest.approx(np.log(4))
    assert accuracies[0] == 0.75


@pytest.mark.parametrize("net", NETS, ids=["cnn", "wide", "mlp"])
def test_bits_do_not_depend_on_neighbours_order_or_threads(net):
    weights, inputs, rows, labels = problem(net, 9, 50)
    keys, rates = dropout(9)
    alone = ClassifierKernel(net, inputs, 1)
    losses, gradients = alone.gradients(weights, rows, labels, keys, rates)
    evaluated = alone.evaluate(weights, rows[0], labels[0])
    for threads, order in (
        (3, np.arange(9)),
        (2, np.arange(9)[::-1]),
        (1, np.array([4])),
        (2, np.array([8, 0])),
    ):
        kernel = ClassifierKernel(net, inputs, threads)
        chosen = (values[order] for values in (weights, rows, labels, keys, rates))
        other_losses, other_gradients = kernel.gradients(*chosen)
        assert np.array_equal(other_losses, losses[order])
        assert np.array_equal(other_gradients, gradients[order])
        for ours, theirs in zip(evaluated, kernel.evaluate(weights[order], rows[0], labels[0]), strict=True):
            assert np.array_equal(ours[order], theirs)


def test_rates_default_to_those_of_the_network():
    net = MLP((8, 16, 3), activation="relu", dropout=0.25)
    weights, inputs, rows, labels = problem(net, 3, 20)
    keys, _ = dropout(3)
    kernel = ClassifierKernel(net, inputs)
    own = kernel.gradients(weights, rows, labels, keys)[1]
    given_rates = kernel.gradients(weights, rows, labels, keys, np.full(3, 0.25, np.float32))[1]
    assert np.array_equal(own, given_rates)
    assert not np.array_equal(own, kernel.gradients(weights, rows, labels)[1])


@pytest.mark.parametrize("pooling", ["mean", "max", "flatten"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_seen(pooling, activation, value):
    """And a diverged network changes nothing for those that its thread computes after it."""
    net = CNN((1, 7, 7), (5, 6), 3, activation=activation, pooling=pooling)
    weights, inputs, rows, labels = problem(net, 3, 10)
    kernel = ClassifierKernel(net, inputs, 1)
    healthy = kernel.gradients(weights, rows, labels)
    for place in (0, 50, weights.shape[1] - 1):  # of the first and second convolution, of the last bias
        spoilt = weights.copy()
        spoilt[1, place] = value
        losses, gradients = kernel.gradients(spoilt, rows, labels)
        saturated = value == np.inf and activation in ("tanh", "sigmoid", "gaussian") and place < 51
        assert saturated or not (np.isfinite(losses[1]) and np.isfinite(gradients[1]).all())
        for ours, theirs in zip((losses, gradients), healthy, strict=True):
            assert np.array_equal(ours[[0, 2]], theirs[[0, 2]])


def test_overflow_is_seen():
    net = MLP((4, 8, 3), activation="relu")
    weights, inputs, rows, labels = problem(net, 1, 10)
    losses, _ = ClassifierKernel(net, inputs).gradients(weights * np.float32(1e30), rows, labels)
    assert not np.isfinite(losses[0])


def test_what_the_kernel_does_not_know_is_refused():
    foreign = [
        CNN((1, 8, 8), (4,), 2, norm="batch"),
        RNN(4, 8, 2),
        ResNet((3, 8, 8), 2, blocks=(1,), channels=4),
    ]
    for net in foreign:
        assert not ClassifierKernel.supports(net)
        with pytest.raises(
            ConfigError,
            match=f"net: expected a CNN without batch norm, or an MLP, found .*{type(net).__name__}",
        ):
            ClassifierKernel(net, np.zeros((2, *net.input_shape), np.float32))
    assert ClassifierKernel.supports(CNN((1, 8, 8), (4,), 2, norm="layer", residual=True))


def test_arrays_that_do_not_fit_are_refused():
    net = MLP((4, 3), activation="relu")
    weights, inputs, rows, labels = problem(net, 2, 5)
    with pytest.raises(DataError, match=r"inputs: expected shape \(items, 4\), found \(150, 3\)"):
        ClassifierKernel(net, inputs[:, :3])
    kernel = ClassifierKernel(net, inputs)
    with pytest.raises(DataError, match=r"weights: expected shape \(networks, 15\), found \(2, 14\)"):
        kernel.gradients(weights[:, :14], rows, labels)
    wrong = np.concatenate([weights, weights])
    with pytest.raises(DataError, match=r"rows: expected .*, found \(2, 5\) and \(2, 5\)"):
        kernel._check(wrong, rows, labels)  # the public methods' annotations refuse it first, under pytest
    with pytest.raises(DataError, match=r"rows: expected shape \(2, batch\) .*, found \(1, 0\) and \(1, 0\)"):
        kernel.evaluate(weights, rows[0, :0], labels[0, :0])
    with pytest.raises(DataError, match=r"rows: expected numbers from 0 to 149, found \d+ to 150"):
        kernel.gradients(weights, np.where(rows == rows.max(), 150, rows), labels)
    with pytest.raises(DataError, match=r"labels: expected numbers from 0 to 2, found -1 to 2"):
        kernel.gradients(weights, rows, np.resize([-1, 2], rows.shape))
    with pytest.raises(ConfigError, match="rates: expected rates of at least 0 and below 1, found 1"):
        kernel.gradients(weights, rows, labels, np.arange(2), np.ones(2, np.float32))
    assert kernel.gradients(weights[:0], rows[:0], labels[:0])[1].shape == (0, 15)
