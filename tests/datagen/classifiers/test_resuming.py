"""Trainings that are interrupted, and networks that leave the finite numbers."""

from functools import cache

import numpy as np
import pytest

from weightspace.datagen._shards import ShardState
from weightspace.datagen.classifiers._engines import TorchEngine, choose_engine
from weightspace.datagen.classifiers._initialisers import initial_weights
from weightspace.datagen.classifiers._training import METRICS, PopulationTraining
from weightspace.nets import CNN, MLP, RNN
from weightspace.zoo import spec_of

NETS = {
    "mlp": lambda: MLP((6, 8, 4), activation="relu"),
    "cnn_batch": lambda: CNN((1, 4, 4), (3, 4), 4, norm="batch"),
    "gru": lambda: RNN(8, 4, 4, cell="gru", length=3),
}
MIXED = {
    "optimizer": ["sgd", "adam", "rmsprop", "adamw"],
    "learning_rate": [0.1, 0.01, 2e-3, 0.01],
    "schedule": ["constant", "cosine", "constant", "cosine"],
    "weight_decay": 0.01,
    "dropout": [0.0, 0.2, 0.3, 0.0],
    "label_noise": [0.0, 0.0, 0.2, 0.0],
    "fraction": [1.0, 0.5, 1.0, 0.3],
    "batch_size": [8, 8, 10, 4],
    "epochs": [2, 3, 1, 2],
}
STEPS = 10  # of the network that is trained longest
DIVERGING = 1e30


@cache
def spec_for(kind):
    """Tracing takes longer than training here."""
    return spec_of(NETS[kind]())


class KilledError(Exception):
    """What a kill stands for."""


@pytest.fixture
def population(data_of, hyperparameters_of):
    """Makes a training of four networks, or those of a list of rows."""

    def make(kind="mlp", *, rows=None, checkpoints=(0, 1, 2), scale=None, plain=False, **changes):
        net = NETS[kind]()
        data = data_of(net.input_shape, vocabulary=8 if kind == "gru" else None)
        hyperparameters = hyperparameters_of(4, **{**MIXED, **changes})
        initial = initial_weights(
            net, 0, 1 + hyperparameters["seed"], hyperparameters["initialiser"], np.array(scale or [1.0] * 4)
        )
        rows = np.arange(4) if rows is None else np.array(rows)
        spec = spec_for(kind)
        engine = (
            TorchEngine(net, spec, data.inputs) if plain else choose_engine(net, spec, data.inputs, "cpu")
        )
        return PopulationTraining(
            engine, data, hyperparameters.take(rows), initial[rows], checkpoints, seed=0
        )

    return make


def trained(training):
    return training.run(ShardState(), lambda done: None)


def killed(training, path, after):
    """Run until the given number of steps, saving each."""
    steps = 0

    def progress(done):
        nonlocal steps
        steps += 1
        if steps == after:
            raise KilledError

    with pytest.raises(KilledError):
        training.run(ShardState(path, every=0.0), progress)


