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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, count

import torch
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.models.graph._options import (
    ACTIVATIONS,
    EDGE_ORDERS,
    EDGE_ROLES,
    NODE_ROLES,
    SLOTS,
    GraphOptions,
)
from weightspace.spec import Cell, Dim, Frozen, Group, Orientation, TensorSpec, Weights, WeightSpec, cell_view


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


@lru_cache(maxsize=64)
def graph_plan(spec: WeightSpec, options: GraphOptions | None = None) -> GraphPlan:
    """The graph of every network of a spec.

    Raises:
        SpecError: the layout ``"neural-graphs"`` and a network that is no perceptron or plain convolutional one.
        ConfigError: features wider than the options allow.
    """
    options = options or GraphOptions()
    freed, roles = _free_ends(_single_ends(spec))
    builder = _Builder(freed, options, roles)
    for name, tensor in freed.tensors.items():
        for number, cell in enumerate(tensor.cells):
            builder.add(name, f"{name}[{number}]" if len(tensor.cells) > 1 else name, cell)
    for group in spec.groups.values():
        builder.add_membership(group)
    return builder.plan(spec)


class _Builder:
    """Node sets, edge sets and places as they are found."""

    def __init__(self, spec: WeightSpec, options: GraphOptions, roles: Mapping[str, str]) -> None:
        self.spec, self.options = spec, options
        self.nodes: list[NodeSet] = []
        self.edges: list[EdgeSet] = []
        self.places: list[Place] = []
        self.front: Counter[int] = Counter()  # columns in use at each node set, from the first on
        self.rear: Counter[int] = Counter()  # and from the last one back
        self.met: Counter[object] = Counter()
        self.number = {
            name: self.add_nodes(name, self.sizes(group), roles.get(name, "hidden"), group.activation)
            for name, group in spec.groups.items()
        }

    def sizes(self, group: Group) -> tuple[int, ...]:
        return (*(self.spec.groups[outer].size for outer in group.within), group.size)

    def add_nodes(self, name: str, sizes: tuple[int, ...], role: str, activation: str | None = None) -> int:
        self.nodes.append(NodeSet(name, sizes, role, activation))
        return len(self.nodes) - 1

    def add(self, tensor: str, name: str, cell: Cell) -> None:
        """One cell, by the number of its independent indices."""
        live = [at for at, dim in enumerate(cell.dims) if dim.group is not None]
        outer = {parent for dim in cell.dims for parent in dim.parents}
        units = self.spec.tensors[tensor].units
        leaves = sorted(
            (at for at in live if at not in outer),
            key=lambda at: (_side(units, cell.dims[at].axis), cell.dims[at].axis, at),
        )
        if self.options.layout == "neural-graphs":
            _check_plain(tensor, cell, len(leaves))
        if not leaves:
            self._add_features(tensor, cell, (), self._global_node())
        elif len(leaves) == 1:
            self._add_unit(tensor, name, cell, leaves[0])
        elif len(leaves) == 2:
            recurrent = cell.dims[leaves[0]].group == cell.dims[leaves[1]].group
            order = self._add_edges(
                name,
                "recurrent" if recurrent else "weight",
                cell,
                (self._set(cell, leaves[1]), _path(cell, leaves[1])),
                (self._set(cell, leaves[0]), _path(cell, leaves[0])),
            )
            self._add_place(tensor, cell, order, on_nodes=False, at=len(self.edges) - 1)
        else:
            factors = self.add_nodes(name, tuple(cell.dims[at].size for at in live), "factor")
            self._add_features(tensor, cell, tuple(live), factors)
            for leaf in leaves:
                target = (self._set(cell, leaf), _path(cell, leaf))
                self._add_edges(name, "factor", cell, (factors, tuple(live)), target)

    def _add_unit(self, tensor: str, name: str, cell: Cell, leaf: int) -> None:
        target = (self._set(cell, leaf), _path(cell, leaf))
        if self.options.layout != "gmn":
            self._add_features(tensor, cell, target[1], target[0])
            return
        extra = self.add_nodes(name, (), "bias")
        role = entry_role(self.spec, tensor)
        order = self._add_edges(name, role, cell, (extra, ()), target, key=(role, target[0]))
        self._add_place(tensor, cell, order, on_nodes=False, at=len(self.edges) - 1)

    def add_membership(self, group: Group) -> None:
        """Edges from the units of a nested group to the outer units that own them, nearest ones only."""
        beyond = {far for outer in group.within for far in self.spec.groups[outer].within}
        dims = tuple(Dim(0, 1, self.spec.groups[name].size, name) for name in (*group.within, group.name))
        own = tuple(range(len(dims)))
        for outer in group.within:
            if outer not in beyond:
                path = tuple(group.within.index(far) for far in self.spec.groups[outer].within)
                target = (*path, group.within.index(outer))
                ends = (self.number[group.name], own), (self.number[outer], target)
                self._add_edges(f"{group.name} within {outer}", "membership", Cell(dims), *ends)

    def plan(self, spec: WeightSpec) -> GraphPlan:
        twins = [edges.reversed() for edges in self.edges] if self.options.reverse else []
        edges = [*self.edges, *twins]
        node_starts = accumulate((nodes.count for nodes in self.nodes), initial=0)
        edge_starts = accumulate((one.count for one in edges), initial=0)
        on_edges = [place.fixed for place in self.places if not place.on_nodes]
        on_nodes = [self.front[at] + self.rear[at] for at in range(len(self.nodes))]
        width = _width("node", self.options.node_features, on_nodes)
        if self.options.layout == "neural-graphs":
            _check_chain(self.nodes, self.edges)
        return GraphPlan(
            spec,
            self.options,
            tuple(replace(nodes, start=at) for nodes, at in zip(self.nodes, node_starts, strict=False)),
            tuple(replace(one, start=at) for one, at in zip(edges, edge_starts, strict=False)),
            tuple(
                replace(place, column=place.column + width if place.column < 0 else place.column)
                for place in self.places
            ),
            width,
            _width("edge", self.options.edge_features, on_edges),
        )

    def _set(self, cell: Cell, leaf: int) -> int:
        return self.number[str(cell.dims[leaf].group)]

    def _global_node(self) -> int:
        found = next((at for at, nodes in enumerate(self.nodes) if nodes.role == "global"), None)
        return self.add_nodes("global", (), "global") if found is None else found

    def _add_features(self, tensor: str, cell: Cell, order: tuple[int, ...], at: int) -> None:
        """A cell on nodes: at the next free columns, or where all networks have what plays its role."""
        fixed = _fixed(cell)
        column = self.front[at]
        if self.options.types == "role":
            role = entry_role(self.spec, tensor)
            if role in SLOTS and fixed == 1:
                column = SLOTS.index(role) + len(SLOTS) * self.met[at, role]
                self.met[at, role] += 1
            else:
                self.rear[at] += fixed
                column = -self.rear[at]
        self.front[at] = max(self.front[at], column + fixed if column >= 0 else 0)
        self._add_place(tensor, cell, order, on_nodes=True, at=at, column=column)

    def _add_place(
        self, tensor: str, cell: Cell, order: tuple[int, ...], *, on_nodes: bool, at: int, column: int = 0
    ) -> None:
        fixed = tuple(place for place, dim in enumerate(cell.dims) if dim.group is None)
        self.places.append(Place(tensor, cell, (*order, *fixed), _fixed(cell), on_nodes, at, column))

    def _add_edges(
        self,
        name: str,
        role: str,
        cell: Cell,
        source: tuple[int, tuple[int, ...]],
        target: tuple[int, tuple[int, ...]],
        key: object = None,
    ) -> tuple[int, ...]:
        """Edges between nodes that dims of a cell index; returns the dims in the order of the edges.

        Sets of the same ``key``, by default of one role between the same node sets, are numbered.
        """
        shared = tuple(at for at in target[1] if at in source[1])
        own = [tuple(at for at in path if at not in shared) for _, path in (source, target)]
        sources = _node_ids(cell, source[1], shared, own[0])
        targets = _node_ids(cell, target[1], shared, own[1])
        key = key or (role, source[0], target[0])
        self.edges.append(
            EdgeSet(name, role, source[0], target[0], sources, targets, order=self.met["edges", key])
        )
        self.met["edges", key] += 1
        return (*shared, *own[1], *own[0])


