"""Graphs hold all of a network, move with its units, and are read the same whichever way they are followed."""

import re
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weightspace.errors import ConfigError, SpecError
from weightspace.models import (
    GraphLayer,
    GraphNetwork,
    GraphOptions,
    from_graph,
    graph_plan,
    join,
    model_config,
    to_graph,
)
from weightspace.models.graph import ACTIVATIONS, EDGE_ROLES, NODE_ROLES, _pool
from weightspace.models.graph._topology import SparseTopology
from weightspace.spec import Cell, Dim, Group, TensorSpec, WeightSpec
from weightspace.testing import (
    assert_equivariant,
    assert_invariant,
    mixed_spec,
    networks,
    random_spec,
    random_weights,
    tiny_specs,
)

TRACED = ("lenet", "resnet18", "gru", "transformer_encoder", "resnext", "bilinear")
PLAIN = (*tiny_specs(), "lenet", "conv-norm")  # which the layout of neural graphs can hold


def norm_net():
    """A norm between two convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)
    ).eval()


def plain_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))


def depthwise_net():
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)]
    return nn.Sequential(*layers)


def transposed_net():
    return nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 2, 3))


class Tokens(nn.Module):
    """Rows and positions are looked up and added."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 4, 6))
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, index):
        return self.out(torch.relu(self.hidden(self.table(index) + self.positions)).mean(1))


class Gated(nn.Module):
    """Two weights between the same units, of which one gates the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(8, 2)
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(nn.functional.silu(self.gate(x)) * self.up(x))


class Skipping(nn.Module):
    """The second layer reads the coordinates again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 6), nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(torch.cat([hidden, x], -1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + torch.relu(self.inner(x)))


IMAGE = torch.randn(2, 3, 8, 8)
OWN = {
    "conv-norm": (norm_net, IMAGE),
    "conv": (plain_net, IMAGE),
    "depthwise": (depthwise_net, IMAGE),
    "transposed": (transposed_net, IMAGE),
    "tokens": (Tokens, torch.randint(11, (2, 4))),
    "gated": (Gated, torch.randn(5, 3)),
    "skipping": (Skipping, torch.randn(5, 2)),
    "residual": (Residual, torch.randn(5, 3)),
}
SPECS = (*tiny_specs(), "mixed", *TRACED, *OWN)
READ = (
    *tiny_specs(),
    "mixed",
    *(name for name in TRACED if name != "resnext"),
    "depthwise",
    "tokens",
    "skipping",
)
LAYOUTS = [
    GraphOptions(),
    GraphOptions(layout="gmn", types="tensor"),
    GraphOptions(reverse=True, types="tensor", node_features=64, edge_features=64),
]


def layouts(name):
    return [*LAYOUTS, GraphOptions(layout="neural-graphs")] if name in PLAIN else LAYOUTS


@cache
def spec_named(name):
    if name in OWN:
        build, inputs = OWN[name]
        return WeightSpec.trace(build(), inputs, verify=False)
    if name in TRACED:
        case = networks()[name]
        return WeightSpec.trace(case.build(), case.inputs(), verify=False)
    return {**tiny_specs(), "mixed": mixed_spec()}[name]


def largest(found, expected):
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


# -- the graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_is_read_back(name):
    spec = spec_named(name)
    weights = random_weights(spec, (2,))
    for options in layouts(name):
        again = from_graph(spec, to_graph(spec, weights, options=options), options=options)
        assert list(again) == list(spec.tensors)
        assert all(torch.equal(again[tensor], weights[tensor]) for tensor in spec.tensors)


@pytest.mark.parametrize("seed", range(25))
def test_every_weight_is_read_back_for_any_spec(seed):
    """Nested and repeated groups, cells side by side, three and more indices."""
    spec = random_spec(seed, largest=40)
    if not spec.tensors:
        return
    weights = random_weights(spec, (2,))
    for options in LAYOUTS:
        again = from_graph(spec, to_graph(spec, weights, options=options), options=options)
        assert all(torch.equal(again[tensor], weights[tensor]) for tensor in spec.tensors)


def test_a_graph_by_hand():
    """2-3-1: three hidden nodes with their biases, two inputs, one output with its bias."""
    spec = WeightSpec.mlp([2, 3, 1], activation="tanh")
    weights = spec.unflatten(torch.arange(13.0)[None])
    graph = to_graph(spec, weights)
    assert graph.x.flatten().tolist() == [6, 7, 8, 0, 0, 12]
    assert graph.edge_attr.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert graph.edge_index.tolist() == [[3, 4, 3, 4, 3, 4, 0, 1, 2], [0, 0, 1, 1, 2, 2, 5, 5, 5]]
    assert [NODE_ROLES[at] for at in graph.node_type] == ["hidden"] * 3 + ["input"] * 2 + ["output"]
    assert [ACTIVATIONS[at] for at in graph.activation] == ["tanh"] * 3 + ["none"] * 3
    assert graph.position.tolist() == [-1, -1, -1, 0, 1, 0]
    assert graph.edge_set.tolist() == [0] * 6 + [1] * 3
    assert {EDGE_ROLES[at] for at in graph.edge_type} == {"weight"}
    named = to_graph(spec, weights, options=GraphOptions(types="tensor"))
    assert named.node_type.tolist() == [0, 0, 0, 1, 1, 2]
    assert torch.equal(named.edge_type, named.edge_set)


def test_the_layout_of_graph_metanetworks_by_hand():
    """A bias is an extra node with an edge to each unit."""
    spec = WeightSpec.mlp([2, 3, 1])
    graph = to_graph(
        spec, spec.unflatten(torch.arange(13.0)[None]), options=GraphOptions(layout="gmn", reverse=True)
    )
    roles = [EDGE_ROLES[at] for at in graph.edge_type]
    assert [NODE_ROLES[at] for at in graph.node_type[6:]] == ["bias", "bias"]
    bias = [at for at, role in enumerate(roles) if role == "bias"]
    assert graph.edge_index[:, bias].tolist() == [[6, 6, 6, 7], [0, 1, 2, 5]]
    assert graph.edge_attr[bias].flatten().tolist() == [6, 7, 8, 12]
    twins = [at for at, role in enumerate(roles) if role == "bias reversed"]
    assert graph.edge_index[:, twins].flip(0).tolist() == graph.edge_index[:, bias].tolist()
    assert torch.equal(graph.edge_attr[twins], graph.edge_attr[bias])
    assert not graph.x.any()


def test_the_layout_of_neural_graphs_by_hand():
    """Biases on nodes, flattened kernels on edges, positions at both ends."""
    options = GraphOptions(layout="neural-graphs")
    spec = WeightSpec.mlp([2, 3, 1], activation="tanh")
    weights = spec.unflatten(torch.arange(13.0)[None])
    graph = to_graph(spec, weights, options=options)
    assert graph.x.flatten().tolist() == [6, 7, 8, 0, 0, 12]
    assert graph.edge_attr.flatten().tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert graph.edge_index.tolist() == [[3, 4, 3, 4, 3, 4, 0, 1, 2], [0, 0, 1, 1, 2, 2, 5, 5, 5]]
    assert graph.position.tolist() == [-1, -1, -1, 0, 1, 0]
    net = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))
    spec = WeightSpec.trace(net, torch.randn(2, 1, 1, 3))
    graph = to_graph(spec, spec.unflatten(torch.arange(float(spec.num_parameters))[None]), options=options)
    # 2 channels, 1 input, 3 outputs; a channel has 2 positions for the linear layer, as a kernel has 2 entries
    assert graph.x.flatten().tolist() == [4, 5, 0, 18, 19, 20]
    assert graph.position.tolist() == [-1, -1, 0, 0, 1, 2]
    assert graph.edge_index.tolist() == [[2, 2, 0, 1, 0, 1, 0, 1], [0, 1, 3, 3, 4, 4, 5, 5]]
    kernels, rows = [[0, 1], [2, 3]], [[6 + 2 * at, 7 + 2 * at] for at in range(6)]
    assert graph.edge_attr.tolist() == kernels + rows


