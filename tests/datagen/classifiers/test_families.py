"""Architectures that families draw: within what was asked for, always the same, and networks that can be built."""

import numpy as np
import pytest
import torch

from weightspace.datagen.classifiers._families import FAMILIES, Draw, Task
from weightspace.datagen.classifiers._hyperparameters import CODED, TrainingConfig, draw_hyperparameters
from weightspace.errors import RecipeError
from weightspace.nets import build

IMAGES, TABLE, TOKENS = Task((3, 12, 12), 5), Task((6,), 3), Task((7,), 4, vocabulary=9)
SERIES = Task((7, 2), 4)
NUMBER = 60
FIELDS = {
    "mlp": {"hidden": {"choice": [[8], [16, 8], []]}, "activation": {"choice": ["relu", "tanh"]}},
    "cnn": {
        "layers": {"integer": [2, 6]},
        "channels": {"choice": [4, 8, 12]},
        "kernel_size": {"choice": [1, 3, 5]},
        "stride": {"choice": [1, 2]},
        "activation": {"choice": ["relu", "gelu", "sigmoid"]},
        "norm": {"choice": ["none", "batch", "layer"]},
        "residual": {"choice": ["none", "previous", "random"]},
        "pooling": {"choice": ["mean", "max", "flatten"]},
    },
    "resnet": {
        "blocks": {"choice": [[1], [1, 2]]},
        "channels": {"integer": [2, 6]},
        "width": {"uniform": [0.5, 2.0]},
        "norm": {"choice": ["batch", "layer"]},
        "activation": {"choice": ["relu", "silu"]},
    },
    "rnn": {
        "cell": {"choice": ["rnn", "gru", "lstm"]},
        "hidden": {"integer": [3, 9]},
        "embedding": {"choice": [None, 5]},
        "layers": {"integer": [1, 3]},
    },
}
TASKS = {"mlp": TABLE, "cnn": IMAGES, "resnet": IMAGES, "rnn": TOKENS}


def drawn(kind, fields=None, task=None, seed=0, number=NUMBER):
    family = FAMILIES[kind].model_validate(FIELDS[kind] if fields is None else fields)
    shared = {}
    return [family.architecture(Draw(seed, at, shared, number), task or TASKS[kind]) for at in range(number)]


@pytest.mark.parametrize("kind", FIELDS)
def test_draws_build_networks_of_the_task(kind):
    task = TASKS[kind]
    for arguments in drawn(kind):
        net = build({"kind": kind, "arguments": arguments}).eval()
        output = net(net.random_inputs(3, torch.Generator().manual_seed(0)))
        assert output.shape == (3, task.classes)
        assert net.input_shape == task.input_shape


@pytest.mark.parametrize("kind", FIELDS)
def test_draws_depend_on_seed_and_number_alone(kind):
    found = drawn(kind)
    assert found == drawn(kind)
    assert found != drawn(kind, seed=1)
    family = FAMILIES[kind].model_validate(FIELDS[kind])
    alone = family.architecture(Draw(0, 17, {}, NUMBER), TASKS[kind])
    assert alone == found[17]
    assert family.architecture(Draw(0, 17, {}, 2 * NUMBER), TASKS[kind]) == found[17]


@pytest.mark.parametrize("kind", ["resnet", "rnn"])
def test_every_value_that_was_asked_for_is_drawn_and_no_other(kind):
    found = drawn(kind)
    for field, distribution in FIELDS[kind].items():
        ((form, values),) = distribution.items()
        seen = [arguments[field] for arguments in found]
        if form == "choice":
            expected = {str(tuple(v) if isinstance(v, list) else v) for v in values}
            assert {str(tuple(v) if isinstance(v, list | tuple) else v) for v in seen} == expected, field
        elif form == "integer":
            assert set(seen) == set(range(values[0], values[1] + 1)), field
        else:
            assert values[0] <= min(seen) < max(seen) <= values[1], field