def _path(cell: Cell, leaf: int) -> tuple[int, ...]:
    """The dims that number the nodes of a dim's group: those that it lies within, and itself."""
    return (*cell.dims[leaf].parents, leaf)


def _node_ids(cell: Cell, path: Sequence[int], shared: Sequence[int], own: Sequence[int]) -> Tensor:
    sizes = [cell.dims[at].size for at in path]
    ids = torch.arange(math.prod(sizes)).reshape(sizes)
    blocks = math.prod(cell.dims[at].size for at in shared)
    return ids.permute([path.index(at) for at in (*shared, *own)]).reshape(blocks, -1)


def _side(units: Orientation, axis: int) -> int:
    """Targets of edges before their sources."""
    return 0 if axis == units.output else 2 if axis == units.input else 1


def _fixed(cell: Cell) -> int:
    """Number of entries per node or edge."""
    return math.prod(dim.size for dim in cell.dims if dim.group is None)


def entry_role(spec: WeightSpec, name: str) -> str:
    """What the entries of a tensor do to single units: one of ``SLOTS``, or ``"other"``.

    Told by the kind of the tensor, its orientation and the end of its name, as PyTorch's layers call them.
    """
    tensor, (module, _, last) = spec.tensors[name], name.rpartition(".")
    if tensor.kind == "statistic":
        return {"mean": "mean", "var": "variance"}.get(last.rpartition("_")[2], "other")
    if not _is_entrywise(tensor):
        return "other"
    if last.startswith("bias") or last in ("beta", "shift"):
        norms = (f"{module}.{one}" if module else one for one in _SCALES)
        is_shift = any(one in spec.tensors and _is_entrywise(spec.tensors[one]) for one in norms)
        return "shift" if is_shift else "bias"
    return "scale" if last in _SCALES else "other"