def test_kernels_norms_and_residual_streams():
    plan = graph_plan(spec_named("resnet18"))
    weights = random_weights(plan.spec, (2,))
    name, kernel = next((name, w) for name, w in weights.items() if w.shape[-2:] == (3, 3))
    edges = next(edges for edges in plan.edges if edges.name == name)
    graph = to_graph(plan.spec, weights)
    found = graph.edge_attr[(graph.edge_set == plan.edges.index(edges))].view(2, -1, plan.edge_features)
    assert torch.equal(found[:, :, :9], kernel.reshape(2, -1, 9))
    assert not found[:, :, 9:].any(), "narrower kernels are padded with zeros"
    norms = [place for place in plan.places if place.tensor.endswith(("bn1.weight", "1.running_var"))]
    assert all(place.on_nodes for place in norms)
    into = [edges.target for edges in plan.edges if edges.role == "weight"]
    assert max(map(into.count, into)) >= 3, "a residual stream is one node set that several layers write to"


def test_recurrent_nested_and_many_indices():
    plan = graph_plan(mixed_spec(), GraphOptions(reverse=True))
    assert [(edges.name, edges.role) for edges in plan.edges[2:6]] == [
        ("fused[1]", "weight"),
        ("recurrent", "recurrent"),
        ("features within heads", "membership"),
        ("query reversed", "weight reversed"),
    ]
    assert plan.nodes[plan.edges[2].target].name == "end0", "fixed rows beside others are units"
    assert plan.edges[4].targets.tolist() == [[0], [1], [2]]
    assert plan.edges[4].sources.tolist() == [[0, 1], [2, 3], [4, 5]]
    bilinear = graph_plan(spec_named("bilinear"))
    factors = [nodes for nodes in bilinear.nodes if nodes.role == "factor"]
    assert len(factors) == 1
    assert sum(edges.role == "factor" for edges in bilinear.edges) == 3
    grouped = next(edges for edges in graph_plan(spec_named("resnext")).edges if edges.shape[0] > 1)
    assert grouped.role == "weight", "a grouped convolution is one block per group of channels"
    gates = [e.source for e in graph_plan(spec_named("gru")).edges if "weight_ih_l0[" in e.name]
    assert len(set(gates)) == 1, "all gates read the same inputs"
    assert str(graph_plan(WeightSpec.mlp([3, 2]))).splitlines() == [
        "end0: 2 output nodes",
        "end1: 3 input nodes",
        "layers.0.weight: 6 weight edges, end1 -> end0",
    ]


