"""From a spec to its graph: which units are nodes, which cells edges, and which features."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.models._ends import free_ends
from weightspace.models.graph._options import (
    SLOTS,
    GraphOptions,
)
from weightspace.models.graph._plan import EdgeSet, GraphPlan, NodeSet, Place
from weightspace.spec import Cell, Dim, Frozen, Group, Orientation, TensorSpec, WeightSpec


@lru_cache(maxsize=64)
def graph_plan(spec: WeightSpec, options: GraphOptions | None = None) -> GraphPlan:
    """The graph of every network of a spec.

    Raises:
        SpecError: the layout ``"neural-graphs"`` and a network that is no perceptron or plain convolutional one.
        ConfigError: features wider than the options allow.
    """
    options = options or GraphOptions()
    freed, roles = free_ends(_single_ends(spec))
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


def _width(kind: str, wanted: int | None, needed: Iterable[int]) -> int:
    widest = max([1, *needed])
    if wanted is not None and wanted < widest:
        raise ConfigError(f"{kind}_features: the networks need {widest}, found {wanted}")
    return wanted or widest