def test_mlps():
    found = drawn("mlp")
    assert {tuple(entry["widths"]) for entry in found} == {(6, 8, 3), (6, 16, 8, 3), (6, 3)}
    assert {entry["activation"] for entry in found} == {"relu", "tanh"}
    assert drawn("mlp", {"hidden": [4]}, IMAGES, number=1)[0]["widths"] == [432, 4, 5]


@pytest.mark.parametrize("each", [False, True])
def test_cnns_per_layer_or_for_all(each):
    found = drawn("cnn", {**FIELDS["cnn"], "per_layer": each})
    assert {len(entry["channels"]) for entry in found} == {2, 3, 4, 5, 6}
    for field in ("channels", "kernel_size", "stride", "activation"):
        assert {value for entry in found for value in entry[field]} == set(FIELDS["cnn"][field]["choice"])
        alike = [len(set(entry[field])) == 1 for entry in found]
        assert all(alike) != each
        assert all(len(entry[field]) == len(entry["channels"]) for entry in found)
    for field in ("norm", "pooling"):
        assert {entry[field] for entry in found} == set(FIELDS["cnn"][field]["choice"])


def test_layers_of_one_network_are_independent():
    found = drawn("cnn", {"layers": 2, "stride": {"choice": [1, 2]}, "per_layer": True}, number=400)
    first, second = np.array([entry["stride"] for entry in found]).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(400)


def test_random_residuals_come_from_an_earlier_layer_but_the_one_before():
    found = drawn("cnn", {"layers": 6, "stride": 1, "residual": "random"}, number=300)
    residual = np.array([entry["residual"] for entry in found])
    assert (residual[:, :2] == -1).all()
    for layer in range(2, 6):
        chosen = residual[:, layer][residual[:, layer] >= 0]
        assert set(chosen) == set(range(layer - 1))
        assert abs(len(chosen) / 300 - 0.5) < 5 * 0.5 / np.sqrt(300)
    for entry in found[:10]:
        build({"kind": "cnn", "arguments": entry})


def test_residuals_from_the_layer_before():
    assert drawn("cnn", {"residual": "previous"}, number=1)[0]["residual"] is True
    assert build(
        {"kind": "cnn", "arguments": drawn("cnn", {"residual": "previous"}, number=1)[0]}
    ).residual == (-1, 0, 1)


def test_sequences_of_numbers():
    arguments = drawn("rnn", {"hidden": 5}, SERIES, number=1)[0]
    assert (arguments["sequence"], arguments["in_features"], arguments["length"]) == ("floats", 2, 7)
    assert build({"kind": "rnn", "arguments": arguments}).input_shape == (7, 2)


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [
        ("cnn", TABLE, r"a cnn reads images, found inputs of shape \[6\]"),
        ("cnn", TOKENS, "a cnn reads images"),
        ("resnet", SERIES, r"a resnet reads images, found inputs of shape \[7, 2\]"),
        ("resnet", TOKENS, "a resnet reads images"),
        ("mlp", TOKENS, "expected numbers as inputs of an mlp, found tokens; choose an rnn"),
        ("rnn", TABLE, r"an rnn reads sequences, found inputs of shape \[6\]"),
        ("rnn", IMAGES, r"an rnn reads sequences, found inputs of shape \[3, 12, 12\]"),
    ],
)
def test_inputs_that_a_family_does_not_read(kind, task, message):
    with pytest.raises(RecipeError, match=message):
        drawn(kind, task=task, number=1)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("mlp", "hidden", [0]),
        ("cnn", "channels", 0),
        ("cnn", "kernel_size", {"integer": [0, 3]}),
        ("cnn", "norm", "group"),
        ("cnn", "padding", -1),
        ("cnn", "dropout", 0.1),
        ("resnet", "width", {"uniform": [0.0, 1.0]}),
        ("rnn", "cell", {"choice": ["gru", "transformer"]}),
    ],
)
def test_fields_out_of_range_are_refused(kind, field, value):
    with pytest.raises(ValueError, match=field):
        FAMILIES[kind].model_validate({field: value})