def ends_of(plan, name):
    """Names and roles of the nodes at both ends of the edges of a tensor."""
    edges = next(edges for edges in plan.edges if edges.name == name)
    return [(plan.nodes[at].count, plan.nodes[at].role) for at in (edges.source, edges.target)]


def test_edges_go_from_input_to_output_units():
    plan = graph_plan(spec_named("transposed"))
    assert ends_of(plan, "0.weight") == [(3, "input"), (8, "hidden")]
    assert ends_of(plan, "2.weight") == [(8, "hidden"), (2, "output")]
    weights = random_weights(plan.spec, (1,))
    graph = to_graph(plan.spec, weights)
    kernels = weights["0.weight"][0].movedim(0, 1).reshape(24, 9)
    assert torch.equal(graph.edge_attr[graph.edge_set == 0], kernels)
    assert graph.edge_index[:, :4].tolist() == [[8, 9, 10, 8], [0, 0, 0, 1]], "targets, then their sources"
    plan = graph_plan(spec_named("tokens"))
    assert ends_of(plan, "table.weight") == [(11, "input"), (6, "hidden")]
    assert ends_of(plan, "positions") == [(4, "input"), (6, "hidden")]
    assert not any(nodes.role == "factor" for nodes in plan.nodes)
    assert plan.node_columns["position"].tolist()[14:] == [*range(4), *range(11), 0, 1]


def test_a_depthwise_convolution_has_no_inputs():
    plan = graph_plan(spec_named("depthwise"))
    assert [(nodes.count, nodes.role) for nodes in plan.nodes] == [(8, "hidden"), (3, "input"), (5, "output")]
    weights = random_weights(plan.spec, (1,))
    graph = to_graph(plan.spec, weights)
    assert plan.node_features == 6 + 9
    assert torch.equal(graph.x[:8, 0], weights["0.bias"][0])
    assert torch.equal(graph.x[:8, 5], weights["2.bias"][0])
    assert torch.equal(graph.x[:8, 6:], weights["2.weight"][0].reshape(8, 9))
    wider = to_graph(plan.spec, weights, options=GraphOptions(node_features=20))
    assert torch.equal(wider.x[:8, :6], graph.x[:8, :6])
    assert torch.equal(wider.x[:8, -9:], graph.x[:8, 6:]), "the last columns, for networks of every kind"


def test_inputs_that_are_read_again_are_the_same_nodes():
    plan = graph_plan(spec_named("skipping"))
    assert str(plan).splitlines()[2:] == [
        "end0: 2 input nodes",
        "end1: 1 output nodes",
        "first.weight: 12 weight edges, end0 -> hidden0",
        "second.weight[0]: 36 weight edges, hidden0 -> hidden1",
        "second.weight[1]: 12 weight edges, end0 -> hidden1",
        "last.weight: 6 weight edges, hidden1 -> end1",
    ]
    weights = random_weights(plan.spec, (1,))
    graph = to_graph(plan.spec, weights)
    assert torch.equal(
        graph.edge_attr[graph.edge_set == 2].flatten(), weights["second.weight"][0, :, 6:].flatten()
    )


def test_columns_mean_the_same_in_every_network():
    """Types by role: bias, scale, shift, mean and variance have columns of their own."""
    plain, normed = (
        to_graph(spec, random_weights(spec, (1,))) for spec in map(spec_named, ("conv", "conv-norm"))
    )
    assert plain.x.shape[1] == 1
    weights = random_weights(spec_named("conv-norm"), (1,))
    normed = to_graph(spec_named("conv-norm"), weights)
    columns = ["1.weight", "1.bias", "1.running_mean", "1.running_var"]
    assert torch.equal(
        normed.x[:8], torch.stack([torch.zeros(8), *(weights[name][0] for name in columns)], 1)
    )
    assert torch.equal(normed.x[11:, 0], weights["3.bias"][0])
    twice = graph_plan(spec_named("resnet18"))
    stream = max(
        (place.at for place in twice.places if place.on_nodes), key=[place.at for place in twice.places].count
    )
    found = {place.tensor: place.column for place in twice.places if place.on_nodes and place.at == stream}
    assert len(set(found.values())) == len(found) > 8
    kinds = {
        name.rpartition(".")[2]: {
            column % 5 for at, column in found.items() if at.endswith(name.rpartition(".")[2])
        }
        for name in found
    }
    assert kinds == {"weight": {1}, "bias": {2}, "running_mean": {3}, "running_var": {4}}
    compact = graph_plan(spec_named("conv-norm"), GraphOptions(types="tensor"))
    assert compact.node_features == 4


def test_what_the_edges_of_extra_nodes_do():
    plan = graph_plan(spec_named("conv-norm"), GraphOptions(layout="gmn"))
    roles = {edges.name: edges.role for edges in plan.edges}
    assert roles == {
        "0.weight": "weight",
        "1.weight": "scale",
        "1.bias": "shift",
        "1.running_mean": "mean",
        "1.running_var": "variance",
        "3.weight": "weight",
        "3.bias": "bias",
    }
    stream = graph_plan(spec_named("resnet18"), GraphOptions(layout="gmn"))
    scales = [(edges.target, edges.order) for edges in stream.edges if edges.role == "scale"]
    assert len(set(scales)) == len(scales), "the norms of one stream are numbered"
    assert max(order for _, order in scales) >= 1


