"""The two ways to follow edges: as whole matrices for one architecture, and by scatter for any batch of graphs.

Both offer the same steps to the layers, and the same numbers.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from weightspace.models.graph._plan import GraphPlan
from weightspace.models.graph._pool import pair_and_pool

Edges = list[Tensor]
Pooled = dict[str, tuple[Tensor, Tensor]]


@runtime_checkable
class Topology(Protocol):
    """What a layer asks of a batch of graphs.

    Nodes are (networks, nodes, channels) when dense and (all nodes, channels) when sparse; edges a list of
    tensors with channels last; values per network (networks, channels).
    """

    def degrees(self) -> tuple[Tensor, Tensor]:
        """Number of edges that come in, and that go out, per node; a last axis of 1."""
        ...

    def pair(
        self,
        edges: Edges,
        source: Tensor,
        target: Tensor,
        weight: Tensor,
        offset: Tensor,
        statistics: tuple[str, ...],
        pooled: int,
    ) -> tuple[Edges, Pooled]:
        """``h = relu(weight e + offset + source + target)`` of every edge, and statistics of what comes in and goes out.

        Args:
            edges: features.
            source: of each node, what its outgoing edges get; twice as many channels also hold factors of
                ``weight e + offset``, to which 1 is added.
            target: of each node, what its incoming edges get; as the source.
            weight: (width, channels).
            offset: (width,).
            statistics: some of sum, square, max and min.
            pooled: of how many channels.
        """
        ...

    def to_nodes(self, values: Tensor) -> Tensor:
        """A value per network at each of its nodes."""
        ...

    def mean_nodes(self, x: Tensor) -> Tensor:
        """Mean over the nodes of each network."""
        ...

    def mean_edges(self, edges: Edges, like: Tensor) -> Tensor:
        """Mean over the edges of each network; zeros in the shape of ``like`` if it has none."""
        ...

    def by_type(self, x: Tensor, types: int) -> Tensor:
        """Mean and maximum over the nodes of each type, 0 for none: (networks, types * 2 * channels)."""
        ...


class DenseTopology(nn.Module):
    """Networks of one spec: every edge set is a tensor (networks, blocks, targets, sources, channels)."""

    def __init__(self, plan: GraphPlan) -> None:
        super().__init__()
        self.plan = plan
        counts = torch.zeros(2, plan.num_nodes)
        for edges in plan.edges:
            _, targets, sources = edges.shape
            for way, number, each in ((0, edges.target, sources), (1, edges.source, targets)):
                nodes = plan.nodes[number]
                counts[way, nodes.start : nodes.start + nodes.count] += each
        self.counts: Tensor
        self.register_buffer("counts", counts[..., None], persistent=False)
        self._orders: dict[str, bool] = {}
        for number, edges in enumerate(plan.edges):
            self._keep_order(f"sources{number}", edges.sources)
            self._keep_order(f"targets{number}", edges.targets)
        types = plan.node_columns["node_type"]
        for kind in range(plan.num_node_types):
            self.register_buffer(f"type{kind}", (types == kind).nonzero().flatten(), persistent=False)

    def _keep_order(self, name: str, ids: Tensor) -> None:
        flat = ids.flatten()
        self._orders[name] = torch.equal(flat, torch.arange(len(flat)))
        if not self._orders[name]:
            self.register_buffer(name, flat, persistent=False)
            self.register_buffer(f"{name}_back", flat.argsort(), persistent=False)

    def _split(self, name: str, x: Tensor, shape: torch.Size) -> Tensor:
        """Nodes of one set to (networks, blocks, ends, channels)."""
        ordered = x if self._orders[name] else x[:, self.get_buffer(name)]
        return ordered.reshape(len(x), *shape, x.shape[-1])

    def _joined(self, name: str, x: Tensor) -> Tensor:
        flat = x.flatten(1, 2)
        return flat if self._orders[name] else flat[:, self.get_buffer(f"{name}_back")]

    def degrees(self) -> tuple[Tensor, Tensor]:
        """See :class:`Topology`."""
        return self.counts[0], self.counts[1]

    def pair(
        self,
        edges: Edges,
        source: Tensor,
        target: Tensor,
        weight: Tensor,
        offset: Tensor,
        statistics: tuple[str, ...],
        pooled: int,
    ) -> tuple[Edges, Pooled]:
        """See :class:`Topology`."""
        counts = [nodes.count for nodes in self.plan.nodes]
        sources, targets = source.split(counts, dim=1), target.split(counts, dim=1)
        found: list[Tensor] = []
        parts: dict[tuple[str, int, int], list[Tensor]] = {}
        for number, (part, one) in enumerate(zip(edges, self.plan.edges, strict=True)):
            names = f"targets{number}", f"sources{number}"
            outgoing = self._split(names[1], sources[one.source], one.sources.shape)
            incoming = self._split(names[0], targets[one.target], one.targets.shape)
            h, values = pair_and_pool(part, outgoing, incoming, weight, offset, statistics, pooled)
            found.append(h)
            for place, name in enumerate(statistics):
                for way, at in enumerate((one.target, one.source)):
                    value = self._joined(names[way], values[2 * place + way])
                    parts.setdefault((name, way, at), []).append(value)
        zeros = [source.new_zeros(len(source), count, pooled) for count in counts]
        return found, {
            name: (self._collected(parts, name, 0, zeros), self._collected(parts, name, 1, zeros))
            for name in statistics
        }

    @staticmethod
    def _collected(
        parts: dict[tuple[str, int, int], list[Tensor]], name: str, way: int, zeros: list[Tensor]
    ) -> Tensor:
        """Over all edge sets at a node set, for all node sets side by side."""
        whole = []
        for at, zero in enumerate(zeros):
            total, *others = parts.get((name, way, at), [zero])
            for other in others:
                if name == "max":
                    total = torch.maximum(total, other)
                else:
                    total = torch.minimum(total, other) if name == "min" else total + other
            whole.append(total)
        return torch.cat(whole, dim=1)

    def to_nodes(self, values: Tensor) -> Tensor:
        """See :class:`Topology`."""
        return values[:, None].expand(-1, self.plan.num_nodes, -1)

    def mean_nodes(self, x: Tensor) -> Tensor:
        """See :class:`Topology`."""
        return x.mean(1)

    def mean_edges(self, edges: Edges, like: Tensor) -> Tensor:
        """See :class:`Topology`."""
        total = sum((part.sum((1, 2, 3)) for part in edges), torch.zeros_like(like))
        return total / max(self.plan.num_edges, 1)

    def by_type(self, x: Tensor, types: int) -> Tensor:
        """See :class:`Topology`."""
        pooled = []
        for kind in range(types):
            part = x[:, self.get_buffer(f"type{kind}")]
            if part.shape[1]:
                pooled += [part.mean(1), part.amax(1)]
            else:
                pooled += [x.new_zeros(len(x), x.shape[-1])] * 2
        return torch.cat(pooled, dim=-1)


class SparseTopology:
    """Graphs of any architectures.

    Args:
        edge_index: source and target node of each edge, (2, edges).
        batch: graph of each node, (nodes,).
        node_type: of each node, (nodes,).
        graphs: how many there are.
    """

    def __init__(self, edge_index: Tensor, batch: Tensor, node_type: Tensor, graphs: int) -> None:
        self.source, self.target = edge_index
        self.batch, self.node_type, self.graphs = batch, node_type, graphs

    def degrees(self) -> tuple[Tensor, Tensor]:
        """See :class:`Topology`."""
        size = len(self.batch)
        return self.target.bincount(minlength=size)[:, None], self.source.bincount(minlength=size)[:, None]

    def pair(
        self,
        edges: Edges,
        source: Tensor,
        target: Tensor,
        weight: Tensor,
        offset: Tensor,
        statistics: tuple[str, ...],
        pooled: int,
    ) -> tuple[Edges, Pooled]:
        """See :class:`Topology`."""
        read = nn.functional.linear(edges[0], weight, offset)
        shift, *factor = (source[self.source] + target[self.target]).split(len(weight), dim=-1)
        h = torch.relu(shift + (read * (1.0 + factor[0]) if factor else read))
        part, size = h[:, :pooled], len(self.batch)
        return [h], {
            name: (_scatter(part, self.target, size, name), _scatter(part, self.source, size, name))
            for name in statistics
        }

    def to_nodes(self, values: Tensor) -> Tensor:
        """See :class:`Topology`."""
        return values[self.batch]

    def mean_nodes(self, x: Tensor) -> Tensor:
        """See :class:`Topology`."""
        return _mean(x, self.batch, self.graphs)

    def mean_edges(self, edges: Edges, like: Tensor) -> Tensor:
        """See :class:`Topology`."""
        return _mean(edges[0], self.batch[self.source], self.graphs)

    def by_type(self, x: Tensor, types: int) -> Tensor:
        """See :class:`Topology`."""
        index, size = self.batch * types + self.node_type, self.graphs * types
        pooled = torch.cat([_mean(x, index, size), _scatter(x, index, size, "max")], dim=-1)
        return pooled.view(self.graphs, -1)


def _mean(x: Tensor, index: Tensor, size: int) -> Tensor:
    count = index.bincount(minlength=size).clamp(min=1)[:, None]
    return _scatter(x, index, size, "sum") / count


def _scatter(x: Tensor, index: Tensor, size: int, name: str) -> Tensor:
    """A statistic of the rows that go to each place; 0 where none does."""
    zeros = x.new_zeros(size, x.shape[-1])
    if name in ("sum", "square"):
        return zeros.index_add(0, index, x.square() if name == "square" else x)
    spread = index[:, None].expand_as(x)
    return zeros.scatter_reduce(0, spread, x, reduce=f"a{name}", include_self=False)
