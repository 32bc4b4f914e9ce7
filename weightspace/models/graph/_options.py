"""How a weight space becomes a graph: the choices, and the names of the kinds of nodes and edges."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Layout = Literal["weightspace", "gmn", "neural-graphs"]
Types = Literal["role", "tensor"]

NODE_ROLES = ("hidden", "input", "output", "global", "factor", "bias")
SLOTS = ("bias", "scale", "shift", "mean", "variance")
_FORWARD = ("weight", "recurrent", "membership", "factor", *SLOTS, "other")
EDGE_ROLES = (*_FORWARD, *(f"{role} reversed" for role in _FORWARD))
EDGE_ORDERS = 8  # parallel edge sets that are told apart
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
      one for each bias, norm scale, norm shift and statistic. Different here: the entries of a convolution kernel are the
      features of one edge, not parallel edges.
    - ``"neural-graphs"``, of Kofinas et al. 2024 (arXiv:2403.12143): biases are node features, weights and
      flattened kernels edge features, input and output units carry positions. The ``"weightspace"`` layout
      without its extensions; refuses scalars, nested groups, more than two indices, and units that more than one
      weight reads or writes, as in residual, recurrent and gated networks. Different here:
      kernels are flattened before they are zero-padded, a linear layer on flattened channels is one edge per
      channel with the positions as features, and norms, as the biases, are node features.

    Types by role mean the same for every architecture. For these, what a unit owns has its column by what it does to
    the unit: columns 0 to 4 hold one bias, norm scale, norm shift, running mean and running variance (``SLOTS``),
    columns 5 to 9 the next of each, and so on; everything else (depthwise kernels, entries by position, tensors of
    other names) fills the columns from the last one back, so that networks to be compared need equal
    ``node_features``. In the layout ``"gmn"`` these are roles of edges. What a tensor does is told by its kind, its
    orientation and the end of its name (``bias``, ``weight`` of one entry per unit, ``running_mean``,
    ``running_var``). Edge sets of one role between the same two node sets, such as gates, queries and keys, are
    numbered: ``edge_order``, modulo 8.

    Edges go from input to output units, as the trace found them, in a transposed convolution as in a linear layer. A
    row of an embedding is an input unit, and so is a position of a table that is added to units, such as (1, length,
    width): one edge per position and unit. A depthwise convolution has no input units: its kernel is a feature of the
    channel. Inputs that a later layer reads again, beside hidden units, are the same nodes if they are as many.

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