def test_parallel_edges_are_numbered():
    plan = graph_plan(spec_named("gated"), GraphOptions(reverse=True))
    assert [edges.order for edges in plan.edges] == [0, 0, 0, 1] * 2
    second = torch.isin(plan.edge_columns["edge_set"], torch.tensor([3, 7]))
    assert torch.equal(plan.edge_columns["edge_order"], second.long())
    gates = [edges.order for edges in graph_plan(spec_named("gru")).edges if "weight_hh_l0[" in edges.name]
    assert gates == [0, 1], "the first two are neighbouring features"
    many = {f"w{at}": TensorSpec.dense((3, 2), ["b", "a"]) for at in range(10)}
    spec = WeightSpec.build([Group("a", 2), Group("b", 3)], many)
    assert graph_plan(spec).edge_columns["edge_order"][::6].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "in_proj")
EXCHANGED = [
    ("gated", {"gate.weight": "up.weight"}),
    ("conv-norm", {"1.weight": "1.bias", "1.running_mean": "1.running_var"}),
    ("gru", (2, 1, 0)),  # in which order three parts of each tensor stand
    ("transformer_encoder", (1, 0, 2)),
]


@pytest.mark.parametrize(("name", "exchanged"), EXCHANGED)
def test_tensors_in_each_others_place_are_another_network(name, exchanged):
    """Norm scales and shifts, gates, queries and keys, in types by role."""
    spec = spec_named(name)
    weights = random_weights(spec, (1,), dtype=torch.float64)
    moved = dict(weights)
    if isinstance(exchanged, dict):
        for one, other in exchanged.items():
            moved[one], moved[other] = weights[other], weights[one]
    else:
        for at in (at for at in spec.tensors if any(part in at for part in PARTS)):
            parts = weights[at].chunk(3, 1)
            moved[at] = torch.cat([parts[place] for place in exchanged], 1)
    assert any(not torch.equal(moved[at], weights[at]) for at in weights)
    for layout in ("weightspace", "gmn"):
        torch.manual_seed(0)
        options = GraphOptions(layout=layout)
        model = GraphNetwork(spec, 3, options=options, hidden=8, layers=2).double()
        assert model.encode.edge_order is not None
        assert not model.encode.edge_order.weight.any(), "at the start, all are alike"
        nn.init.normal_(model.encode.edge_order.weight)
        assert (model(weights) - model(moved)).abs().max() > 1e-6
        graphs = to_graph(spec, weights, options=options)
        torch.testing.assert_close(model(graphs), model(weights), rtol=0, atol=1e-10)
        assert_invariant(model, spec)


@pytest.mark.parametrize("name", ["2-4-4-1 tanh", "mixed", "gru"])
def test_weights_in_any_order_of_memory(name):
    spec = spec_named(name)
    weights = random_weights(spec, (3,))
    moved = {at: tensor.movedim(0, -1).contiguous().movedim(-1, 0) for at, tensor in weights.items()}
    for one, other in zip(graph_plan(spec).features(moved), graph_plan(spec).features(weights), strict=True):
        assert torch.equal(one, other)


def test_activations_that_have_no_number_are_others():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 4), nn.LogSigmoid(), nn.Linear(4, 2))
    columns = graph_plan(WeightSpec.trace(net, torch.randn(5, 3), verify=False)).node_columns
    assert [ACTIVATIONS[at] for at in columns["activation"]] == ["other"] * 8 + ["none"] * 5


@pytest.mark.parametrize(
    "name",
    ["2-4-4-1 tanh", "mixed", "lenet", "gru", "transformer_encoder", "transposed", "tokens", "skipping"],
)
def test_a_permuted_network_is_the_relabelled_graph(name):
    spec = spec_named(name)
    plan = graph_plan(spec)
    weights = random_weights(spec, (1,))
    element = spec.random_element(
        (1,), symmetries=["permutation"], generator=torch.Generator().manual_seed(0)
    )
    graph, moved = to_graph(spec, weights), to_graph(spec, spec.act(element, weights))
    old = {nodes.name: torch.arange(nodes.count) for nodes in plan.nodes}
    old.update(labels_after(spec, element))
    label = torch.cat([old[nodes.name] + nodes.start for nodes in plan.nodes])
    assert not torch.equal(label, torch.arange(len(label)))
    assert torch.equal(moved.x, graph.x[label])
    assert torch.equal(moved.node_type, graph.node_type[label])

    def in_order(one, ends):
        key = (one.edge_set * plan.num_nodes + ends[0]) * plan.num_nodes + ends[1]
        assert len(key.unique()) == len(key)
        return one.edge_attr[key.argsort()]

    assert torch.equal(in_order(moved, label[moved.edge_index]), in_order(graph, graph.edge_index))


def labels_after(spec, element):
    """Which unit of the original stands at each place, by group: the action on a tensor of unit numbers."""
    tensors = {}
    for group in spec.groups.values():
        names = [*group.within, group.name]
        sizes = [spec.groups[each].size for each in names]
        strides = [torch.tensor([*sizes[at + 1 :], 1]).prod().item() for at in range(len(sizes))]
        dims = [
            Dim(at, stride, size, each, tuple(names.index(outer) for outer in spec.groups[each].within))
            for at, (each, size, stride) in enumerate(zip(names, sizes, strides, strict=True))
        ]
        tensors[group.name] = TensorSpec(tuple(sizes), (Cell(tuple(dims)),))
    units = WeightSpec.build(spec.groups.values(), tensors)
    numbers = {name: torch.arange(tensor.numel).reshape(1, *tensor.shape) for name, tensor in tensors.items()}
    return {name: moved.flatten() for name, moved in units.act(element, numbers).items()}


