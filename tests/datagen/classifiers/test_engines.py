"""What the engines compute for a population, against one network after the other with autograd."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from weightspace.datagen.classifiers._engines import KernelEngine, TorchEngine, choose_engine
from weightspace.nets import CNN, MLP, RNN, ResNet, dropout_state, random_keys
from weightspace.zoo import spec_of

NETS = {
    "mlp": lambda: MLP((12, 9, 4), activation="tanh", input_shape=(3, 4)),
    "cnn_batch": lambda: CNN((2, 7, 7), (4, 5), 4, stride=(1, 2), norm="batch", residual=True),
    "cnn_layer": lambda: CNN((2, 7, 7), (4, 5), 4, norm="layer", activation="gelu", pooling="flatten"),
    "resnet": lambda: ResNet((1, 6, 6), 4, channels=3, blocks=(1, 1)),
    "gru": lambda: RNN(8, 5, 4, cell="gru", length=4, layers=2),
    "lstm": lambda: RNN(3, 5, 4, cell="lstm", length=4, sequence="floats"),
}
KERNELS = ("mlp", "cnn_layer")
NETWORKS, ITEMS, BATCH = 5, 60, 6


@cache
def spec_for(kind):
    """Tracing takes longer than all else here."""
    return spec_of(NETS[kind]())


class Problem:
    """A population with weights and statistics of its own, and items."""

    def __init__(self, kind, seed=0):
        torch.manual_seed(seed)
        self.net = NETS[kind]()
        self.spec = spec_for(kind)
        random = np.random.default_rng(seed)
        self.inputs = self.net.random_inputs(ITEMS, torch.Generator().manual_seed(seed)).numpy()
        state = self.net.state_dict()
        parts = []
        for name, tensor in state.items():
            spread = 1.2 / np.sqrt(tensor[0].numel()) if tensor.ndim > 1 else 0.3
            values = random.normal(size=(NETWORKS, tensor.numel())) * spread
            if name.endswith("running_var"):
                values = 0.5 + values**2
            elif "norm" in name and name.endswith("weight"):
                values += 1.0
            parts.append(values)
        self.weights = torch.from_numpy(np.concatenate(parts, 1).astype(np.float32))
        self.rows = np.stack([random.permutation(ITEMS)[:BATCH] for _ in range(NETWORKS)])
        self.labels = random.integers(0, 4, (NETWORKS, BATCH))

    def engine(self, **options):
        return TorchEngine(self.net, self.spec, self.inputs, **options)

    def state_of(self, flat):
        state = self.net.state_dict()
        parts = flat.split([tensor.numel() for tensor in state.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(state.items(), parts, strict=True)}

    def alone(self, at, rows, labels, key=None, rate=None):
        """Loss, gradient and weights with moved statistics of one network, by autograd on the module itself."""
        net = type(self.net)(**self.net.arguments()).train()
        net.load_state_dict(self.state_of(self.weights[at]))
        inputs = torch.from_numpy(self.inputs[rows])
        extra = {} if key is None else dropout_state(net, key, rate)
        output = torch.func.functional_call(net, extra, (inputs,))
        loss = cross_entropy(output, torch.from_numpy(labels))
        loss.backward()
        named = dict(net.named_parameters())
        flat = [
            named[name].grad.flatten() if name in named else torch.zeros(tensor.numel())
            for name, tensor in net.state_dict().items()
        ]
        moved = torch.cat([tensor.detach().flatten() for tensor in net.state_dict().values()])
        return loss.detach(), torch.cat(flat), moved


@pytest.fixture(params=NETS)
def problem(request):
    return Problem(request.param)


def assert_as_alone(problem, found, rows, labels, keys=None, rates=None):
    for at in range(NETWORKS):
        drop = () if keys is None else (keys[at], rates[at])
        loss, gradients, moved = problem.alone(at, rows[at], labels[at], *drop)
        torch.testing.assert_close(found.loss[at], loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.gradients[at], gradients, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(found.weights[at], moved, rtol=1e-5, atol=1e-6)


def test_own_batches(problem):
    found = problem.engine().gradients(problem.weights, problem.rows, problem.labels)
    assert_as_alone(problem, found, problem.rows, problem.labels)
    assert found.gradients.abs().amax(1).min() > 1e-3


def test_shared_batches_with_own_labels(problem):
    rows = np.repeat(problem.rows[:1], NETWORKS, 0)
    found = problem.engine().gradients(problem.weights, rows, problem.labels)
    assert_as_alone(problem, found, rows, problem.labels)


def test_dropout_by_key(problem):
    keys = random_keys(3, torch.arange(NETWORKS) + 2**33, step=7)
    rates = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7])
    found = problem.engine().gradients(problem.weights, problem.rows, problem.labels, keys, rates)
    assert_as_alone(problem, found, problem.rows, problem.labels, keys, rates)
    without = problem.engine().gradients(problem.weights, problem.rows, problem.labels)
    assert torch.equal(found.loss[:1], without.loss[:1])
    assert (found.loss[1:] != without.loss[1:]).all()


@pytest.mark.parametrize("group", [1, 2, 4, 100])
def test_groups_of_any_size_agree(problem, group):
    keys, rates = random_keys(3, torch.arange(NETWORKS), step=7), torch.full((NETWORKS,), 0.2)
    arguments = problem.weights, problem.rows, problem.labels, keys, rates
    found = problem.engine(group=group).gradients(*arguments)
    expected = problem.engine().gradients(*arguments)
    for field in ("loss", "gradients", "weights"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-4, atol=2e-6)
    rows, labels = np.arange(ITEMS), np.tile(np.arange(ITEMS) % 4, (NETWORKS, 1))
    for one, other in zip(
        problem.engine(group=group).evaluate(problem.weights, rows, labels),
        problem.engine().evaluate(problem.weights, rows, labels),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_evaluation(problem, own, monkeypatch):
    monkeypatch.setattr("weightspace.datagen.classifiers._engines._ITEMS", 16)  # blocks, the last not full
    rows = np.arange(50)[::-1]
    labels = np.random.default_rng(1).integers(0, 4, (NETWORKS if own else 1, len(rows)))
    labels = np.broadcast_to(labels, (NETWORKS, len(rows)))
    loss, accuracy = problem.engine().evaluate(problem.weights, rows, labels)
    for at in range(NETWORKS):
        net = type(problem.net)(**problem.net.arguments()).eval()
        net.load_state_dict(problem.state_of(problem.weights[at]))
        with torch.no_grad():
            output = net(torch.from_numpy(problem.inputs[rows.copy()]))
        targets = torch.from_numpy(labels[at].copy())
        assert loss[at] == pytest.approx(cross_entropy(output, targets).item(), rel=1e-5)
        assert accuracy[at] == pytest.approx((output.argmax(1) == targets).float().mean().item())
    assert len(set(loss.tolist())) == NETWORKS


def test_a_single_network_and_labels_that_cannot_be_written(problem):
    """Neither warns, as PyTorch does of arrays that are not writable."""
    rows = np.broadcast_to(np.arange(10), (1, 10))[0]
    labels = np.broadcast_to(np.arange(10) % 4, (1, 10))
    loss, accuracy = problem.engine().evaluate(problem.weights[:1], rows, labels)
    assert loss.shape == accuracy.shape == (1,)
    assert loss[0] == pytest.approx(
        problem.engine().evaluate(problem.weights, rows, np.tile(labels, (5, 1)))[0][0]
    )


def test_weights_are_neither_changed_nor_tracked(problem):
    before = problem.weights.clone()
    found = problem.engine().gradients(problem.weights, problem.rows, problem.labels)
    problem.engine().evaluate(problem.weights, np.arange(5), np.zeros((NETWORKS, 5), np.int64))
    assert torch.equal(problem.weights, before)
    assert not any(getattr(found, field).requires_grad for field in ("loss", "gradients", "weights"))


def test_which_weights_are_statistics(problem):
    found = problem.engine().is_statistic
    names = [name for name, tensor in problem.net.state_dict().items() for _ in range(tensor.numel())]
    expected = torch.tensor(["running" in name for name in names])
    assert torch.equal(torch.zeros_like(expected) if found is None else found, expected)


def test_flat_weights_are_in_the_order_of_the_state_dict(problem):
    """The spec, which unflattens them, has that order."""
    assert list(problem.spec.tensors) == list(problem.net.state_dict())


@pytest.mark.parametrize("kind", KERNELS)
def test_the_kernel_agrees_with_pytorch(kind):
    problem = Problem(kind)
    keys, rates = random_keys(3, torch.arange(NETWORKS), step=7), torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7])
    kernel = KernelEngine(problem.net, problem.inputs)
    for drop in ((), (keys, rates)):
        arguments = problem.weights, problem.rows, problem.labels, *drop
        found, expected = kernel.gradients(*arguments), problem.engine().gradients(*arguments)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-4, atol=2e-6)
        assert torch.equal(found.weights, problem.weights)
    rows = np.arange(ITEMS)
    for labels in (
        np.tile(rows % 4, (NETWORKS, 1)),
        np.random.default_rng(0).integers(0, 4, (NETWORKS, ITEMS)),
    ):
        for one, other in zip(
            kernel.evaluate(problem.weights, rows, labels),
            problem.engine().evaluate(problem.weights, rows, labels),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("kind", KERNELS)
def test_a_networks_own_labels_do_not_change_its_neighbours_evaluation(kind):
    problem = Problem(kind)
    kernel, rows = KernelEngine(problem.net, problem.inputs), np.arange(ITEMS)
    labels = np.tile(rows % 4, (NETWORKS, 1))
    plain = kernel.evaluate(problem.weights, rows, labels)
    labels[0] = (labels[0] + 1) % 4
    mixed = kernel.evaluate(problem.weights, rows, labels)
    np.testing.assert_array_equal(plain[0][1:], mixed[0][1:])
    assert plain[0][0] != mixed[0][0]


@pytest.mark.parametrize("kind", KERNELS)
def test_a_rate_of_0_among_others_gives_the_bits_of_no_dropout(kind):
    problem = Problem(kind)
    kernel = KernelEngine(problem.net, problem.inputs)
    keys, rates = random_keys(3, torch.arange(NETWORKS), step=7), torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7])
    found = kernel.gradients(problem.weights, problem.rows, problem.labels, keys, rates)
    lone = kernel.gradients(problem.weights[:1], problem.rows[:1], problem.labels[:1])
    assert torch.equal(found.gradients[:1], lone.gradients)
    assert torch.equal(found.loss[:1], lone.loss)


@pytest.mark.parametrize("kind", NETS)
def test_compiled_code_is_chosen_where_it_can(kind):
    problem = Problem(kind)
    engine = choose_engine(problem.net, problem.spec, problem.inputs, "cpu")
    assert type(engine) is (KernelEngine if kind in KERNELS else TorchEngine)