# -- hyperparameters -----------------------------------------------------------------------------------------


HYPERPARAMETERS = {
    "optimizer": {"choice": ["sgd", "adam", "rmsprop", "adamw"]},
    "learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "schedule": {"choice": ["constant", "cosine"]},
    "weight_decay": {"choice": [0, 0.1]},
    "dropout": {"uniform": [0.0, 0.5]},
    "initialiser": {"choice": ["he_normal", "orthogonal"]},
    "fraction": {"choice": [0.1, 1]},
    "subset": {"choice": ["first", "own"]},
    "batch_size": {"choice": [16, 32]},
    "epochs": {"integer": [2, 5]},
}


def test_hyperparameters_are_within_their_distributions():
    found = draw_hyperparameters(TrainingConfig.model_validate(HYPERPARAMETERS), 0, np.arange(200))
    assert set(found.values) == set(TrainingConfig.model_fields)
    for field, distribution in HYPERPARAMETERS.items():
        ((form, values),) = distribution.items()
        seen = found[field]
        assert seen.shape == (200,)
        if field in CODED:
            assert {CODED[field][code] for code in seen} == set(values)
        elif form == "choice":
            assert set(seen.tolist()) == set(values)
        elif form == "integer":
            assert set(seen.tolist()) == {2, 3, 4, 5}
        else:
            assert values[0] <= seen.min() < seen.max() <= values[1]
    whole = {*CODED, "batch_size", "epochs", "seed"}
    assert {field for field, values in found.stored().items() if values.dtype == np.int64} == whole
    assert all(found.stored()[field].dtype == np.float32 for field in set(found.values) - whole)
    assert found["seed"].tolist() == list(range(200))


def test_hyperparameters_of_a_network_do_not_depend_on_the_others():
    config = TrainingConfig.model_validate(HYPERPARAMETERS)
    together = draw_hyperparameters(config, 0, np.arange(200))
    some = draw_hyperparameters(config, 0, np.array([150, 3, 77]))
    for field, values in together.take(np.array([150, 3, 77])).values.items():
        np.testing.assert_array_equal(values, some[field])


def test_hyperparameters_are_drawn_independently():
    """Two fields of equal distributions would else be equal."""
    fields = {"dropout": {"uniform": [0.0, 0.9]}, "momentum": {"uniform": [0.0, 0.9]}}
    found = draw_hyperparameters(TrainingConfig.model_validate(fields), 0, np.arange(400))
    assert abs(np.corrcoef(found["dropout"], found["momentum"])[0, 1]) < 5 / np.sqrt(400)


def test_seeds():
    for value, expected in (
        (None, [4, 7]),
        (3, [3, 3]),
        ({"choice": [None]}, [4, 7]),
        ({"choice": [9]}, [9, 9]),
        (2**62 - 1, [2**62 - 1] * 2),
    ):
        config = TrainingConfig.model_validate({"seed": value})
        assert draw_hyperparameters(config, 0, np.array([4, 7]))["seed"].tolist() == expected
    mixed = draw_hyperparameters(
        TrainingConfig.model_validate({"seed": {"choice": [None, 1000]}}), 0, np.arange(50)
    )
    assert set(mixed["seed"][mixed["seed"] != 1000].tolist()) < set(range(50))
    assert 1000 in mixed["seed"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", {"log_uniform": [0.0, 1.0]}),
        ("learning_rate", {"uniform": [0.2, 0.1]}),
        ("optimizer", "lion"),
        ("optimizer", {"uniform": [0, 1]}),
        ("momentum", 1.0),
        ("weight_decay", -1e-3),
        ("dropout", {"uniform": [0.0, 1.0]}),
        ("fraction", {"uniform": [0.1, 1.5]}),
        ("fraction", 0.0),
        ("label_noise", 1.1),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("epochs", {"integer": [0, 3]}),
        ("epochs", {"uniform": [1, 3]}),
        ("seed", -1),
        ("seed", 2**63),
        ("initialiser", {"choice": []}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        TrainingConfig.model_validate({field: value})
