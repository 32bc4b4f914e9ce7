"""One step of message passing with edge updates, in the manner of two papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightspace.errors import ConfigError
from weightspace.models.graph._topology import Edges, Topology

STYLES = ("pna", "gmn")
AGGREGATIONS = {"mean": ("sum",), "sum": ("sum",), "max": ("max",), "min": ("min",), "std": ("sum", "square")}
NORMS = ("batch", "layer")
DEFAULT_AGGREGATION = {"pna": ("mean", "max", "min", "std"), "gmn": ("mean",)}
VARIANCE_EPSILON = 1e-5  # that of nn.BatchNorm
EPSILON = 1e-4  # in the square root of a variance: float32 loses the digits of smaller ones


class GraphLayer(nn.Module):
    r"""Messages from every edge to both its ends, then new features of nodes, edges and networks.

    For an edge from node j to node i, with hidden features

        h_ij = relu(W_e norm(e_ij) * (1 + V_s x_j + V_t x_i + V_u u + c) + W_s x_j + W_t x_i + W_u u + b),

    node i gets norm(x_i + MLP(x_i, pooled h_ij over incoming edges, pooled h_ki over outgoing edges, u)),
    and the edge e_ij + W h_ij. The product lets a weight act on what its unit says, as it does in the network
    itself. In the style ``"pna"`` (Kofinas et al. 2024, with the aggregations of Corso et al.
    2020, arXiv:2004.05718) messages and edge updates share h, and there is no u. In the style ``"gmn"`` (Lim et
    al. 2024) each has its own, and u + MLP(u, mean node, mean edge) follows. A linear map after pooling by a mean
    stands for the second layer of a message's MLP.

    Equivariant: a permutation of the units permutes nodes and edges alike on both sides.

    Departures from Kofinas et al.: messages also travel against the edges; edges modulate messages by a factor that is
    linear in both ends rather than by one that is an MLP of the edge; no degree scalers, ReLU, no encoding of the
    weights in frequencies. From Lim et al.: message and update MLPs share their first layer's structure with the other
    style, and the norm is that of ``norm``.

    Args:
        hidden: channels of nodes, edges and networks.
        style: ``"pna"`` or ``"gmn"``.
        aggregation: some of mean, sum, max, min and std.
        norm: ``"batch"``: BatchNorm of nodes, over the nodes of all networks of a batch, and likewise of edges where
            messages read them; ``"layer"``: LayerNorm of nodes, and none of edges.
        update: what gets new features besides the nodes, some of ``"edges"`` and ``"networks"``; the last layer
            can spare what nothing reads.

    Raises:
        ConfigError: an option out of range.

    Reference:
        Kofinas et al. 2024, arXiv:2403.12143; Lim et al. 2024, arXiv:2312.04501.
    """

    def __init__(
        self,
        hidden: int,
        style: str,
        aggregation: Sequence[str],
        *,
        norm: str = "batch",
        update: Sequence[str] = ("edges", "networks"),
    ) -> None:
        super().__init__()
        unknown = [name for name in aggregation if name not in AGGREGATIONS]
        if unknown or not aggregation:
            raise ConfigError(
                f"aggregation: expected some of {', '.join(AGGREGATIONS)}, found {list(aggregation)}"
            )
        if norm not in NORMS:
            raise ConfigError(f"norm: expected one of {', '.join(NORMS)}, found {norm!r}")
        needed = {name for how in aggregation for name in AGGREGATIONS[how]}
        self.statistics = tuple(name for name in ("sum", "square", "max", "min") if name in needed)
        self.aggregation, self.hidden = tuple(aggregation), hidden
        networks = int(style == "gmn")
        width = hidden * (1 + networks) if "edges" in update else hidden
        self.of_edge = nn.Linear(hidden, width, bias=False)
        self.of_source = nn.Linear(hidden, 2 * width, bias=False)
        self.of_target = nn.Linear(hidden, 2 * width)
        self.of_network = nn.Linear(hidden, 2 * width, bias=False) if networks else None
        self.edge = nn.Linear(hidden, hidden) if "edges" in update else None
        self.node = _mlp(hidden * (1 + 2 * len(self.aggregation) + networks), hidden)
        self.norm = nn.LayerNorm(hidden) if norm == "layer" else _NodeNorm(hidden)
        self.edge_norm = _EdgeNorm(hidden) if norm == "batch" else None
        self.network = _mlp(3 * hidden, hidden) if networks and "networks" in update else None

    def forward(self, graph: Topology, x: Tensor, edges: Edges, u: Tensor) -> tuple[Tensor, Edges, Tensor]:
        """New features of nodes, edges and networks."""
        target = self.of_target(x)
        if self.of_network is not None:
            target = target + graph.to_nodes(self.of_network(u))
        weight = self.of_edge.weight
        offset = weight.new_zeros(len(weight))
        if self.edge_norm is not None and any(part.numel() for part in edges):
            # normalising what is read by W is reading by another W: no pass over the edges
            mean, scale = self.edge_norm(edges)
            weight = weight * scale
            offset = -(weight @ mean)
        source = self.of_source(x)
        h, pooled = graph.pair(edges, source, target, weight, offset, self.statistics, self.hidden)
        parts = [x]
        for way, degree in enumerate(graph.degrees()):
            found = {name: values[way] for name, values in pooled.items()}
            parts += [_aggregated(found, how, degree.to(x.dtype)) for how in self.aggregation]
        if self.of_network is not None:
            parts.append(graph.to_nodes(u))
        x = self.norm(x + self.node(torch.cat(parts, dim=-1)))
        if self.edge is not None:
            edges = [one + self.edge(part[..., -self.hidden :]) for one, part in zip(edges, h, strict=True)]
        if self.network is not None:
            u = u + self.network(torch.cat([u, graph.mean_nodes(x), graph.mean_edges(edges, u)], dim=-1))
        return x, edges, u


class _NodeNorm(nn.BatchNorm1d):
    """BatchNorm of the last axis over all others."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(x.flatten(0, -2)).view(x.shape)


class _EdgeNorm(nn.Module):
    """Mean and inverse deviation per channel over all edges of a batch; of past batches in eval mode.

    Without scales and shifts of its own, as the matrix that reads the edges has them.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, edges: Edges) -> tuple[Tensor, Tensor]:
        """(channels,) each."""
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = _moments(edges)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean), self.momentum)
                self.variance.lerp_(variance.to(self.variance), self.momentum)
        return mean, (variance + VARIANCE_EPSILON).rsqrt()


def _moments(edges: Edges) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over several sets of edges."""
    flat = [part.flatten(0, -2) for part in edges if part.numel()]
    counts = torch.tensor([len(part) for part in flat], dtype=flat[0].dtype, device=flat[0].device)
    share = (counts / counts.sum())[:, None]
    variances, means = zip(*(torch.var_mean(part, 0, correction=0) for part in flat), strict=True)
    each = torch.stack(means)
    mean = (share * each).sum(0)
    return mean, (share * (torch.stack(variances) + (each - mean).square())).sum(0)


def _aggregated(statistics: dict[str, Tensor], how: str, degree: Tensor) -> Tensor:
    if how in ("max", "min", "sum"):
        return statistics[how]
    count = degree.clamp(min=1.0)
    mean = statistics["sum"] / count
    if how == "mean":
        return mean
    variance = torch.relu(statistics["square"] / count - mean.square())
    return (variance + EPSILON).sqrt() - EPSILON**0.5


def _mlp(features: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
