"""Run configurations: where values come from, and how mistakes are named."""

import re

import pytest
import yaml

from weightspace.errors import ConfigError, RunError
from weightspace.models import MODELS
from weightspace.tasks import TASKS, Classification, TrainConfig, load_config, train_config


def test_defaults_come_from_the_model():
    config = train_config({"zoo": "a.h5", "model": "dws", "epochs": None})
    assert (config.learning_rate, config.augment, config.epochs) == (3e-3, "sign, noise(0.05)", 20)
    assert config.options["hidden"] == 32
    plain = train_config({"zoo": "a.h5", "model": "mlp"})
    assert (plain.learning_rate, plain.augment) == (1e-3, "")
    given = train_config({"zoo": "a.h5", "model": "dws", "learning_rate": 0.1, "augment": ""})
    assert (given.learning_rate, given.augment) == (0.1, "")


def test_the_model_may_recommend_any_field(monkeypatch):
    monkeypatch.setattr(MODELS["mlp"], "training", {"normalisation": "entry", "epochs": 3})
    config = train_config({"zoo": "a.h5", "model": "mlp"})
    assert (config.normalisation, config.epochs) == ("entry", 3)
    assert train_config({"zoo": "a.h5", "model": "mlp"}, {"normalisation": "none"}).normalisation == "none"
    for changes in ({"model.types": "role"}, {"model.preset": "any"}):
        assert train_config({"zoo": "a.h5", "model": "graph"}, changes).normalisation == "fan_in"
    assert train_config({"zoo": "a.h5", "model": "graph"}).normalisation == "tensor"


def test_options_have_two_names():
    for prefix in ("model", "options"):
        config = train_config({"zoo": "a.h5"}, {f"{prefix}.hidden": 5, "batch_size": 7})
        assert (config.options["hidden"], config.batch_size) == (5, 7)
    assert config.model_options().hidden == 5


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        (
            {},
            {"epoch": 3},
            "train: epoch: unknown field; expected one of zoo, population, where, task, task_options",
        ),
        ({}, {"epochs": 0}, "train: epochs: input should be greater than or equal to 1, found 0"),
        ({}, {"batch_size": 1}, "train: batch_size: input should be greater than or equal to 2, found 1"),
        (
            {},
            {"normalisation": "layer"},
            "train: normalisation: input should be 'tensor', 'entry', 'fan_in' or 'none'",
        ),
        ({}, {"model.hiden": 3}, "model.hiden: unknown option of dws; expected one of hidden, layers"),
        ({"model": "cnn"}, {}, "model: expected one of dws, nfn, unf"),
        ({}, {"model": ["dws"]}, "model: "),
        ({}, {"options": 3}, "options: "),
        (
            {"task": "dance"},
            {},
            "task: expected one of classification, contrastive, editing, regression, found 'dance'",
        ),
        ({}, {"task": ["dance"]}, "task: "),
        (
            {"task": "regression"},
            {},
            "target: task regression predicts a label or metric; name one with --target",
        ),
        ({"task": "editing", "target": "label"}, {}, "target: task editing predicts none, found 'label'"),
        (
            {},
            {"task.loss": "bce"},
            "task.loss: unknown option of classification; expected one of label_smoothing",
        ),
        ({}, {"task.label_smoothing": 1}, "task.label_smoothing: input should be less than 1, found 1"),
        ({"task": "editing"}, {"task.window": 4}, "task.window: value error, input should be odd, found 4"),
        (
            {"task": "editing"},
            {"task.edit": "paint"},
            "task.edit: input should be 'dilate', 'erode', 'contrast' or",
        ),
        ({}, {"task_options": {"x": 1}}, "task_options: "),
        (
            {},
            {"precision": "64"},
            "train: precision: input should be '32', 'bf16-mixed' or '16-mixed', found '64'",
        ),
        ({}, {"accumulate": 0}, "train: accumulate: input should be greater than or equal to 1, found 0"),
        ({}, {"devices": 0}, "train: devices: input should be greater than or equal to 1, found 0"),
        ({}, {"seed": -1}, "train: seed: input should be greater than or equal to 0, found -1"),
    ],
)
def test_mistakes_are_named(values, overrides, message):
    with pytest.raises(
        ConfigError, match="^" + re.escape(message).replace("^", "") + "|" + re.escape(message)
    ) as e:
        train_config({"zoo": "a.h5", **values}, overrides)
    assert "\n" not in str(e.value)


def test_defaults_come_from_the_task_too():
    values = {"zoo": "a.h5", "task": "editing"}
    config = train_config(values, {"task.edit": "erode", "precision": 32})
    assert (config.target, config.augment, config.learning_rate) == (None, "sign", 3e-3)
    assert (config.task_options["edit"], config.task_options["window"]) == ("erode", 3)
    assert config.settings().edit == "erode"
    assert config.precision == "32"
    assert train_config({"zoo": "a.h5"}).target == "label"
    assert train_config({**values, "augment": "noise(0.1)"}).augment == "noise(0.1)"


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
