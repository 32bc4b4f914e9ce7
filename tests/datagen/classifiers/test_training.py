"""Populations against a plain loop that trains one network after the other with torch.optim."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from weightspace.datagen._shards import ShardState
from weightspace.datagen.classifiers._data import noisy_labels
from weightspace.datagen.classifiers._engines import KernelEngine, TorchEngine, choose_engine
from weightspace.datagen.classifiers._hyperparameters import CODED
from weightspace.datagen.classifiers._initialisers import initial_weights
from weightspace.datagen.classifiers._training import METRICS, PopulationTraining
from weightspace.nets import CNN, MLP, RNN, ResNet, build, dropout_state, random_keys
from weightspace.zoo import spec_of

SEED = 11
NETS = {
    "mlp": lambda: MLP((6, 8, 4), activation="tanh"),
    "cnn_layer": lambda: CNN((2, 5, 5), (4, 5), 4, norm="layer", activation="gelu"),
    "cnn_batch": lambda: CNN((2, 5, 5), (4, 5), 4, norm="batch", activation="tanh"),
    "resnet": lambda: ResNet((2, 5, 5), 4, channels=3, blocks=(1,), activation="tanh"),
    "gru": lambda: RNN(8, 6, 4, cell="gru", length=3),
}
KERNELS = ("mlp", "cnn_layer")
MIXED = {
    "optimizer": ["sgd", "adam", "rmsprop", "adamw", "sgd", "adam", "rmsprop", "adamw"],
    "learning_rate": [0.05, 4e-3, 2e-3, 4e-3, 0.02, 8e-3, 1e-3, 6e-3],
    "schedule": ["constant", "cosine", "constant", "constant", "cosine", "constant", "cosine", "cosine"],
    "momentum": [0.9, 0.9, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9],
    "weight_decay": [0.0, 0.1, 0.05, 0.2, 0.05, 0.0, 0.0, 0.0],
    "dropout": [0.0, 0.0, 0.2, 0.0, 0.4, 0.3, 0.0, 0.1],
    "fraction": [1.0, 0.5, 0.3, 1.0, 0.5, 0.77, 1.0, 0.3],
    "subset": ["first", "own", "first", "own", "first", "own", "first", "own"],
    "label_noise": [0.0, 0.0, 0.3, 0.0, 0.6, 0.0, 1.0, 0.3],
    "batch_size": [8, 5, 8, 40, 8, 5, 7, 100],
    "epochs": [4, 3, 4, 2, 1, 3, 4, 4],
}
NETWORKS = 8


@cache
def spec_for(kind):
    """Tracing takes longer than training here."""
    return spec_of(NETS[kind]())


@pytest.fixture
def population(data_of, hyperparameters_of):
    """Makes the training of a population, by default the mixed one."""

    def make(kind, networks=NETWORKS, *, rows=None, engine=None, scale=1.0, checkpoints=(0, 1, 3), **options):
        net = NETS[kind]()
        columns = options.pop("columns", MIXED)
        data = options.pop("data", None) or data_of(net.input_shape, vocabulary=8 if kind == "gru" else None)
        hyperparameters = hyperparameters_of(networks, **columns)
        initial = initial_weights(
            net,
            SEED,
            1 + hyperparameters["seed"],
            hyperparameters["initialiser"],
            np.broadcast_to(np.asarray(scale, float), (networks,)),
        )
        if rows is not None:
            hyperparameters, initial = hyperparameters.take(np.array(rows)), initial[rows]
        if engine is None:
            engine = choose_engine(net, spec_for(kind), data.inputs, "cpu")
        return PopulationTraining(engine, data, hyperparameters, initial, checkpoints, seed=SEED, **options)

    return make


def trained(training, state=None, progress=lambda done: None):
    return training.run(state or ShardState(), progress)


# -- the oracle ----------------------------------------------------------------------------------------------


def optimizer_of(name, parameters, rate, momentum, decay):
    if name == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=momentum, weight_decay=decay)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    return kinds[name](parameters, rate, weight_decay=decay)


class Alone:
    """One network of a population, trained by itself in float64."""

    def __init__(self, training, net, at, initial):
        self.values = {field: values[at] for field, values in training.hyperparameters.values.items()}
        for field, names in CODED.items():
            self.values[field] = names[self.values[field]]
        self.data, self.key = training.data, int(self.values["seed"])
        self.inputs = torch.from_numpy(self.data.inputs)
        if self.inputs.dtype == torch.float32:
            self.inputs = self.inputs.double()
        self.net = build({"kind": net.kind, "arguments": net.arguments()}).double()
        state = self.net.state_dict()
        parts = torch.from_numpy(initial).double().split([tensor.numel() for tensor in state.values()])
        self.net.load_state_dict(
            {name: part.view_as(tensor) for (name, tensor), part in zip(state.items(), parts, strict=True)}
        )
        self.choose_items()

    def choose_items(self):
        rows = self.data.train
        if self.values["subset"] == "own":
            rows = np.random.default_rng([SEED, 6, self.key]).permutation(rows)
        labels = noisy_labels(self.data.labels[rows], 4, self.values["label_noise"], SEED, self.key)
        self.items = max(1, round(self.values["fraction"] * len(rows)))
        self.rows, self.labels = rows[: self.items], labels[: self.items]
        self.batch = min(self.values["batch_size"], self.items)

    def run(self, checkpoints, shared_order=False):
        """(epoch, step, weights, metrics) of each checkpoint."""
        epochs, per_epoch = int(self.values["epochs"]), self.items // self.batch
        optimizer = optimizer_of(
            self.values["optimizer"],
            self.net.parameters(),
            self.values["learning_rate"],
            self.values["momentum"],
            self.values["weight_decay"],
        )
        if self.values["schedule"] == "cosine":
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
        else:
            schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        found, step = [], 0
        for epoch in range(epochs + 1):
            if epoch in checkpoints or epoch == epochs:
                found.append((epoch, step, self.flat(), self.measured()))
            if epoch == epochs:
                return found
            key = 0 if shared_order else 1 + self.key
            order = np.random.default_rng([SEED, 5, key, epoch]).permutation(self.items)
            for start in range(0, per_epoch * self.batch, self.batch):
                places = order[start : start + self.batch]
                optimizer.zero_grad()
                self.loss(places, step).backward()
                optimizer.step()
                schedule.step()
                step += 1

    def loss(self, places, step=None):
        """In training; with the dropout of a step, or without."""
        self.net.train()
        drop = {}
        if step is not None:
            keys = random_keys(SEED, torch.tensor(self.key), step)
            drop = dropout_state(self.net, keys, torch.tensor(self.values["dropout"], dtype=torch.float32))
        output = torch.func.functional_call(self.net, drop, (self.inputs[self.rows[places]],))
        return cross_entropy(output, torch.from_numpy(self.labels[places]))

    def flat(self):
        return torch.cat([tensor.flatten() for tensor in self.net.state_dict().values()]).numpy().copy()

    def scores(self, rows, labels):
        self.net.eval()
        with torch.no_grad():
            output, targets = self.net(self.inputs[rows]), torch.from_numpy(labels)
        return cross_entropy(output, targets).item(), (output.argmax(1) == targets).double().mean().item()

    def measured(self):
        found = dict(zip(("train_loss", "train_accuracy"), self.scores(self.rows, self.labels), strict=True))
        for name in ("val", "test"):
            rows = getattr(self.data, name)
            both = zip(
                (f"{name}_loss", f"{name}_accuracy"), self.scores(rows, self.data.labels[rows]), strict=True
            )
            found.update(both)
        found["generalisation_gap"] = found["train_accuracy"] - found["test_accuracy"]
        before = {name: tensor.clone() for name, tensor in self.net.state_dict().items()}
        gradients = torch.autograd.grad(self.loss(np.arange(self.batch)), list(self.net.parameters()))
        self.net.load_state_dict(before)
        found["gradient_norm"] = sum((g**2).sum().item() for g in gradients) ** 0.5
        return found


@pytest.mark.parametrize("shared_order", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_a_mixed_population_is_what_a_loop_over_networks_gives(population, kind, shared_order):
    checkpoints = (0, 1, 3)
    training = population(kind, shared_order=shared_order)
    initial = training.weights.numpy().copy()
    found = trained(training)
    row = 0
    for at in range(NETWORKS):
        alone = Alone(training, NETS[kind](), at, initial[at])
        for epoch, step, weights, metrics in alone.run(checkpoints, shared_order):
            place = f"network {at} ({alone.values}) after epoch {epoch}"
            assert (found.network[row], found.step[row], found.metrics["epoch"][row]) == (at, step, epoch), (
                place
            )
            np.testing.assert_allclose(found.weights[row], weights, rtol=1e-3, atol=3e-4, err_msg=place)
            for name, value in metrics.items():
                assert found.metrics[name][row] == pytest.approx(value, rel=2e-3, abs=2e-4), (
                    f"{name} of {place}"
                )
            row += 1
        assert np.abs(weights - initial[at]).max() > 5e-3, f"network {at} has hardly moved"
    assert (
        row
        == len(found.weights)
        == sum(len({*range(epochs), epochs} & {0, 1, 3, epochs}) for epochs in MIXED["epochs"])
    )
    assert not found.metrics["diverged"].any()


# -- rows ----------------------------------------------------------------------------------------------------


def test_rows_are_ordered_by_network_and_by_step(population):
    found = trained(population("mlp"))
    assert list(found.metrics) == list(METRICS)
    assert found.network.tolist() == sorted(found.network)
    epochs = [{0, 1, 3, last} & {*range(last + 1)} for last in MIXED["epochs"]]
    assert found.metrics["epoch"].tolist() == [epoch for chosen in epochs for epoch in sorted(chosen)]
    per_epoch = [5, 4, 1, 1, 2, 6, 5, 1]
    assert found.step.tolist() == [
        epoch * n for n, chosen in zip(per_epoch, epochs, strict=True) for epoch in sorted(chosen)
    ]
    assert all(values.dtype == np.float32 for values in found.metrics.values())
    assert found.weights.dtype == np.float32


def test_checkpoints_in_any_order_and_beyond_a_networks_end(population):
    forth, back = (trained(population("mlp", checkpoints=order)) for order in ((0, 2, 4), (4, 0, 2)))
    np.testing.assert_array_equal(forth.weights, back.weights)
    assert forth.metrics["epoch"][forth.network == 4].tolist() == [0, 1]


def test_without_checkpoints_the_last_is_recorded(population):
    found = trained(population("mlp", checkpoints=()))
    assert found.network.tolist() == list(range(NETWORKS))
    assert found.metrics["epoch"].tolist() == MIXED["epochs"]


def test_recording_changes_nothing(population):
    often, seldom = (
        trained(population("cnn_batch", checkpoints=(0, 1, 2, 3))),
        trained(population("cnn_batch", checkpoints=())),
    )
    last = np.r_[often.network[1:] != often.network[:-1], True]
    np.testing.assert_array_equal(often.weights[last], seldom.weights)


def test_progress_rises_to_the_number_of_networks(population):
    told = []
    trained(population("mlp"), progress=told.append)
    assert told == sorted(told)
    assert 0 < told[0] < NETWORKS == told[-1]


def test_metrics_are_of_at_most_so_many_items(population):
    training = population("mlp", evaluation=5, checkpoints=())
    found = trained(training)
    alone = Alone(training, NETS["mlp"](), 0, found.weights[0])
    data = training.data
    for name, rows in {"train": data.train, "val": data.val, "test": data.test}.items():
        loss, accuracy = alone.scores(rows[:5], data.labels[rows[:5]])
        assert found.metrics[f"{name}_loss"][0] == pytest.approx(loss, rel=1e-4)
        assert found.metrics[f"{name}_accuracy"][0] == pytest.approx(accuracy)


def test_without_validation_items_their_metrics_are_nan(population, data_of):
    found = trained(population("mlp", data=data_of((6,), val=0)))
    assert np.isnan(found.metrics["val_loss"]).all()
    assert np.isnan(found.metrics["val_accuracy"]).all()
    assert np.isfinite(found.metrics["test_loss"]).all()
    assert not found.metrics["diverged"].any()


def test_training_accuracy_is_that_on_the_noisy_labels(population):
    """A network that has learnt nothing but noise by heart is right on its own labels and on no others."""
    columns = {
        "label_noise": 1.0,
        "fraction": 0.25,
        "epochs": 300,
        "optimizer": "adam",
        "learning_rate": 0.02,
    }
    found = trained(population("mlp", 2, columns=columns, checkpoints=()))
    assert (found.metrics["train_accuracy"] == 1.0).all()
    assert (found.metrics["test_accuracy"] < 0.3).all()


def test_what_is_learnt_shows(population):
    columns = {"epochs": 20, "optimizer": "adam", "learning_rate": 0.02}
    found = trained(population("mlp", 2, columns=columns))
    assert (found.metrics["test_accuracy"][[2, 5]] < 0.6).all() or found.metrics["test_accuracy"].min() < 0.6
    assert (found.metrics["test_accuracy"][found.metrics["epoch"] == 20] > 0.9).all()


# -- seeds ---------------------------------------------------------------------------------------------------


NOISY = {"dropout": 0.2, "label_noise": 0.2, "subset": "own", "fraction": 0.5}


@pytest.mark.parametrize("kind", ["mlp", "cnn_layer"])
def test_networks_of_equal_seeds_and_hyperparameters_are_equal(population, kind):
    found = trained(population(kind, 3, columns={**NOISY, "seed": [5, 5, 6]}, checkpoints=()))
    np.testing.assert_array_equal(found.weights[0], found.weights[1])
    assert (found.weights[0] != found.weights[2]).mean() > 0.9
    for name, values in found.metrics.items():
        assert values[0] == values[1], name


@pytest.mark.parametrize("varied", ["dropout", "label_noise", "order", "subset"])
def test_a_seed_decides_all_that_is_random(population, varied):
    """From the same initial weights: each of them alone makes two seeds differ, and without any they do not."""
    still = {"batch_size": 40, "epochs": 2}  # whole batches: an order makes no difference but rounding
    columns = {
        "dropout": {**still, "dropout": 0.3},
        "label_noise": {**still, "label_noise": 0.3},
        "order": {"epochs": 2},
        "subset": {"fraction": 0.5, "subset": "own", "batch_size": 20, "epochs": 2},
    }[varied]
    for chosen, differ in ((columns, True), (still, False)):
        training = population("mlp", 2, columns={**chosen, "seed": [1, 2]}, checkpoints=())
        training.weights = training.weights[:1].repeat(2, 1)
        weights = trained(training).weights
        assert (np.abs(weights[0] - weights[1]).max() > 1e-3) == differ


def test_a_shared_order_is_the_same_for_all_seeds(population):
    training = population("mlp", 2, columns={"seed": [1, 2], "epochs": 2}, checkpoints=(), shared_order=True)
    training.weights = training.weights[:1].repeat(2, 1)
    weights = trained(training).weights
    np.testing.assert_array_equal(weights[0], weights[1])


def test_every_epoch_has_an_order_of_its_own_of_all_items(population):
    training = population("mlp", 1, columns={"batch_size": 8, "epochs": 3})
    orders = []
    for epoch in range(3):
        batches = []
        for step in range(5):
            training.step = 5 * epoch + step
            training._draw_orders()
            batches.append(training._batch(np.array([0]))[0])
        orders.append(np.concatenate(batches))
        assert sorted(orders[-1]) == list(range(40))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_a_fraction_learns_from_the_first_items_alone(population, data_of):
    """Other items may be anything."""
    data = data_of((6,))
    columns = {"fraction": 0.5, "epochs": 3}
    expected = trained(population("mlp", 2, columns=columns, data=data, checkpoints=())).weights
    inputs = data.inputs.copy()
    inputs[data.train[20:]] = 1e3
    other = type(data)(inputs, data.labels, data.task, data.train, data.val, data.test, {})
    np.testing.assert_array_equal(
        trained(population("mlp", 2, columns=columns, data=other, checkpoints=())).weights, expected
    )
    inputs[data.train[19]] = 1e3
    assert (
        trained(population("mlp", 2, columns=columns, data=other, checkpoints=())).weights != expected
    ).any()


# -- neighbours ----------------------------------------------------------------------------------------------


def assert_same_rows(found, expected, rows):
    np.testing.assert_array_equal(found.weights, expected.weights[rows])
    np.testing.assert_array_equal(found.step, expected.step[rows])
    for name in METRICS:
        np.testing.assert_array_equal(found.metrics[name], expected.metrics[name][rows], err_msg=name)


@pytest.mark.parametrize("kind", KERNELS)
def test_neighbours_do_not_change_a_networks_bits(population, kind):
    together = trained(population(kind))
    for at in range(NETWORKS):
        assert_same_rows(trained(population(kind, rows=[at])), together, together.network == at)
    some = trained(population(kind, rows=[6, 1, 3]))
    for place, at in enumerate([6, 1, 3]):
        np.testing.assert_array_equal(
            some.weights[some.network == place], together.weights[together.network == at]
        )


@pytest.mark.parametrize("kind", ["cnn_batch", "gru"])
def test_in_pytorch_neighbours_change_rounding_only(population, kind):
    together = trained(population(kind))
    for at in (0, 2, 5):
        lone = trained(population(kind, rows=[at]))
        np.testing.assert_allclose(
            lone.weights, together.weights[together.network == at], rtol=1e-3, atol=2e-4
        )


@pytest.mark.parametrize("kind", KERNELS)
def test_both_engines_train_alike(population, kind):
    net = NETS[kind]()
    compiled = population(kind)
    assert isinstance(compiled.engine, KernelEngine)
    plain = population(kind, engine=TorchEngine(net, spec_for(kind), compiled.data.inputs))
    one, other = trained(compiled), trained(plain)
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-3, atol=2e-4)
    for name in METRICS:
        np.testing.assert_allclose(one.metrics[name], other.metrics[name], rtol=1e-3, atol=2e-4, err_msg=name)


# -- label noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_so_many_labels_are_wrong(share):
    labels = np.random.default_rng(0).integers(0, 5, 4000)
    noisy = noisy_labels(labels, 5, share, seed=3, key=9)
    wrong = noisy != labels
    assert abs(wrong.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 4000)
    assert noisy.min() >= 0
    assert noisy.max() <= 4
    if share:
        counts = np.bincount((noisy - labels)[wrong] % 5, minlength=5)
        assert counts[0] == 0
        assert counts[1:].min() > 0.7 * wrong.sum() / 4  # any other class
    assert np.array_equal(noisy, noisy_labels(labels, 5, share, seed=3, key=9))
    assert share == 0 or not np.array_equal(noisy, noisy_labels(labels, 5, share, seed=3, key=8))
