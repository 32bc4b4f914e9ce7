"""How a weight space becomes a graph: the choices, and the names of the kinds of nodes and edges."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Layout = Literal["weightspace", "gmn", "neural-graphs"]
Types = Literal["role", "tensor"]

NODE_ROLES = ("hidden", "input", "output", "global", "factor", "bias")
EDGE_ROLES = (
    *("weight", "recurrent", "bias", "membership", "factor"),
    *("weight reversed", "recurrent reversed", "bias reversed", "membership reversed", "factor reversed"),
)
ACTIVATIONS = (
    *(
        "none",
        "other",
        "relu",
        "leaky_relu",
        "prelu",
        "elu",
        "selu",
        "celu",
        "gelu",
        "silu",
        "mish",
        "softplus",
    ),
    *("sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "glu", "sine", "cosine", "gaussian", "exp"),
)


class GraphOptions(BaseModel):
    """How weights are laid out as a graph.

    Layouts:

    - ``"weightspace"``: everything that one unit owns (biases, norm scales and shifts, statistics) is a feature
      of its node; a weight between two units is an edge.
    - ``"gmn"``, of Lim et al. 2024 (arXiv:2312.04501): what one unit owns is an edge to it from an extra node,
      one for each bias, norm scale and norm shift. Different here: the entries of a convolution kernel are the
      features of one edge, not parallel edges.
    - ``"neural-graphs"``, of Kofinas et al. 2024 (arXiv:2403.12143): biases are node features, weights and
      flattened kernels edge features, input and output units carry positions. The ``"weightspace"`` layout
      without its extensions; refuses all that perceptrons and plain convolutional networks lack. Different here:
      kernels are flattened before they are zero-padded, a linear layer on flattened channels is one edge per
      channel with the positions as features, and norms, as the biases, are node features.

    Attributes:
        layout: see above.
        types: ``"role"``: integer types that mean the same for every architecture, places in ``NODE_ROLES`` and
            ``EDGE_ROLES``; ``"tensor"``: one type for each node set and edge set of the spec.
        node_features: width to which node features are zero-padded; None for what the spec needs.
        edge_features: likewise of edges.
        input_features: width of further features of nodes, such as the units' activations; 0 for none.
        reverse: whether each edge also has a reversed twin, for networks that send messages one way only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layout: Layout = Field("weightspace", description="how weights are laid out as a graph")
    types: Types = Field("role", description="types by role, alike for all networks, or one per tensor")
    node_features: int | None = Field(None, ge=1, description="width of node features")
    edge_features: int | None = Field(None, ge=1, description="width of edge features")
    input_features: int = Field(0, ge=0, description="width of further features of nodes")
    reverse: bool = Field(False, description="a reversed twin for each edge")
