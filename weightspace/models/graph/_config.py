"""The options of the graph metanetwork, as the command and RUN/config.yaml show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from weightspace.models._registry import MODELS, ModelConfig
from weightspace.models.graph._network import GraphNetwork
from weightspace.models.graph._options import GraphOptions, Layout, Types
from weightspace.spec import WeightSpec

Aggregation = Literal["mean", "sum", "max", "min", "std"]


@MODELS.register("graph", paper="Lim et al. 2024, arXiv:2312.04501; Kofinas et al. 2024, arXiv:2403.12143")
class GraphConfig(ModelConfig):
    """Message passing over units and weights: networks of any architecture."""

    training: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "learning_rate": 1e-3,
        "augment": "sign, noise(0.05)",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"hidden": 64, "style": "pna", "layout": "neural-graphs"},
        "gmn": {"style": "gmn", "layout": "gmn"},
    }

    hidden: int = Field(32, ge=1, description="channels per unit and weight")
    layers: int = Field(4, ge=1, description="steps of message passing")
    style: Literal["pna", "gmn"] = Field(
        "pna",
        description="pna: of neural graphs; gmn: of graph metanetworks, with features of whole networks",
    )
    aggregation: tuple[Aggregation, ...] | None = Field(
        None, min_length=1, description="of messages; pna: mean, max, min, std; gmn: mean"
    )
    layout: Layout = Field("weightspace", description="how weights are laid out as a graph")
    types: Types = Field("tensor", description="types by role, alike for all networks, or one per tensor")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the head")
    head: int = Field(128, ge=1, description="hidden units of the head")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """A graph network that reads weights of the spec."""
        options = GraphOptions(layout=self.layout, types=self.types)
        chosen = self.model_dump(exclude={"layout", "types"})
        return GraphNetwork(spec, out_features, options=options, **chosen)