_SCALES = ("weight", "gamma", "scale")


def _is_entrywise(tensor: TensorSpec) -> bool:
    return tensor.units.input is None and tensor.units.fan_in == 1


def _single_ends(spec: WeightSpec) -> WeightSpec:
    """The spec with a dim for input and output axes of size 1, which count as units of the ends, too."""

    def is_single(tensor: TensorSpec, axis: int | None) -> bool:
        return axis is not None and tensor.shape[axis] == 1 and _is_bare(tensor, axis)

    heads = {
        name.rpartition(".")[0]
        for name, tensor in spec.tensors.items()
        if len(tensor.shape) > 1 and is_single(tensor, tensor.units.output)
    }

    def with_ends(name: str, tensor: TensorSpec) -> TensorSpec:
        added = tuple(
            Dim(axis, math.prod(tensor.shape[axis + 1 :]), 1)
            for axis in (tensor.units.output, tensor.units.input)
            if axis is not None and is_single(tensor, axis)
        )
        if len(tensor.shape) == 1 and name.rpartition(".")[0] not in heads:
            return tensor
        return replace(tensor, cells=tuple(Cell((*cell.dims, *added), cell.offset) for cell in tensor.cells))

    tensors = {name: with_ends(name, tensor) for name, tensor in spec.tensors.items()}
    return replace(spec, tensors=Frozen(tensors), scalings=Frozen())


def _is_bare(tensor: TensorSpec, axis: int) -> bool:
    return all(dim.axis != axis for cell in tensor.cells for dim in cell.dims)