def test_it_is_a_batch_like_any_other():
    from torch_geometric.data import Batch

    spec = spec_named("lenet")
    graphs = to_graph(spec, random_weights(spec, (3,)), options=GraphOptions(input_features=2))
    again = Batch.from_data_list(graphs.to_data_list())
    assert graphs.num_graphs == again.num_graphs == 3
    assert set(graphs.keys()) == set(again.keys())
    assert all(torch.equal(graphs[key], values) for key, values in again.to_dict().items())
    assert all(torch.equal(graphs._slice_dict[key], again._slice_dict[key]) for key in again._slice_dict)
    assert graphs.validate()


def mixture(options):
    """Two graphs each of three architectures."""
    found = []
    for name in ("2-4-4-1 tanh", "mixed", "lenet"):
        spec = spec_named(name)
        found.append(to_graph(spec, random_weights(spec, (2,), dtype=torch.float64), options=options))
    return found


def test_graphs_of_several_architectures_are_joined():
    from torch_geometric.data import Batch

    parts = mixture(GraphOptions(node_features=4, edge_features=25))
    joined = join(parts)
    listed = Batch.from_data_list([graph for part in parts for graph in part.to_data_list()])
    assert all(torch.equal(joined[key], values) for key, values in listed.to_dict().items())
    assert len(joined.to_data_list()) == 6
    assert torch.equal(joined[3].edge_index, parts[1][1].edge_index)


def test_types_by_tensor_are_joined_for_one_spec_only():
    options = GraphOptions(node_features=4, edge_features=25, types="tensor")
    one, *_, other = mixture(options)
    assert join([one, join([one, one])]).num_graphs == 6
    message = "join: expected graphs with types by role, or all of one spec, found types by tensor of different specs"
    refused(ConfigError, message, join, [one, other])
    refused(ConfigError, message, join, [join([one, one]), other])
    by_role = mixture(options.model_copy(update={"types": "role"}))
    refused(ConfigError, message, join, [one, by_role[0]])


# -- the networks ------------------------------------------------------------------------------------------

STYLES = [
    {"style": "pna", "options": GraphOptions()},
    {"style": "gmn", "options": GraphOptions(layout="gmn", types="tensor")},
]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("chosen", STYLES)
def test_it_is_invariant_and_equivariant(name, chosen):
    spec = spec_named(name)
    torch.manual_seed(0)
    assert_equivariant(GraphNetwork(spec, hidden=6, layers=2, **chosen), spec, batch=(2,))
    assert_invariant(GraphNetwork(spec, 4, hidden=6, layers=2, **chosen), spec, batch=(2,))


@pytest.mark.parametrize("name", ["2-3-2 without bias", "mixed"])
def test_reversed_edges_are_edges_like_any_other(name):
    spec, options = spec_named(name), GraphOptions(reverse=True)
    torch.manual_seed(0)
    model = GraphNetwork(spec, 3, hidden=6, layers=2, options=options).double()
    assert_invariant(model, spec)
    weights = random_weights(spec, (2,), dtype=torch.float64)
    graphs = to_graph(spec, weights, options=options)
    torch.testing.assert_close(model(graphs), model(weights), rtol=0, atol=1e-10)


def test_every_aggregation_is_invariant_for_one_network_and_for_more():
    spec = mixed_spec()
    for how in ("mean", "sum", "max", "min", "std"):
        torch.manual_seed(0)
        model = GraphNetwork(spec, 3, hidden=6, layers=2, aggregation=(how,))
        for batch in (1, 4):
            assert_invariant(model, spec, batch=(batch,))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("chosen", STYLES)
