"""Run configurations: where values come from, and how mistakes are named."""

import re

import pytest
import yaml

from weightspace.errors import ConfigError, RunError
from weightspace.tasks import TASKS, Classification, TrainConfig, load_config, train_config


def test_defaults_come_from_the_model():
    config = train_config({"zoo": "a.h5", "model": "dws", "epochs": None})
    assert (config.learning_rate, config.augment, config.epochs) == (3e-3, "sign, noise(0.05)", 20)
    assert config.options["hidden"] == 32
    plain = train_config({"zoo": "a.h5", "model": "mlp"})
    assert (plain.learning_rate, plain.augment) == (1e-3, "")
    given = train_config({"zoo": "a.h5", "model": "dws", "learning_rate": 0.1, "augment": ""})
    assert (given.learning_rate, given.augment) == (0.1, "")


def test_options_have_two_names():
    for prefix in ("model", "options"):
        config = train_config({"zoo": "a.h5"}, {f"{prefix}.hidden": 5, "batch_size": 7})
        assert (config.options["hidden"], config.batch_size) == (5, 7)
    assert config.model_options().hidden == 5


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({}, {"epoch": 3}, "train: epoch: unknown field; expected one of zoo, population, task, target"),
        ({}, {"epochs": 0}, "train: epochs: input should be greater than or equal to 1, found 0"),
        ({}, {"batch_size": 1}, "train: batch_size: input should be greater than or equal to 2, found 1"),
        ({}, {"normalisation": "layer"}, "train: normalisation: input should be 'tensor', 'entry' or 'none'"),
        ({}, {"model.hiden": 3}, "model.hiden: unknown option of dws; expected one of hidden, layers"),
        ({"model": "cnn"}, {}, "model: expected one of dws, mlp, statistics, probe, found 'cnn'"),
        ({}, {"model": ["dws"]}, "model: "),
        ({}, {"options": 3}, "options: "),
        ({"task": "dance"}, {}, "task: expected one of classification, found 'dance'"),
        ({}, {"task": ["dance"]}, "task: "),
        ({}, {"seed": -1}, "train: seed: input should be greater than or equal to 0, found -1"),
    ],
)
def test_mistakes_are_named(values, overrides, message):
    with pytest.raises(
        ConfigError, match="^" + re.escape(message).replace("^", "") + "|" + re.escape(message)
    ) as e:
        train_config({"zoo": "a.h5", **values}, overrides)
    assert "\n" not in str(e.value)


def test_a_configuration_survives_its_file(tmp_path):
    config = train_config({"zoo": "a.h5", "model": "statistics", "patience": 3}, {"model.hidden": [4, 5]})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path) == config
    assert isinstance(config, TrainConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run directory: config.yaml is missing"),
        (b"a: [", "config.yaml is not valid YAML"),
        (b"\xff\xfe", "config.yaml is not valid YAML"),
        (b"- 1", "config.yaml should hold a mapping of fields"),
        (b"", "config.yaml should hold a mapping of fields"),
        (b"zoo: a.h5\nspeed: 3", "config.yaml: speed: unknown field; expected one of zoo"),
        (b"zoo: a.h5\nepochs: x", "config.yaml: epochs: input should be a valid integer"),
        (b"epochs: 3", "config.yaml: zoo: field required"),
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError, match=re.escape(f"run {tmp_path}: {message}")) as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_names_register_once():
    assert TASKS["classification"] is Classification
    with pytest.raises(ValueError, match="task 'classification' is registered twice"):
        TASKS.register("classification")(Classification)
