"""Graph metanetworks: message passing over the graphs of networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models.graph._layer import DEFAULT_AGGREGATION, STYLES, GraphLayer
from weightspace.models.graph._options import ACTIVATIONS, EDGE_ORDERS, EDGE_ROLES, NODE_ROLES, GraphOptions
from weightspace.models.graph._plan import GraphPlan
from weightspace.models.graph._planning import graph_plan
from weightspace.models.graph._topology import DenseTopology, Edges, SparseTopology, Topology
from weightspace.spec import Weights, WeightSpec

if TYPE_CHECKING:
    from torch_geometric.data import Batch
else:
    Batch = Any

POSITIONS = 16  # sines and cosines of a position


class GraphNetwork(nn.Module):
    """A graph metanetwork for classification, regression or editing of networks of any architecture.

    Invariant: ``model(g . W) == model(W)`` for all permutations g of the spec. Without ``out_features`` the final
    features of nodes and edges are read as weights: ``model(g . W) == g . model(W)``.

    Weights of the spec take a path without scatter, in which every edge set is a dense tensor; graphs, of any
    architecture with the same widths of features, take the sparse one. Both give the same numbers.

    Args:
        spec: the weight space; None for a model that reads graphs only.
        out_features: size of the output, for instance the number of classes; None for weights.
        options: of the graphs; types by tensor with a spec and by role without one, by default.
        hidden: channels of nodes and edges.
        layers: number of message passing steps, at least 1.
        style: ``"pna"`` or ``"gmn"``; see :class:`GraphLayer`.
        aggregation: some of mean, sum, max, min and std; None for what the style's paper has.
        norm: ``"batch"`` or ``"layer"``; see :class:`GraphLayer`.
        context_features: width of further features of whole networks, which the head reads; 0 for none.
        dropout: probability with which a unit of the head is dropped.
        head: hidden units of the head.

    Shapes:
        Weights with one batch axis -> (batch, out_features), or weights of the same shapes;
        graphs -> (graphs, out_features), or graphs with new ``x`` and ``edge_attr``.

    Raises:
        ConfigError: an option out of range; no spec, and options that leave widths or types to it.
        SpecError: a spec that the layout cannot hold.

    Reference:
        Lim et al. 2024, "Graph Metanetworks for Processing Diverse Neural Architectures", arXiv:2312.04501;
        Kofinas et al. 2024, "Graph Neural Networks for Learning Equivariant Representations of Neural Networks",
        arXiv:2403.12143.

    Example:
        >>> spec = WeightSpec.mlp([2, 32, 32, 1], activation="sine", w0=30.0)
        >>> model = GraphNetwork(spec, out_features=10, hidden=8, layers=2)
        >>> model(spec.unflatten(torch.randn(4, spec.num_parameters))).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        spec: WeightSpec | None,
        out_features: int | None = None,
        *,
        options: GraphOptions | None = None,
        hidden: int = 32,
        layers: int = 4,
        style: str = "pna",
        aggregation: Sequence[str] | None = None,
        norm: str = "batch",
        context_features: int = 0,
        dropout: float = 0.0,
        head: int = 128,
    ) -> None:
        super().__init__()
        _check(hidden, layers, style, dropout)
        self.options = options or GraphOptions(types="role" if spec is None else "tensor")
        self.plan = None if spec is None else graph_plan(spec, self.options)
        self.dense = None if self.plan is None else DenseTopology(self.plan)
        self.encode = _Encoder(self.options, self.plan, hidden)
        self.start: Tensor  # of the features of the networks as a whole, which only one style has
        if style == "gmn":
            self.start = nn.Parameter(torch.randn(hidden))
        else:
            self.register_buffer("start", torch.zeros(hidden), persistent=False)
        how = tuple(aggregation or DEFAULT_AGGREGATION[style])
        self.layers = nn.ModuleList(GraphLayer(hidden, style, how, norm=norm) for _ in range(layers - 1))
        read_edges = ("edges",) if out_features is None else ()
        self.layers.append(GraphLayer(hidden, style, how, norm=norm, update=read_edges))
        self.read: nn.Module | None = None
        if out_features is None:
            self.node_out = nn.Linear(hidden, self.encode.node_features)
            self.edge_out = nn.Linear(hidden, self.encode.edge_features)
        else:
            self.read = nn.Sequential(
                nn.Linear(2 * hidden * self.encode.node_types + context_features, head),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(head, out_features),
            )

    def forward(
        self,
        networks: Weights | Batch,
        node_inputs: Mapping[str, Tensor] | None = None,
        context: Tensor | None = None,
    ) -> Tensor | Weights | Batch:
        """Read a batch of networks.

        Args:
            networks: weights of the spec, or graphs.
            node_inputs: with weights, further features by name of a node set, (batch, *sizes of the set,
                input_features); graphs hold theirs in ``inputs``.
            context: further features of the networks, (batch, context_features), if the model has any.

        Raises:
            ConfigError: weights without a spec, or graphs that were made with other options.
            SpecError: weights of another spec.
        """
        if isinstance(networks, Mapping):
            return self._from_weights(networks, node_inputs, context)
        return self._from_graphs(networks, context)

    def _from_weights(
        self,
        weights: Mapping[str, Tensor],
        node_inputs: Mapping[str, Tensor] | None,
        context: Tensor | None,
    ) -> Tensor | Weights:
        if self.plan is None or self.dense is None:
            raise ConfigError(
                "graph network: reads weights only if it was built with their spec; give it graphs from to_graph"
            )
        nodes, attributes = self.plan.features(weights)
        inputs = self.plan.inputs(node_inputs, nodes) if self.options.input_features else None
        x, edges = self.encode.dense(self.plan, nodes, attributes, inputs)
        x, edges = self._passed(self.dense, x, edges, len(nodes))
        if self.read is not None:
            return self._read(self.dense.by_type(x, self.encode.node_types), context)
        flat = torch.cat([self.edge_out(part).flatten(1, 3) for part in edges] or [attributes], dim=1)
        return self.plan.weights(self.node_out(x), flat)

    def _from_graphs(self, graphs: Batch, context: Tensor | None) -> Tensor | Batch:
        self.encode.check(graphs)
        size = int(graphs.num_graphs)
        topology = SparseTopology(graphs.edge_index, graphs.batch, graphs.node_type, size)
        x, edges = self.encode.sparse(graphs)
        x, edges = self._passed(topology, x, edges, size)
        if self.read is not None:
            return self._read(topology.by_type(x, self.encode.node_types), context)
        found = copy.copy(graphs)
        found.x, found.edge_attr = self.node_out(x), self.edge_out(edges[0])
        return found

    def _read(self, pooled: Tensor, context: Tensor | None) -> Tensor:
        assert self.read is not None
        out: Tensor = self.read(pooled if context is None else torch.cat([pooled, context], dim=-1))
        return out

    def _passed(self, graph: Topology, x: Tensor, edges: Edges, size: int) -> tuple[Tensor, Edges]:
        u = self.start.expand(size, -1)
        for layer in self.layers:
            x, edges, u = layer(graph, x, edges, u)
        return x, edges