def test_dense_and_sparse_give_the_same_numbers(name, chosen):
    spec = spec_named(name)
    weights = random_weights(spec, (3,), dtype=torch.float64)
    graphs = to_graph(spec, weights, options=chosen["options"])
    torch.manual_seed(0)
    model = GraphNetwork(spec, 4, hidden=6, layers=2, **chosen).double()
    dense, sparse = model(weights), model(graphs)
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-10)
    chosen_gradients = [
        torch.autograd.grad(out.square().sum(), model.layers.parameters()) for out in (dense, sparse)
    ]
    for one, other in zip(*chosen_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    to_weights = GraphNetwork(spec, hidden=6, layers=2, **chosen).double()
    out = to_weights(weights)
    again = from_graph(spec, to_weights(graphs), options=chosen["options"])
    assert largest(again, out) < 1e-10


@pytest.mark.parametrize("style", ["pna", "gmn"])
def test_a_mixed_batch_equals_separate_ones(style):
    options = GraphOptions(node_features=4, edge_features=25)
    torch.manual_seed(0)
    model = GraphNetwork(None, 3, options=options, hidden=8, layers=3, style=style).double().eval()
    parts = mixture(options)
    torch.testing.assert_close(
        model(join(parts)), torch.cat([model(part) for part in parts]), rtol=0, atol=1e-12
    )
    spec = spec_named("lenet")
    same = GraphNetwork(spec, 3, options=options, hidden=8, layers=3, style=style).double().eval()
    same.load_state_dict(model.state_dict())
    weights = random_weights(spec, (2,), dtype=torch.float64)
    torch.testing.assert_close(same(weights), model(parts[2]), rtol=0, atol=1e-12)


def message(layer, e, source, target, u):
    """``relu(W_e e * (1 + factor) + shift)``: what both ends and the network say is shift, then factor."""
    said = layer.of_source(source) + layer.of_target(target)
    if layer.of_network is not None:
        said = said + layer.of_network(u)
    read = layer.of_edge(e)
    return torch.relu(read * (1 + said[len(read) :]) + said[: len(read)])


def normed(values, mean, variance):
    return (values - mean) / (variance + 1e-5).sqrt()


def slow_norms(layer, e):
    """Norms of nodes after the update, and of edges where messages read them, with statistics of batch or past."""
    if layer.edge_norm is None:
        return layer.norm, e
    found = (
        (e.mean(0), e.var(0, correction=0))
        if layer.training
        else (layer.edge_norm.mean, layer.edge_norm.variance)
    )

    def nodes(values):
        past = layer.norm.running_mean, layer.norm.running_var
        moments = (values.mean(0), values.var(0, correction=0)) if layer.training else past
        return normed(values, *moments) * layer.norm.weight + layer.norm.bias

    return nodes, normed(e, *found)


def pooled(messages, how, hidden):
    """Over the edges on one side of a node; 0 if there are none."""
    if not messages:
        return torch.zeros(hidden, dtype=torch.float64)
    values = torch.stack(messages)
    if how == "std":
        eps = 1e-4
        return (values.var(0, correction=0) + eps).sqrt() - eps**0.5
    return {"mean": values.mean, "sum": values.sum, "max": values.amax, "min": values.amin}[how](0)


def slow_layer(layer, graphs, x, e, u):
    """The layer as its docstring has it, edge by edge and node by node."""
    hidden, index = layer.hidden, graphs.edge_index.T.tolist()
    norm, read = slow_norms(layer, e)
    h = [
        message(layer, read[at], x[source], x[target], u[graphs.batch[target]])
        for at, (source, target) in enumerate(index)
    ]
    nodes = []
    for node in range(len(x)):
        incoming = [h[at][:hidden] for at, ends in enumerate(index) if ends[1] == node]
        outgoing = [h[at][:hidden] for at, ends in enumerate(index) if ends[0] == node]
        parts = [pooled(side, how, hidden) for side in (incoming, outgoing) for how in layer.aggregation]
        of_network = [u[graphs.batch[node]]] if layer.of_network is not None else []
        nodes.append(x[node] + layer.node(torch.cat([x[node], *parts, *of_network])))
    new_x = norm(torch.stack(nodes))
    new_e = torch.stack([e[at] + layer.edge(h[at][-hidden:]) for at in range(len(e))])
    if layer.network is None:
        return new_x, new_e, u
    new_u = []
    for graph in range(len(u)):
        mine = graphs.batch == graph
        means = [new_x[mine].mean(0), new_e[mine[graphs.edge_index[0]]].mean(0)]
        new_u.append(u[graph] + layer.network(torch.cat([u[graph], *means])))
    return new_x, new_e, torch.stack(new_u)


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("style", ["pna", "gmn"])
def test_a_layer_is_its_equation(style, norm):
    """Two architectures side by side; input nodes have no incoming, output nodes no outgoing edges."""
    specs = [WeightSpec.mlp([2, 3, 1]), mixed_spec()]
    options = GraphOptions(node_features=4, edge_features=9)
    graphs = join([to_graph(spec, random_weights(spec, (2,)), options=options) for spec in specs])
    generator = torch.Generator().manual_seed(0)
    sizes = len(graphs.x), graphs.num_edges, graphs.num_graphs
    x, e, u = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes)
    topology = SparseTopology(graphs.edge_index, graphs.batch, graphs.node_type, graphs.num_graphs)
    for aggregation in (["mean"], ["sum"], ["max"], ["min"], ["std"], ["mean", "sum", "max", "min", "std"]):
        torch.manual_seed(0)
        layer = GraphLayer(4, style, aggregation, norm=norm).double()
        nn.init.normal_(layer.norm.weight)
        for training in (False, True, False):  # the last with the statistics that training left
            layer.train(training)
            found, (edges,), networks = layer(topology, x, [e], u)
            for one, other in zip((found, edges, networks), slow_layer(layer, graphs, x, e, u), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        if norm == "batch":
            kept = layer.edge_norm.mean, layer.edge_norm.variance
            torch.testing.assert_close(kept[0], 0.1 * e.mean(0))
            torch.testing.assert_close(kept[1], 0.9 + 0.1 * e.var(0, correction=0))


@pytest.mark.parametrize("factors", [False, True])
def test_pairs_and_their_statistics(monkeypatch, factors):
    """Gradients by finite differences, and the same numbers in pieces of one network."""
    generator = torch.Generator().manual_seed(0)
    width = 12 if factors else 6
    shapes = [(3, 2, 4, 5, 3), (3, 2, 5, width), (3, 2, 4, width), (6, 3), (6,)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]

    def run(*tensors):
        h, out = _pool.pair_and_pool(*tensors, ("sum", "square", "max", "min"), 4)
        return h, *out

    assert torch.autograd.gradcheck(run, inputs)
    h, *out = run(*inputs)
    said = inputs[1].unsqueeze(2) + inputs[2].unsqueeze(3)
    read = inputs[0] @ inputs[3].t() + inputs[4]
    plain = read * (1 + said[..., 6:]) if factors else read
    torch.testing.assert_close(h, (plain + said[..., :6]).relu())
    torch.testing.assert_close(out[5], h[..., :4].amax(2))
    monkeypatch.setattr(_pool, "TILE", 1)
    for one, other in zip(run(*inputs), (h, *out), strict=True):
        assert torch.equal(one, other)


def test_autocast_keeps_the_numbers_roughly():
    spec = WeightSpec.mlp([2, 6, 6, 1])
    torch.manual_seed(0)
    model = GraphNetwork(spec, 3, hidden=8, layers=2)
    weights = random_weights(spec, (4,))
    expected = model(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(weights)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("style", ["pna", "gmn"])
def test_all_parameters_are_trained(style):
    spec = WeightSpec.mlp([2, 5, 5, 1], activation="tanh")
    torch.manual_seed(0)
    for out_features in (3, None):
        model = GraphNetwork(spec, out_features, hidden=4, layers=2, style=style)
        out = model(random_weights(spec, (8,)))
        total = out if out_features else spec.flatten(out)
        total.square().sum().backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
        assert idle == []


@pytest.mark.parametrize("style", ["pna", "gmn"])
def test_it_can_learn_arbitrary_labels_by_heart(style):
    """20 random networks, 4 random classes, then the same networks in another order of their units."""
    spec = WeightSpec.mlp([2, 6, 6, 1], activation="sine", w0=3.0)
    weights = random_weights(spec, (20,))
    labels = torch.randint(4, (20,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = GraphNetwork(spec, 4, hidden=16, layers=2, style=style)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = cross_entropy(model(weights), labels).item()
    for _ in range(100):
        optimiser.zero_grad()
        loss = cross_entropy(model(weights), labels)
        loss.backward()
        optimiser.step()
    assert before > 1.0
    assert loss.item() < 0.05
    element = spec.random_element(
        (20,), symmetries=["permutation"], generator=torch.Generator().manual_seed(1)
    )
    assert (model(spec.act(element, weights)).argmax(-1) == labels).all()


def test_it_tells_inputs_apart():
    """Input units have positions: a network that reads its inputs in another order is another network."""
    spec = WeightSpec.mlp([2, 6, 1], activation="tanh")
    torch.manual_seed(0)
    model = GraphNetwork(spec, 3, hidden=8, layers=2)
    weights = random_weights(spec, (4,))
    swapped = {**weights, "layers.0.weight": weights["layers.0.weight"].flip(-1)}
    assert (model(swapped) - model(weights)).abs().max() > 1e-3


def test_further_features_of_nodes():
    """Such as activations: they count, and move with the units."""
    spec = mixed_spec()
    options = GraphOptions(input_features=3)
    torch.manual_seed(0)
    model = GraphNetwork(spec, 4, options=options, hidden=8, layers=2).double()
    weights = random_weights(spec, (2,), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "stream": torch.randn(2, 4, 3, generator=generator, dtype=torch.float64),
        "features": torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64),
    }
    out = model(weights, node_inputs=inputs)
    assert (out - model(weights)).abs().max() > 1e-3
    graphs = to_graph(spec, weights, options=options, node_inputs=inputs)
    torch.testing.assert_close(model(graphs), out, rtol=0, atol=1e-10)
    element = spec.random_element((2,), symmetries=["permutation"], generator=generator)
    moved = {name: values.clone() for name, values in inputs.items()}
    for network in range(2):
        one = {name: order[network] for name, order in element.items()}
        moved["stream"][network] = inputs["stream"][network, one["stream"]]
        for head, origin in enumerate(one["heads"]):
            moved["features"][network, head] = inputs["features"][network, origin, one["features"][head]]
    again = model(spec.act(element, weights), node_inputs=moved)
    torch.testing.assert_close(again, out, rtol=0, atol=1e-10)


def test_a_network_without_edges():
    spec = WeightSpec.build([Group("channels", 3)], {"norm.weight": TensorSpec.dense((3,), ["channels"])})
    for style in ("pna", "gmn"):
        torch.manual_seed(0)
        model = GraphNetwork(spec, 2, hidden=4, layers=2, style=style).double()
        assert_invariant(model, spec)
        weights = random_weights(spec, (3,), dtype=torch.float64)
        graphs = to_graph(spec, weights, options=model.options)
        torch.testing.assert_close(model(graphs), model(weights), rtol=0, atol=1e-12)
        assert_equivariant(GraphNetwork(spec, hidden=4, layers=2, style=style), spec)


def test_types_by_role_come_with_scales_that_suit_several_architectures():
    assert model_config("graph", {"preset": "any"}).recommended["normalisation"] == "fan_in"
    both = model_config("graph", {"types": "role", "probes": 4}).recommended
    assert (both["normalisation"], both["augment"]) == ("fan_in", "sign")
    assert "normalisation" not in model_config("graph", {}).recommended


@pytest.mark.parametrize("preset", [None, "paper", "gmn"])
def test_it_is_built_from_its_options(preset):
    spec = WeightSpec.mlp([2, 5, 1])
    config = model_config("graph", {"preset": preset, "layers": 2} if preset else {"layers": 2})
    weights = random_weights(spec, (4,))
    assert config.build(spec, None, 3)(weights).shape == (4, 3)
    out = config.build(spec, None, None)(weights)
    assert {name: tensor.shape for name, tensor in out.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }


# -- bad input ---------------------------------------------------------------------------------------------


def refused(error, message, function, *arguments, **options):
    with pytest.raises(error, match=re.escape(message)) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_graphs_that_cannot_be_made():
    spec = WeightSpec.mlp([2, 4, 1])
    weights = random_weights(spec, (2,))
    refused(SpecError, "weights: tensor 'layers.1.bias' is missing", to_graph, spec,
            {name: weights[name] for name in list(weights)[:-1]})  # fmt: skip
    refused(SpecError, "'layers.0.weight' should end in shape [4, 2], found [2, 4, 3]", to_graph, spec,
            {**weights, "layers.0.weight": torch.zeros(2, 4, 3)})  # fmt: skip
    refused(SpecError, "weights: expected one batch axis, found 0", to_graph, spec, random_weights(spec))
    refused(ConfigError, "edge_features: the networks need 25, found 9", graph_plan, spec_named("lenet"),
            GraphOptions(edge_features=9))  # fmt: skip
    plain = GraphOptions(layout="neural-graphs")
    refused(SpecError, "tensor 'inner.weight': not the only weight at the units of 'hidden0', as in residual, recurrent",
            graph_plan, spec_named("residual"), plain)  # fmt: skip
    refused(
        SpecError,
        "tensor 'up.weight': not the only weight at the units of",
        graph_plan,
        spec_named("gated"),
        plain,
    )
    for name in ("gru", "resnet18", "skipping"):
        refused(SpecError, "and layout 'neural-graphs' is for perceptrons and plain convolutional networks",
                graph_plan, spec_named(name), plain)  # fmt: skip
    refused(SpecError, "tensor 'query': has a nested group, and layout 'neural-graphs' is for perceptrons",
            graph_plan, mixed_spec(), GraphOptions(layout="neural-graphs"))  # fmt: skip
    refused(ConfigError, "node_inputs: expected GraphOptions(input_features=...) above 0", to_graph, spec,
            weights, node_inputs={"hidden0": torch.zeros(2, 4, 1)})  # fmt: skip
    options = GraphOptions(input_features=2)
    refused(ConfigError, "node_inputs: expected some of hidden0, end0, end1, found 'hidden1'", to_graph, spec,
            weights, options=options, node_inputs={"hidden1": torch.zeros(2, 4, 2)})  # fmt: skip
    refused(ConfigError, "node_inputs: 'hidden0' should have shape [2, 4, 2], found [2, 4, 1]", to_graph, spec,
            weights, options=options, node_inputs={"hidden0": torch.zeros(2, 4, 1)})  # fmt: skip
    other = WeightSpec.mlp([2, 5, 1])
    refused(SpecError, "graphs: 2 networks of this spec have 16 nodes and 30 edges in its order, found 14 and 24",
            from_graph, other, to_graph(spec, weights))  # fmt: skip
    refused(ConfigError, "join: expected graphs with features of one width, found no graphs", join, [])
    refused(ConfigError, "join: expected graphs with features of one width, found {'x': 1", join,
            [to_graph(spec, weights), to_graph(spec, weights, options=GraphOptions(node_features=2))])  # fmt: skip


def test_networks_that_cannot_be_read():
    spec = WeightSpec.mlp([2, 4, 1])
    weights = random_weights(spec, (2,))
    options = GraphOptions(node_features=4, edge_features=9)
    model = GraphNetwork(None, 3, options=options, hidden=4, layers=1)
    refused(ConfigError, "graph network: reads weights only if it was built with their spec", model, weights)
    refused(ConfigError, "graphs: expected 4 features per node, 9 per edge and 0 further inputs, found 1, 1 and 0",
            model, to_graph(spec, weights))  # fmt: skip
    refused(ConfigError, "graph network: without a spec, expected GraphOptions with types='role'", GraphNetwork,
            None, 3)  # fmt: skip
    known = GraphNetwork(spec, 3, hidden=4, layers=1)
    deeper = WeightSpec.mlp([2, 4, 4, 1])
    refused(ConfigError, "graphs: node_type reaches 3, and the model knows 3", known,
            to_graph(deeper, random_weights(deeper, (2,)), options=known.options))  # fmt: skip
    refused(
        SpecError,
        "'layers.1.weight' should end in shape [1, 4], found [2, 4, 4]",
        known,
        random_weights(deeper, (2,)),
    )
    refused(ConfigError, "expected hidden >= 1, layers >= 1 and dropout in [0, 1), found 4, 0, 0.0", GraphNetwork,
            spec, 3, hidden=4, layers=0)  # fmt: skip
    refused(ConfigError, "style: expected one of pna, gmn, found 'gat'", GraphNetwork, spec, 3, style="gat")
    refused(ConfigError, "aggregation: expected some of mean, sum, max, min, std, found ['median']", GraphLayer,
            8, "pna", ["median"])  # fmt: skip
