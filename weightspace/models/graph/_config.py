"""The options of the graph metanetwork, as the command and RUN/config.yaml show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from weightspace.models._registry import MODELS, ModelConfig
from weightspace.models.graph._network import GraphNetwork
from weightspace.models.graph._options import GraphOptions, Layout, Types
from weightspace.models.graph._planning import graph_plan
from weightspace.models.graph._probed import ProbedGraphNetwork
from weightspace.spec import WeightSpec

Aggregation = Literal["mean", "sum", "max", "min", "std"]


@MODELS.register("graph", paper="Lim et al. 2024, arXiv:2312.04501; Kofinas et al. 2024, arXiv:2403.12143")
class GraphConfig(ModelConfig):
    """Message passing over units and weights: networks of any architecture."""

    training: ClassVar[Mapping[str, Any]] = {
        "epochs": 20,
        "learning_rate": 4e-3,
        "augment": "sign, noise(0.05)",
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"style": "pna", "layout": "neural-graphs"},
        "gmn": {"style": "gmn", "layout": "gmn"},
        "any": {"types": "role"},
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
    norm: Literal["batch", "layer"] = Field("batch", description="of nodes; batch: of edges, too")
    layout: Layout = Field("weightspace", description="how weights are laid out as a graph")
    types: Types = Field("tensor", description="types by role, alike for all networks, or one per tensor")
    node_features: int | None = Field(
        None, ge=1, description="width of node features; what the training networks need by default"
    )
    edge_features: int | None = Field(None, ge=1, description="width of edge features, likewise")
    probes: int = Field(0, ge=0, description="learned inputs whose activations the nodes hold; 0 for none")
    generator: Literal["none", "linear"] = Field("linear", description="of the probes, as in model probe")
    input_shape: tuple[int, ...] | None = Field(
        None, description="of one probe, such as [3, 32, 32]; known for MLPs"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the head")
    head: int = Field(128, ge=1, description="hidden units of the head")

    def build(
        self, spec: WeightSpec, architecture: Mapping[str, Any] | None, out_features: int | None
    ) -> nn.Module:
        """A graph network that reads weights of the spec."""
        chosen = self.model_dump()
        options = GraphOptions(**{name: chosen.pop(name) for name in _OF_GRAPHS})
        probing = {name: chosen.pop(name) for name in _OF_PROBES}
        if self.probes == 0:
            return GraphNetwork(spec, out_features, options=options, **chosen)
        network = self.network(architecture)
        return ProbedGraphNetwork(network, spec, out_features, options=options, **probing, **chosen)

    @property
    def recommended(self) -> Mapping[str, Any]:
        """What suits the chosen options.

        Noise changes what units answer far more than the weights, so that it is left out with probes. Types by role
        are for networks of several architectures, which one scale per tensor of one spec would not suit.
        """
        probed = {"augment": "sign"} if self.probes else {}
        alike = {"normalisation": "fan_in"} if self.types == "role" else {}
        return {**self.training, **probed, **alike}

    @property
    def runs_networks(self) -> bool:
        """Whether there are probes."""
        return self.probes > 0

    def settled(self, *specs: WeightSpec) -> GraphConfig | None:
        """These options with the widths that all of the specs need, for types by role."""
        if self.types == "tensor":
            return None
        options = GraphOptions(**self.model_dump(include=set(_OF_GRAPHS)))
        plans = [graph_plan(spec, options) for spec in specs]
        names = ("node_features", "edge_features")
        return self.model_copy(update={name: max(getattr(plan, name) for plan in plans) for name in names})


_OF_GRAPHS = ("layout", "types", "node_features", "edge_features")
_OF_PROBES = ("probes", "generator", "input_shape")