class _Encoder(nn.Module):
    """First features of nodes and edges: their entries, types, activations, positions and further inputs."""

    def __init__(self, options: GraphOptions, plan: GraphPlan | None, hidden: int) -> None:
        super().__init__()
        if plan is None and (
            options.types == "tensor" or options.node_features is None or options.edge_features is None
        ):
            raise ConfigError(
                "graph network: without a spec, expected GraphOptions with types='role', node_features and "
                f"edge_features, found {options.types!r}, {options.node_features}, {options.edge_features}"
            )
        self.node_features = plan.node_features if plan else int(options.node_features or 1)
        self.edge_features = plan.edge_features if plan else int(options.edge_features or 1)
        self.node_types = plan.num_node_types if plan else len(NODE_ROLES)
        self.edge_types = plan.num_edge_types if plan else len(EDGE_ROLES)
        self.node = nn.Linear(self.node_features, hidden)
        self.edge = nn.Linear(self.edge_features, hidden)
        self.node_type = nn.Embedding(self.node_types, hidden)
        self.edge_type = nn.Embedding(max(self.edge_types, 1), hidden)
        self.edge_order: nn.Embedding | None = None
        if options.types == "role":  # types by tensor tell parallel edges apart by themselves
            self.edge_order = nn.Embedding.from_pretrained(torch.zeros(EDGE_ORDERS, hidden), freeze=False)
        self.activation = nn.Embedding(len(ACTIVATIONS), hidden)
        self.position = nn.Linear(POSITIONS, hidden, bias=False)
        width = options.input_features
        self.inputs = nn.Linear(width, hidden, bias=False) if width else None
        columns = {**plan.node_columns, **plan.edge_columns} if plan else {}
        for name in ("node_type", "activation", "position"):
            self.register_buffer(f"{name}_of", columns.get(name), persistent=False)

    def dense(
        self, plan: GraphPlan, nodes: Tensor, attributes: Tensor, inputs: Tensor | None
    ) -> tuple[Tensor, Edges]:
        """Nodes (batch, nodes, hidden) and a tensor (batch, blocks, targets, sources, hidden) per edge set."""
        columns = [self.get_buffer(f"{name}_of") for name in ("node_type", "activation", "position")]
        x = self.node(nodes) + self._constants(*columns)
        if self.inputs is not None and inputs is not None:
            x = x + self.inputs(inputs)
        parts = attributes.split([edges.count for edges in plan.edges], dim=1)
        by_role = plan.options.types == "role"
        found = []
        for number, (edges, part) in enumerate(zip(plan.edges, parts, strict=True)):
            kind = EDGE_ROLES.index(edges.role) if by_role else number
            bias = self.edge.bias + self.edge_type.weight[kind]
            if self.edge_order is not None:
                bias = bias + self.edge_order.weight[edges.order % EDGE_ORDERS]
            encoded = nn.functional.linear(part, self.edge.weight, bias)
            found.append(encoded.view(len(x), *edges.shape, -1))
        return x, found

    def sparse(self, graphs: Batch) -> tuple[Tensor, Edges]:
        """Nodes (all nodes, hidden) and edges (all edges, hidden)."""
        constants = self._constants(graphs.node_type, graphs.activation, graphs.position)
        x = self.node(graphs.x) + constants
        if self.inputs is not None:
            x = x + self.inputs(graphs.inputs)
        edges = self.edge(graphs.edge_attr) + self.edge_type(graphs.edge_type)
        if self.edge_order is not None:
            edges = edges + self.edge_order(graphs.edge_order)
        return x, [edges]

    def _constants(self, types: Tensor, activations: Tensor, positions: Tensor) -> Tensor:
        encoded = _encoded(positions).to(self.position.weight)
        out: Tensor = self.node_type(types) + self.activation(activations) + self.position(encoded)
        return out

    def check(self, graphs: Batch) -> None:
        """Raise ConfigError for graphs that were made with other options."""
        inputs = graphs.inputs.shape[-1] if "inputs" in graphs else 0
        found = (graphs.x.shape[-1], graphs.edge_attr.shape[-1], inputs)
        width = self.inputs.in_features if self.inputs is not None else 0
        expected = (self.node_features, self.edge_features, width)
        if found != expected:
            raise ConfigError(
                f"graphs: expected {expected[0]} features per node, {expected[1]} per edge and {expected[2]} further "
                f"inputs, found {found[0]}, {found[1]} and {found[2]}; make them with the options of the model"
            )
        for name, known in (("node_type", self.node_types), ("edge_type", self.edge_types)):
            types = graphs[name]
            if len(types) and int(types.max()) >= known:
                raise ConfigError(
                    f"graphs: {name} reaches {int(types.max())}, and the model knows {known}; make them with the "
                    "options of the model, and with types='role' for several architectures"
                )


def _encoded(positions: Tensor) -> Tensor:
    """Sines and cosines of each position, (..., 16), zeros for -1."""
    rates = torch.exp(
        torch.arange(POSITIONS // 2, device=positions.device) * (-math.log(1e4) * 2 / POSITIONS)
    )
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1) * (positions[:, None] >= 0)


def _check(hidden: int, layers: int, style: str, dropout: float) -> None:
    if hidden < 1 or layers < 1 or not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"graph network: expected hidden >= 1, layers >= 1 and dropout in [0, 1), found {hidden}, {layers}, "
            f"{dropout}"
        )
    if style not in STYLES:
        raise ConfigError(f"style: expected one of {', '.join(STYLES)}, found {style!r}")
