"""The configuration of a training run: one frozen model, saved in the run as config.yaml."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from weightspace.configuration import validated
from weightspace.errors import ConfigError, RunError
from weightspace.models import MODELS, ModelConfig, model_config
from weightspace.tasks._registry import TASKS, TaskOptions, task_options
from weightspace.zoo import atomic_path


class TrainConfig(BaseModel):
    """Everything that decides a training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zoo: str = Field(..., description="path of the zoo")
    population: str | None = Field(None, description="which one, for zoos with several")
    where: str | None = Field(
        None,
        description='which rows are used, such as "test_accuracy > 0.3 and epoch == last"; all by default',
    )
    task: str = Field("classification", description="what is learned")
    task_options: dict[str, Any] = Field(default_factory=dict, description="options of the task")
    target: str | None = Field(
        None, description="the label, hyperparameter or metric to predict; the task's own by default"
    )
    model: str = Field("dws", description="name of the metanetwork")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the metanetwork")
    normalisation: Literal["tensor", "entry", "fan_in", "none"] = Field(
        "tensor", description="of the weights"
    )
    augment: str = Field("", description='for instance "permutation, sign, noise(0.1)"')
    epochs: int = Field(30, ge=1, description="passes over the training split")
    batch_size: int = Field(64, ge=2, description="networks per step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of AdamW's one-cycle schedule")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    accumulate: int = Field(
        1, ge=1, description="batches whose mean gradient makes one step; an epoch may end with fewer of them"
    )
    precision: Literal["32", "bf16-mixed", "16-mixed"] = Field(
        "32", description="of the arithmetic in training; 16-mixed needs CUDA"
    )
    compile: bool = Field(False, description="whether torch.compile is used; falls back to plain PyTorch")
    devices: int = Field(1, ge=1, description="GPUs, or processes on a CPU, each with batches of its own")
    skip_bad: bool = Field(False, description="leave out networks with NaN or infinite weights or targets")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without improvement")
    seed: int = Field(0, ge=0, lt=2**32, description="of parameters, order and augmentations")

    @field_validator("precision", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if value == 32 else value  # YAML reads 32 as a number

    def settings(self) -> TaskOptions:
        """The validated options of the task."""
        return task_options(self.task, self.task_options)

    def model_options(self) -> ModelConfig:
        """The validated options of the metanetwork."""
        return model_config(self.model, self.options)


def train_config(values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A configuration from what the user gave; the rest comes from what suits the model and the task.

    Args:
        values: fields of ``TrainConfig``; those that are None are left to the defaults.
        overrides: further fields, by dotted names (``model.hidden`` and ``options.hidden`` both name an option
            of the metanetwork, ``task.loss`` one of the task).

    Raises:
        ConfigError: an unknown field, model, task or option, or a value out of range; a target that is missing,
            or that the task has no use for.
    """
    given = {key: value for key, value in values.items() if value is not None}
    options = {"options": dict(given.pop("options", {})), "task_options": dict(given.pop("task_options", {}))}
    for key, value in (overrides or {}).items():
        parent, dot, name = key.partition(".")
        if dot and parent in _PARENTS:
            options[_PARENTS[parent]][name] = value
        else:
            given[key] = value
    for name in options:
        if name in given:
            raise ConfigError(f"{name}: expected single options such as {name}.hidden, found {given[name]!r}")
    model, task = _named(given, "model", MODELS), _named(given, "task", TASKS)
    chosen = model_config(model, options["options"])
    resolved = {
        "options": chosen.model_dump(mode="json"),
        "task_options": task_options(task, options["task_options"]).model_dump(mode="json"),
    }
    recommended = {**chosen.recommended, **TASKS[task].training}
    fields = {**recommended, "target": TASKS[task].target, **given, **resolved}
    config = validated(TrainConfig, fields, ConfigError, "train: ", "unknown field")
    if TASKS[task].needs_target and config.target is None:
        raise ConfigError(f"target: task {task} predicts a label or metric; name one with --target")
    if not TASKS[task].needs_target and config.target is not None:
        raise ConfigError(f"target: task {task} predicts none, found {config.target!r}")
    return config


_PARENTS = {"model": "options", "options": "options", "task": "task_options"}


def _named(given: Mapping[str, Any], field: str, registry: Mapping[str, Any]) -> str:
    """The name under which a model or task is registered."""
    name = given.get(field, TrainConfig.model_fields[field].default)
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"{field}: expected one of {', '.join(registry)}, found {name!r}")
    return name


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the configuration as YAML."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def write_text(path: Path, text: str) -> None:
    """Write a small file of a run in one step, so that a full disk or a kill leaves no half of it."""
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(text)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a small JSON file; NaN and infinite numbers, which JSON lacks, become null."""
    write_text(path, json.dumps(_plain(document), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_config(run: Path) -> TrainConfig:
    """Read the configuration of a run.

    Raises:
        RunError: the directory is not a run, its configuration is damaged, or has fields that are not known.
    """
    values = _stored_values(run)
    unknown = [name for name in values if name not in TrainConfig.model_fields]
    if unknown and is_run(run):
        raise RunError(
            f"run {run}: of another version: config.yaml has the field {unknown[0]!r}, which is not known here; train "
            "again with --overwrite"
        )
    return validated(TrainConfig, values, RunError, f"run {run}: config.yaml: ", "unknown field")


def is_run(run: Path) -> bool:
    """Whether a directory holds a run of whatever version: its config.yaml names a zoo, a task and a model."""
    try:
        return {"zoo", "task", "model"} <= set(_stored_values(run))
    except RunError:
        return False


def _stored_values(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        raise RunError(f"run {run}: not a run directory: config.yaml is missing")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RunError(f"run {run}: config.yaml is not valid YAML") from None
    if not isinstance(values, dict):
        raise RunError(f"run {run}: config.yaml should hold a mapping of fields")
    return values
