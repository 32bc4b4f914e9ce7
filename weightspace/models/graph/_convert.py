"""Weights to torch-geometric graphs, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weightspace.errors import ConfigError, SpecError
from weightspace.models.graph._options import GraphOptions
from weightspace.models.graph._plan import GraphPlan
from weightspace.models.graph._planning import graph_plan
from weightspace.spec import Weights, WeightSpec

if TYPE_CHECKING:
    from torch_geometric.data import Batch
else:  # importing torch_geometric takes seconds, so that it waits until a graph is asked for
    Batch = Any


def to_graph(
    spec: WeightSpec,
    weights: Mapping[str, Tensor],
    *,
    options: GraphOptions | None = None,
    node_inputs: Mapping[str, Tensor] | None = None,
) -> Batch:
    """A batch of networks as a batch of graphs, for any graph neural network.

    A permutation of a network's units becomes the same permutation of nodes and edges. No information is lost:
    :func:`from_graph` reads all weights back. The kinds of nodes and edges are told by :func:`graph_plan`.

    Args:
        spec: any weight space.
        weights: with one leading batch axis.
        options: see :class:`GraphOptions`.
        node_inputs: further features by name of a node set, (batch, *sizes of the set, input_features).

    Returns:
        With N nodes and E edges in all:
        ``x`` (N, node_features) and ``edge_attr`` (E, edge_features), the entries, zero-padded;
        ``edge_index`` (2, E), from input to output unit;
        ``node_set``, ``edge_set``: numbers of the plan's sets, which tell the tensor of each entry;
        ``node_type``, ``edge_type``, ``edge_order``: see :class:`GraphOptions`;
        ``activation``: place in ``ACTIVATIONS``; ``position``: index of an input or output unit, else -1;
        ``inputs`` (N, input_features), where asked for; ``batch`` and ``ptr``, as always.

    Raises:
        SpecError: weights of another spec, or a spec that the layout cannot hold.
        ConfigError: features wider than the options allow.

    Reference:
        Lim et al. 2024, arXiv:2312.04501; Kofinas et al. 2024, arXiv:2403.12143.

    Example:
        >>> spec = WeightSpec.mlp([2, 32, 32, 1])
        >>> to_graph(spec, spec.unflatten(torch.randn(4, spec.num_parameters)))
        DataBatch(x=[268, 1], edge_index=[2, 4480], edge_attr=[4480, 1], ...)
    """
    plan = graph_plan(spec, options)
    x, edge_attr = plan.features(weights)
    size, device = len(x), x.device
    parts: dict[str, Tensor] = {"x": x.flatten(0, 1), "edge_attr": edge_attr.flatten(0, 1)}
    first = torch.arange(size, device=device) * plan.num_nodes
    index = plan.edge_index.to(device)[:, None, :] + first[:, None]
    parts["edge_index"] = index.flatten(1)
    for name, column in {**plan.node_columns, **plan.edge_columns}.items():
        parts[name] = column.to(device).repeat(size)
    if plan.options.input_features:
        parts["inputs"] = plan.inputs(node_inputs, x).flatten(0, 1)
    elif node_inputs:
        raise ConfigError("node_inputs: expected GraphOptions(input_features=...) above 0, found 0")
    batch = _batch(parts, torch.full((size,), plan.num_nodes), torch.full((size,), plan.num_edges))
    # no tensor, so that the batch keeps it to itself; lost where a batch is made of its graphs
    batch._types = spec if plan.options.types == "tensor" else "role"
    return batch


def from_graph(spec: WeightSpec, graphs: Batch, *, options: GraphOptions | None = None) -> Weights:
    """The weights that graphs hold; the inverse of :func:`to_graph`.

    Args:
        spec: of all these networks.
        graphs: with ``x`` (N, node_features) and ``edge_attr`` (E, edge_features).
        options: with which they were made.

    Raises:
        SpecError: graphs of another spec.
    """
    plan = graph_plan(spec, options)
    size = int(graphs.num_graphs)
    found = (len(graphs.x), len(graphs.edge_attr))
    expected = (size * plan.num_nodes, size * plan.num_edges)
    same = found == expected and torch.equal(
        graphs.edge_set, plan.edge_columns["edge_set"].to(graphs.edge_set.device).repeat(size)
    )
    if not same:
        raise SpecError(
            f"graphs: {size} networks of this spec have {expected[0]} nodes and {expected[1]} edges in its order, "
            f"found {found[0]} and {found[1]} of others"
        )
    return weights_of(plan, graphs.x, graphs.edge_attr, size)


def weights_of(plan: GraphPlan, x: Tensor, edge_attr: Tensor, size: int) -> Weights:
    """Weights from features of all nodes and all edges of ``size`` networks."""
    return plan.weights(
        x.reshape(size, plan.num_nodes, x.shape[-1]),
        edge_attr.reshape(size, plan.num_edges, edge_attr.shape[-1]),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the graphs of several, for instance of different architectures.

    Raises:
        ConfigError: none; features of different widths: give ``GraphOptions`` common ones; or types by tensor of
            different specs, whose numbers mean different things.

    Example:
        >>> options = GraphOptions(node_features=4, edge_features=9)
        >>> graphs = [
        ...     to_graph(spec, spec.unflatten(torch.randn(2, spec.num_parameters)), options=options)
        ...     for spec in (WeightSpec.mlp([2, 8, 1]), WeightSpec.mlp([3, 5, 5, 2]))
        ... ]
        >>> join(graphs).num_graphs
        4
    """
    widths = [
        {name: part.shape[-1] for name, part in _tensors(batch).items() if part.is_floating_point()}
        for batch in batches
    ]
    odd = next((width for width in widths if width != widths[0]), None)
    if not batches or odd is not None:
        found = f"{widths[0]} and {odd}" if batches else "no graphs"
        raise ConfigError(f"join: expected graphs with features of one width, found {found}")
    types = {known for batch in batches if (known := getattr(batch._store, "_types", None)) is not None}
    if len(types) > 1:
        raise ConfigError(
            "join: expected graphs with types by role, or all of one spec, found types by tensor of different specs; "
            "make them with GraphOptions(types='role')"
        )
    parts = {name: [_tensors(batch)[name] for batch in batches] for name in _tensors(batches[0])}
    starts = [0]
    for batch in batches:
        starts.append(starts[-1] + int(batch.num_nodes))
    parts["edge_index"] = [index + start for index, start in zip(parts["edge_index"], starts, strict=False)]
    joined = {name: torch.cat(each, dim=-1 if name == "edge_index" else 0) for name, each in parts.items()}
    nodes, edges = (
        torch.cat([batch._slice_dict[name].diff() for batch in batches]) for name in ("x", "edge_attr")
    )
    whole = _batch(joined, nodes, edges)
    if types:
        whole._types = types.pop()
    return whole


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: part for name, part in batch.to_dict().items() if name not in ("batch", "ptr")}


def _batch(parts: Mapping[str, Tensor], nodes: Tensor, edges: Tensor) -> Batch:
    """What ``Batch.from_data_list`` would give, without a step per network.

    Args:
        parts: by name, those of all graphs joined.
        nodes: number of nodes of each graph.
        edges: number of edges of each graph.
    """
    from torch_geometric.data import Batch, Data

    batch = Batch(_base_cls=Data, **parts)
    slices = {
        at: torch.cat([counts.new_zeros(1), counts.cumsum(0)]) for at, counts in ((0, nodes), (1, edges))
    }
    on_edges = {"edge_attr", "edge_index", "edge_set", "edge_type", "edge_order"}
    device = parts["x"].device
    batch.batch = torch.repeat_interleave(torch.arange(len(nodes)), nodes).to(device)
    batch.ptr = slices[0].to(device)
    batch._num_graphs = len(nodes)
    batch._slice_dict = {name: slices[int(name in on_edges)] for name in parts}
    none = torch.zeros_like(nodes)
    batch._inc_dict = {name: slices[0][:-1] if name == "edge_index" else none for name in parts}
    return batch