def assert_equal(found, expected):
    for field in ("weights", "network", "step"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    for name in METRICS:
        np.testing.assert_array_equal(found.metrics[name], expected.metrics[name], err_msg=name)


# -- interruptions -------------------------------------------------------------------------------------------


ONE_DIVERGES = {"learning_rate": [DIVERGING, 0.01, 2e-3, 0.01], "optimizer": "sgd"}


def undisturbed_steps(training):
    """The result, and how many steps it took."""
    told = []
    return training.run(ShardState(), told.append), len(told)


@pytest.mark.parametrize("changes", [{}, ONE_DIVERGES])
def test_an_interruption_after_any_step_changes_no_bit(population, tmp_path, changes):
    undisturbed, steps = undisturbed_steps(population(**changes))
    assert steps == (6 if changes else STEPS)  # without the one that is trained longest
    for after in range(1, steps + 1):
        path = tmp_path / f"{after}.state"
        killed(population(**changes), path, after)
        told = []
        assert_equal(population(**changes).run(ShardState(path, every=1e9), told.append), undisturbed)
        assert len(told) == steps - after, "steps were made again"


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("changes", [{}, ONE_DIVERGES])
def test_an_interruption_after_every_step_changes_no_bit(population, tmp_path, kind, changes):
    undisturbed, steps = undisturbed_steps(population(kind, **changes))
    for _ in range(steps):
        killed(population(kind, **changes), tmp_path / "state", 1)
    told = []
    found = population(kind, **changes).run(ShardState(tmp_path / "state"), told.append)
    assert_equal(found, undisturbed)
    assert not told


def test_a_damaged_state_means_that_all_is_done_again(population, tmp_path):
    undisturbed = trained(population())
    path = tmp_path / "state"
    killed(population(), path, 5)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    told = []
    assert_equal(population().run(ShardState(path), told.append), undisturbed)
    assert len(told) == undisturbed.step.max()


def test_nothing_is_saved_before_it_is_time(population, tmp_path):
    population().run(ShardState(tmp_path / "state", every=1e9), lambda done: None)
    assert not (tmp_path / "state").exists()


def test_a_state_before_anything_is_recorded(population, tmp_path):
    """No checkpoint is due until the end: the records are empty arrays."""
    undisturbed = trained(population(checkpoints=()))
    killed(population(checkpoints=()), tmp_path / "state", 1)
    assert_equal(
        population(checkpoints=()).run(ShardState(tmp_path / "state"), lambda done: None), undisturbed
    )


def test_a_state_after_the_last_network_has_diverged(population, tmp_path):
    changes = {"learning_rate": DIVERGING, "optimizer": "sgd"}
    undisturbed = trained(population(**changes))
    told = []
    population(**changes).run(ShardState(tmp_path / "state", every=0.0), told.append)
    assert len(told) < STEPS - 1, "some have not diverged"
    assert_equal(population(**changes).run(ShardState(tmp_path / "state"), lambda done: None), undisturbed)


# -- divergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adamw"])
@pytest.mark.parametrize("kind", NETS)
def test_a_diverging_network_is_flagged_and_leaves_the_others_alone(population, kind, optimizer):
    # weight decay of the same size makes adaptive ones diverge, too; a large step alone only saturates a GRU
    changes = {
        "learning_rate": [0.1, DIVERGING, 2e-3, 0.01],
        "optimizer": ["sgd", optimizer, "rmsprop", "adamw"],
        "weight_decay": [0.01, 1e10, 0.01, 0.01],
        "dropout": 0.0,
    }
    found, calm = (
        trained(population(kind, **changes)),
        trained(population(kind, **{**changes, "learning_rate": 1e-3})),
    )
    assert found.network.tolist() == calm.network.tolist()
    assert found.step.tolist() == calm.step.tolist()
    np.testing.assert_array_equal(found.metrics["epoch"], calm.metrics["epoch"])
    assert np.isfinite(found.weights).all()
    flags = found.metrics["diverged"][found.network == 1]
    assert flags[0] == 0
    assert flags[1:].all(), "flagged from the first checkpoint after it"
    assert not found.metrics["diverged"][found.network != 1].any()
    if kind == "mlp":  # compiled code: bit for bit
        others = trained(population(kind, rows=[0, 2, 3], **changes))
        rows = found.network != 1
        np.testing.assert_array_equal(others.weights, found.weights[rows])
        for name in METRICS:
            np.testing.assert_array_equal(others.metrics[name], found.metrics[name][rows], err_msg=name)


def test_a_network_that_diverges_late_keeps_its_last_finite_weights(population):
    """Rows before are those of an undisturbed one; the later ones are what it was before the fatal step."""
    training = population(checkpoints=(0, 1, 2))
    calm = trained(population(checkpoints=(0, 1, 2)))
    steps = training.schedule.per_epoch[1]
    rate = training._learning_rate

    def fatal():
        found = rate()
        if training.step == 2 * steps:  # the first step of its last epoch
            found[training.alive == 1] = 3e38
        return found

    training._learning_rate = fatal
    found = trained(training)
    rows = np.flatnonzero(found.network == 1)
    assert found.metrics["diverged"][rows].tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(found.weights[rows[:3]], calm.weights[rows[:3]])
    np.testing.assert_array_equal(found.weights[rows[3]], found.weights[rows[2]])
    assert found.metrics["train_loss"][rows[3]] == found.metrics["train_loss"][rows[2]]
    others = found.network != 1
    np.testing.assert_array_equal(found.weights[others], calm.weights[others])


@pytest.mark.parametrize("plain", [False, True])
def test_divergence_in_the_very_first_step_leaves_the_initial_weights(population, plain):
    changes = {"learning_rate": [3e38, 0.01, 2e-3, 0.01], "weight_decay": 1.0, "plain": plain}
    training = population(**changes)
    initial = training.weights.numpy().copy()
    found = trained(training)
    rows = found.network == 0
    assert found.metrics["diverged"][rows].tolist() == [0, 1, 1]
    assert found.metrics["epoch"][rows].tolist() == [0, 1, 2]
    for weights in found.weights[rows]:
        np.testing.assert_array_equal(weights, initial[0])


@pytest.mark.parametrize("plain", [False, True])
def test_initial_weights_that_are_too_large(population, plain):
    """The loss itself is not finite, from the start: all rows are flagged."""
    found = trained(population(scale=[1e30, 1.0, 1.0, 1.0], plain=plain))
    assert found.metrics["diverged"][found.network == 0].tolist() == [1, 1, 1]
    assert not found.metrics["diverged"][found.network != 0].any()
    assert np.isfinite(found.weights).all()


@pytest.mark.parametrize("plain", [False, True])
def test_a_last_step_that_ruins_a_network_is_flagged(population, plain):
    """Its weights are finite still, its loss is not, and no step is left to find that out."""
    changes = {"learning_rate": [1e30, 0.01, 2e-3, 0.01], "batch_size": 40, "epochs": 1, "fraction": 1.0}
    found = trained(population(checkpoints=(0,), plain=plain, **changes))
    rows = found.network == 0
    assert not np.isfinite(found.metrics["train_loss"][rows][1])
    assert found.metrics["diverged"][rows].tolist() == [0, 1]


@pytest.mark.parametrize("rate", [1e39, 1e308])
def test_rates_beyond_float32(population, rate):
    found = trained(population(learning_rate=[rate, 0.01, 2e-3, 0.01]))
    assert found.metrics["diverged"][found.network == 0].tolist() == [0, 1, 1]
    assert np.isfinite(found.weights).all()


def test_rows_that_are_not_flagged_have_finite_metrics(population):
    changes = {"learning_rate": [1e30, 1e20, 1e10, 1e3], "optimizer": "sgd", "momentum": 0.9}
    found = trained(population(**changes))
    calm = found.metrics["diverged"] == 0
    for name in METRICS:
        assert np.isfinite(found.metrics[name][calm]).all(), name
    assert calm.any()
    assert not calm.all()


# -- running statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adamw"])
def test_no_optimizer_decays_running_statistics(population, optimizer):
    """After one step they are those of the first batch, whatever the weight decay; the weights are not."""
    common = {"optimizer": optimizer, "learning_rate": 0.1, "batch_size": 40, "epochs": 1, "fraction": 1.0}
    plain, decayed = (
        trained(population("cnn_batch", weight_decay=decay, dropout=0.0, checkpoints=(), **common)).weights
        for decay in (0.0, 1.0)
    )
    names = [name for name, tensor in NETS["cnn_batch"]().state_dict().items() for _ in range(tensor.numel())]
    statistic = np.array(["running" in name for name in names])
    np.testing.assert_array_equal(decayed[:, statistic], plain[:, statistic])
    assert (decayed[:, ~statistic] != plain[:, ~statistic]).mean() > 0.1
    assert (plain[0, statistic] != plain[1, statistic]).any(), "they have not moved at all"
