"""The configuration of a training run: one frozen model, saved in the run as config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from weightspace.configuration import validated
from weightspace.errors import ConfigError, RunError
from weightspace.models import MODELS, ModelConfig, model_config
from weightspace.tasks._registry import TASKS
from weightspace.zoo import atomic_path


class TrainConfig(BaseModel):
    """Everything that decides a training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zoo: str = Field(..., description="path of the zoo")
    population: str | None = Field(None, description="which one, for zoos with several")
    task: str = Field("classification", description="what is learned")
    target: str = Field("label", description="name of the label or metric to predict")
    model: str = Field("dws", description="name of the metanetwork")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the metanetwork")
    normalisation: Literal["tensor", "entry", "none"] = Field("tensor", description="of the weights")
    augment: str = Field("", description='for instance "permutation, sign, noise(0.1)"')
    epochs: int = Field(30, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=2, description="networks per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of AdamW's one-cycle schedule")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the label spread over all classes")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without improvement")
    seed: int = Field(0, ge=0, lt=2**32, description="of parameters, order and augmentations")

    def model_options(self) -> ModelConfig:
        """The validated options of the metanetwork."""
        return model_config(self.model, self.options)


def train_config(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration from what the user gave; the rest comes from the model's recommended training.

    Args:
        values: fields of ``TrainConfig``; those that are None are left to the defaults.
        overrides: further fields, by dotted names (``model.hidden`` and ``options.hidden`` both name an option
            of the metanetwork).

    Raises:
        ConfigError: an unknown field, model or option, or a value out of range.
    """
    given = {key: value for key, value in values.items() if value is not None}
    options = dict(given.pop("options", {}))
    for key, value in (overrides or {}).items():
        parent, dot, name = key.partition(".")
        if dot and parent in ("model", "options"):
            options[name] = value
        else:
            given[key] = value
    if "options" in given:
        raise ConfigError(
            f"options: expected single options such as options.hidden, found {given['options']!r}"
        )
    name = given.get("model", TrainConfig.model_fields["model"].default)
    if not isinstance(name, str):
        raise ConfigError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    recommended = MODELS[name].training if name in MODELS else {}
    resolved = model_config(name, options).model_dump(mode="json")
    config = validated(
        TrainConfig, {**recommended, **given, "options": resolved}, ConfigError, "train: ", "unknown field"
    )
    if config.task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, found {config.task!r}")
    return config


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def write_text(path: Path, text: str) -> None:
    """Write a small file of a run in one step, so that a full disk or a kill leaves no half of it."""
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text)


def load_config(run: Path) -> TrainConfig:
    """Read the configuration of a run.

    Raises:
        RunError: the directory is not a run, or its configuration is damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise RunError(f"run {run}: not a run directory: config.yaml is missing")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RunError(f"run {run}: config.yaml is not valid YAML") from None
    if not isinstance(values, dict):
        raise RunError(f"run {run}: config.yaml should hold a mapping of fields")
    return validated(TrainConfig, values, RunError, f"run {run}: config.yaml: ", "unknown field")
