"""Metanetworks by name: one frozen configuration per model, from which it is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict
from torch import nn

from weightspace.configuration import Registry, validated
from weightspace.errors import ConfigError
from weightspace.nets import build
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
        reads: ``"normalised"`` weights, or ``"raw"`` ones for models that only run the networks.
        training: defaults of the training configuration that suit this model.
        presets: options by name; ``paper`` comes as near to the publication as the options go, and the docstring of
            the model says what still differs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    paper: ClassVar[str]
    reads: ClassVar[str] = "normalised"
    training: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """The model, with fresh parameters: (batch, out_features) out of weights, or weights if that is None.

        Raises:
            ConfigError: the model cannot give weights, or cannot read networks of this kind.
        """
        raise AssertionError(f"{type(self).__name__} builds nothing")

    @property
    def recommended(self) -> Mapping[str, Any]:
        """``training``, as far as it suits these options."""
        return self.training

    @property
    def runs_networks(self) -> bool:
        """Whether the model runs the networks that it reads, so that their architecture matters."""
        return self.reads == "raw"

    def settled(self, *specs: WeightSpec) -> ModelConfig | None:
        """Options that give a model for any spec the parameters that these give the one for ``spec``.

        Of several specs, for all of which they suffice. None if a model reads networks of its own spec alone.
        """
        return None

    @classmethod
    def network(cls, architecture: Mapping[str, Any] | None) -> nn.Module:
        """A network to run, as the zoo describes it.

        Raises:
            ConfigError: the zoo does not say how to rebuild its networks.
        """
        if architecture is None:
            raise ConfigError(
                f"model {cls.name}: the zoo does not say how to rebuild its networks, so none can be run"
            )
        return build(architecture)

    @classmethod
    def numbers(cls, out_features: int | None) -> int:
        """The size of the output, of models that cannot give weights.

        Raises:
            ConfigError: weights are asked for.
        """
        if out_features is None:
            raise ConfigError(f"model {cls.name}: gives numbers and no weights; take dws, nfn, unf or graph")
        return out_features


MODELS: Registry[type[ModelConfig]] = Registry("model", "name")
"""The metanetworks that ``--model`` names; ``@MODELS.register("name", paper="...")`` adds one."""


def model_config(name: str, options: Mapping[str, Any] | None = None) -> ModelConfig:
    """The validated options of a model; ``preset`` names a set of them, over which the others go.

    Raises:
        ConfigError: an unknown model or option, or a value out of range.

    Example:
        >>> model_config("dws", {"hidden": 16}).hidden
        16
        >>> model_config("dws", {"preset": "paper"}).attention
        8
    """
    if name not in MODELS:
        raise ConfigError(f"model: expected one of {', '.join(MODELS)}, found {name!r}")
    chosen = dict(options or {})
    preset = chosen.pop("preset", None)
    if preset is not None:
        known = MODELS[name].presets
        if preset not in known:
            names = ", ".join(known) or "none"
            raise ConfigError(f"model.preset: {name} has the presets {names}, found {preset!r}")
        chosen = {**known[preset], **chosen}
    return validated(MODELS[name], chosen, ConfigError, "model.", f"unknown option of {name}")
