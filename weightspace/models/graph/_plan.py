"""The graph of a weight space without its weights: node sets, edge sets, and where each entry goes.

All of it follows from the spec. One node stands for one unit of a group, or of the input or output; the cells of
the tensors become features of nodes and edges by the number of their independent indices, that is of those that
no other index of the cell lies within:

- none: features of the one global node;
- one: features of that unit's node (in the layout ``"gmn"``, of an edge to it from an extra node);
- two: features of an edge from the input unit to the output unit, as the tensor's orientation in the spec has them;
- three and more (bilinear layers, grouped queries): features of a factor node per entry, with an edge to each of
  its units.

Fixed indices on the axes of input and output units are units as well; so are the positions of a table that is added
to units, and the rows of an embedding. All others (kernel positions) are neighbouring features. A nested group has
one node for each of its units in each outer unit, with membership edges from it to that one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.models.graph._options import (
    ACTIVATIONS,
    EDGE_ORDERS,
    EDGE_ROLES,
    NODE_ROLES,
    GraphOptions,
)
from weightspace.spec import Cell, Weights, WeightSpec, cell_view


@dataclass(frozen=True)
class NodeSet:
    """Nodes of one kind.

    Args:
        name: of the group, ``"end0"``, ``"end1"``, ... for input and output units, or of the tensor.
        sizes: numbers of outer units, then of units in each; row by row they number the nodes.
        role: one of ``NODE_ROLES``.
        activation: that the units apply.
        start: number of the first node in its graph.
    """

    name: str
    sizes: tuple[int, ...]
    role: str
    activation: str | None = None
    start: int = 0

    @property
    def count(self) -> int:
        """Number of nodes."""
        return math.prod(self.sizes)

    @property
    def ordered(self) -> bool:
        """Whether the nodes have positions: nothing permutes input and output units."""
        return self.role in ("input", "output")


@dataclass(frozen=True, eq=False)
class EdgeSet:
    """Edges of one kind: those of a cell, or between units and what they belong to.

    In each of some blocks, every source of that block has an edge to every target of it. A matrix is one block; a
    grouped convolution has one per group of channels.

    Args:
        name: of the tensor, and of the cell where it has several.
        role: one of ``EDGE_ROLES``.
        source: number of the node set from which they come.
        target: number of the node set to which they go.
        sources: nodes of that set, (blocks, sources); each node occurs once.
        targets: nodes of that set, (blocks, targets).
        start: number of the first edge in its graph; they are numbered by block, target, source.
        order: number of the set among those of its role between the same two node sets, such as gates.
    """

    name: str
    role: str
    source: int
    target: int
    sources: Tensor
    targets: Tensor
    start: int = 0
    order: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, targets and sources."""
        return (*self.targets.shape, self.sources.shape[1])

    @property
    def count(self) -> int:
        """Number of edges."""
        return math.prod(self.shape)

    def reversed(self) -> EdgeSet:
        """The same edges from target to source."""
        return EdgeSet(
            f"{self.name} reversed",
            f"{self.role} reversed",
            self.target,
            self.source,
            self.targets,
            self.sources,
            order=self.order,
        )


