"""Metanetworks by name: one frozen configuration per model, from which it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import nn

from weightspace.configuration import Registry, validated
from weightspace.errors import ConfigError
from weightspace.spec import WeightSpec


@runtime_checkable
class FittedOnce(Protocol):
    """A model that is fitted in one go rather than by gradient steps (trees)."""

    def fit_once(self, weights: Any, targets: Any) -> None:
        """Fit on the whole training split."""
        ...


class ModelConfig(BaseModel):
    """Base of the options of a metanetwork.

    Attributes:
        name: under which it is registered.
        paper: where it was published.
        reads: ``"normalised"`` weights, or ``"raw"`` ones for models that run the networks.
        training: defaults of the training configuration that suit this model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    paper: ClassVar[str]
    reads: ClassVar[str] = "normalised"
    training: ClassVar[Mapping[str, Any]] = {}

    def build(self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int) -> nn.Module:
        """The model, with fresh parameters."""
        raise AssertionError(f"{type(self).__name__} builds nothing")


MODELS: Registry[type[ModelConfig]] = Registry("model", "name")
"""The metanetworks that ``--model`` names; ``@MODELS.register("name", paper="...")`` adds one."""


def model_config(name: str, options: Mapping[str, Any] | None = None) -> ModelConfig:
    """The validated options of a model.

    Raises:
        ConfigError: an unknown model or option, or a value out of range.

    Example:
        >>> model_config("dws", {"hidden": 16}).hidden
        16
    """
    if name not in MODELS:
        raise ConfigError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    return validated(MODELS[name], options or {}, ConfigError, "model.", f"unknown option of {name}")