def _free_ends(spec: WeightSpec) -> tuple[WeightSpec, dict[str, str]]:
    """The spec with fixed units as groups ``end0``, ``end1``, ...; and the role of each of these.

    Fixed units are a fixed dim that is alone on an axis of units in its cell. The tensors of one module share their
    outputs (weight and bias), the cells of one tensor their inputs (gates). What a later layer reads beside hidden
    units is taken to be an input of the network that has as many units.
    """
    ends: dict[object, Group] = {}
    roles: dict[str, str] = {}
    inputs: dict[int, object] = {}
    names = (name for name in (f"end{number}" for number in count()) if name not in spec.groups)

    def end(name: str, tensor: TensorSpec, cell: Cell, dim: Dim) -> Dim:
        units = tensor.units
        others = sum(other.axis == dim.axis for other in cell.dims)
        if dim.group is not None or dim.axis not in (units.output, units.input) or others > 1:
            return dim
        first = cell.offset // math.prod(tensor.shape[dim.axis + 1 :]) % tensor.shape[dim.axis]
        role = "output" if dim.axis == units.output else "input"
        owner = name.rpartition(".")[0] if role == "output" else name
        key: object = (role, owner, dim.size, first)
        if role == "input" and dim.size == tensor.shape[dim.axis]:
            inputs.setdefault(dim.size, key)
        elif role == "input":
            key = inputs.get(dim.size, key)
        if key not in ends:
            ends[key] = Group(next(names), dim.size)
            roles[ends[key].name] = role
        return replace(dim, group=ends[key].name)

    def freed(name: str, tensor: TensorSpec) -> TensorSpec:
        cells = (
            replace(cell, dims=tuple(end(name, tensor, cell, dim) for dim in cell.dims))
            for cell in tensor.cells
        )
        return replace(tensor, cells=tuple(cells))

    tensors = {name: freed(name, tensor) for name, tensor in spec.tensors.items()}
    groups = {**spec.groups, **{group.name: group for group in ends.values()}}
    return replace(spec, groups=Frozen(groups), tensors=Frozen(tensors)), roles


def _check_chain(nodes: Sequence[NodeSet], edges: Sequence[EdgeSet]) -> None:
    """Raise SpecError for units that several weights write to or read, or one that does both."""
    into: dict[int, str] = {}
    out: dict[int, str] = {}
    for one in edges:
        other = into.setdefault(one.target, one.name), out.setdefault(one.source, one.name)
        if one.source == one.target or other != (one.name, one.name):
            at = nodes[one.target if other[0] != one.name else one.source].name
            raise SpecError(
                f"tensor {one.name!r}: not the only weight at the units of {at!r}, as in residual, recurrent and gated "
                "networks, and layout 'neural-graphs' is for perceptrons and plain convolutional networks; choose "
                "layout='weightspace'"
            )


def _check_plain(tensor: str, cell: Cell, indices: int) -> None:
    nested = any(dim.parents for dim in cell.dims)
    if nested or indices not in (1, 2):
        found = "a nested group" if nested else f"{indices} independent indices"
        raise SpecError(
            f"tensor {tensor!r}: has {found}, and layout 'neural-graphs' is for perceptrons and plain "
            "convolutional networks; choose layout='weightspace'"
        )


def _checked_batch(spec: WeightSpec, weights: Mapping[str, Tensor]) -> int:
    missing = next((name for name in spec.tensors if name not in weights), None)
    if missing is not None:
        raise SpecError(f"weights: tensor {missing!r} is missing")
    shape = spec.batch_shape(weights)
    if len(shape) != 1:
        raise SpecError(f"weights: expected one batch axis, found {len(shape)}")
    return shape[0]


def _width(kind: str, wanted: int | None, needed: Iterable[int]) -> int:
    widest = max([1, *needed])
    if wanted is not None and wanted < widest:
        raise ConfigError(f"{kind}_features: the networks need {widest}, found {wanted}")
    return wanted or widest


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