@dataclass(frozen=True)
class Place:
    """Where the entries of one cell are.

    Args:
        tensor: its name.
        cell: the cell.
        order: its dims in the order of nodes or edges, then the fixed ones.
        fixed: number of entries per node or edge.
        on_nodes: whether on nodes or on edges.
        at: number of the node set or edge set.
        column: of the first entry among the features; while a plan is made, from the last one back if below 0.
    """

    tensor: str
    cell: Cell
    order: tuple[int, ...]
    fixed: int
    on_nodes: bool
    at: int
    column: int = 0


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """The graph of every network of a spec; see :func:`graph_plan`.

    Attributes:
        spec: the weight space.
        options: as they were given.
        nodes: the node sets, in the order of their nodes.
        edges: the edge sets, in the order of their edges.
        places: where each cell is, in the order of the tensors.
        node_features: width of node features.
        edge_features: width of edge features.

    Example:
        >>> from weightspace.models import graph_plan
        >>> print(graph_plan(WeightSpec.mlp([2, 32, 1])))
        hidden0: 32 hidden nodes
        end0: 2 input nodes
        end1: 1 output nodes
        layers.0.weight: 64 weight edges, end0 -> hidden0
        layers.1.weight: 32 weight edges, hidden0 -> end1
    """

    spec: WeightSpec
    options: GraphOptions
    nodes: tuple[NodeSet, ...]
    edges: tuple[EdgeSet, ...]
    places: tuple[Place, ...]
    node_features: int
    edge_features: int

    def __str__(self) -> str:
        lines = [f"{nodes.name}: {nodes.count} {nodes.role} nodes" for nodes in self.nodes]
        return "\n".join(lines + [self._edge_text(edges) for edges in self.edges])

    def _edge_text(self, edges: EdgeSet) -> str:
        ends = f"{self.nodes[edges.source].name} -> {self.nodes[edges.target].name}"
        return f"{edges.name}: {edges.count} {edges.role} edges, {ends}"

    @property
    def num_nodes(self) -> int:
        """Number of nodes per network."""
        return sum(nodes.count for nodes in self.nodes)

    @property
    def num_edges(self) -> int:
        """Number of edges per network."""
        return sum(edges.count for edges in self.edges)

    @property
    def num_node_types(self) -> int:
        """Number of node types that there can be."""
        return len(NODE_ROLES) if self.options.types == "role" else len(self.nodes)

    @property
    def num_edge_types(self) -> int:
        """Number of edge types that there can be."""
        return len(EDGE_ROLES) if self.options.types == "role" else len(self.edges)

    @cached_property
    def node_columns(self) -> dict[str, Tensor]:
        """What does not depend on the weights, per node: set, type, activation, position (-1 for none); int64."""
        roles = [NODE_ROLES.index(nodes.role) for nodes in self.nodes]
        number = list(range(len(self.nodes)))
        activations = [_activation(nodes.activation) for nodes in self.nodes]
        positions = [
            torch.arange(nodes.count) if nodes.ordered else torch.full((nodes.count,), -1)
            for nodes in self.nodes
        ]
        counts = [nodes.count for nodes in self.nodes]
        return {
            "node_set": _repeated(number, counts),
            "node_type": _repeated(roles if self.options.types == "role" else number, counts),
            "activation": _repeated(activations, counts),
            "position": torch.cat([torch.zeros(0, dtype=torch.long), *positions]),
        }

    @cached_property
    def edge_columns(self) -> dict[str, Tensor]:
        """What does not depend on the weights, per edge: set, type, and order modulo ``EDGE_ORDERS``; int64."""
        number = list(range(len(self.edges)))
        orders = [edges.order % EDGE_ORDERS for edges in self.edges]
        roles = [EDGE_ROLES.index(edges.role) for edges in self.edges]
        counts = [edges.count for edges in self.edges]
        return {
            "edge_set": _repeated(number, counts),
            "edge_type": _repeated(roles if self.options.types == "role" else number, counts),
            "edge_order": _repeated(orders, counts),
        }

    @cached_property
    def edge_index(self) -> Tensor:
        """Source and target node of each edge, (2, edges), int64."""
        columns = [torch.zeros(2, 0, dtype=torch.long)]
        for edges in self.edges:
            sources = edges.sources[:, None, :].expand(edges.shape) + self.nodes[edges.source].start
            targets = edges.targets[:, :, None].expand(edges.shape) + self.nodes[edges.target].start
            columns.append(torch.stack([sources.flatten(), targets.flatten()]))
        return torch.cat(columns, dim=1)

    def features(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features of nodes (batch, nodes, node_features) and of edges (batch, edges, edge_features).

        Raises:
            SpecError: weights of another spec, or not one batch axis.
        """
        batch = _checked_batch(self.spec, weights)
        first = next(iter(weights.values()))
        x = first.new_zeros(batch, self.num_nodes, self.node_features)
        parts: dict[int, Tensor] = {}
        for place in self.places:
            # reshape alone may give a view whose entries are not next to each other
            flat = weights[place.tensor].reshape(batch, -1).contiguous()
            view = cell_view(flat, place.cell).permute(0, *(1 + at for at in place.order))
            values = view.reshape(batch, -1, place.fixed)
            if place.on_nodes:
                nodes = self.nodes[place.at]
                last = place.column + place.fixed
                x[:, nodes.start : nodes.start + nodes.count, place.column : last] = values
            else:
                parts[place.at] = _padded(values, self.edge_features)
        return x, self._edge_features(parts, first, batch)

    def _edge_features(self, parts: dict[int, Tensor], like: Tensor, batch: int) -> Tensor:
        forward = len(self.edges) // 2 if self.options.reverse else len(self.edges)
        found = [like.new_zeros(batch, 0, self.edge_features)]
        for number, edges in enumerate(self.edges):
            of = number % forward
            if of not in parts:
                found.append(like.new_zeros(batch, edges.count, self.edge_features))
            elif number == of:
                found.append(parts[of])
            else:
                twin = parts[of].unflatten(1, self.edges[of].shape)
                found.append(twin.transpose(2, 3).flatten(1, 3))
        return torch.cat(found, dim=1)

    def weights(self, x: Tensor, edge_attr: Tensor) -> Weights:
        """The weights that features hold; the inverse of :meth:`features`."""
        flat = {name: x.new_empty(len(x), tensor.numel) for name, tensor in self.spec.tensors.items()}
        for place in self.places:
            owner = self.nodes[place.at] if place.on_nodes else self.edges[place.at]
            source = x if place.on_nodes else edge_attr
            last = place.column + place.fixed
            part = source[:, owner.start : owner.start + owner.count, place.column : last]
            sizes = [place.cell.sizes[at] for at in place.order]
            back = sorted(range(len(sizes)), key=place.order.__getitem__)
            view = part.reshape(len(x), *sizes).permute(0, *(1 + at for at in back))
            cell_view(flat[place.tensor], place.cell).copy_(view)
        return {name: flat[name].reshape(len(x), *tensor.shape) for name, tensor in self.spec.tensors.items()}

    def inputs(self, node_inputs: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
        """Further features of nodes by name of their set, as one tensor (batch, nodes, input_features).

        Args:
            node_inputs: (batch, *sizes of the set, features) by name; sets that are left out get zeros.
            like: a tensor of the same batch size.

        Raises:
            ConfigError: a set that does not exist, or another shape.
        """
        width = self.options.input_features
        out = like.new_zeros(len(like), self.num_nodes, width)
        known = {nodes.name: nodes for nodes in self.nodes}
        for name, values in (node_inputs or {}).items():
            if name not in known:
                raise ConfigError(f"node_inputs: expected some of {', '.join(known)}, found {name!r}")
            nodes = known[name]
            expected = (len(like), *nodes.sizes, width)
            if tuple(values.shape) != expected:
                raise ConfigError(
                    f"node_inputs: {name!r} should have shape {list(expected)}, found {list(values.shape)}"
                )
            out[:, nodes.start : nodes.start + nodes.count] = values.reshape(len(like), -1, width)
        return out


def _checked_batch(spec: WeightSpec, weights: Mapping[str, Tensor]) -> int:
    missing = next((name for name in spec.tensors if name not in weights), None)
    if missing is not None:
        raise SpecError(f"weights: tensor {missing!r} is missing")
    shape = spec.batch_shape(weights)
    if len(shape) != 1:
        raise SpecError(f"weights: expected one batch axis, found {len(shape)}")
    return shape[0]


def _activation(name: str | None) -> int:
    return ACTIVATIONS.index(name if name in ACTIVATIONS else "other") if name else 0


def _repeated(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(
        torch.tensor(values, dtype=torch.long), torch.tensor(counts, dtype=torch.long)
    )


def _padded(values: Tensor, width: int) -> Tensor:
    """Zeros after the last features, up to ``width``."""
    missing = width - values.shape[-1]
    return torch.nn.functional.pad(values, (0, missing)) if missing else values
