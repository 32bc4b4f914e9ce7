"""Graphs hold all of a network, move with its units, and are read the same whichever way they are followed."""

import re
from functools import cache

import pytest
import torch
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
SPECS = (*tiny_specs(), "mixed", *TRACED)
READ = (*tiny_specs(), "mixed", *(name for name in TRACED if name != "resnext"))
LAYOUTS = [
    GraphOptions(),
    GraphOptions(layout="gmn", types="tensor"),
    GraphOptions(reverse=True, types="tensor", node_features=64, edge_features=64),
]


@cache
def spec_named(name):
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
    for options in LAYOUTS:
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
    assert [(edges.name, edges.role) for edges in plan.edges[2:5]] == [
        ("recurrent", "recurrent"),
        ("features within heads", "membership"),
        ("query reversed", "weight reversed"),
    ]
    assert plan.edges[3].targets.tolist() == [[0], [1], [2]]
    assert plan.edges[3].sources.tolist() == [[0, 1], [2, 3], [4, 5]]
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


@pytest.mark.parametrize("name", ["2-4-4-1 tanh", "mixed", "lenet", "gru", "transformer_encoder"])
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
    model = GraphNetwork(None, 3, options=options, hidden=8, layers=3, style=style).double()
    parts = mixture(options)
    torch.testing.assert_close(
        model(join(parts)), torch.cat([model(part) for part in parts]), rtol=0, atol=1e-12
    )
    spec = spec_named("lenet")
    same = GraphNetwork(spec, 3, options=options, hidden=8, layers=3, style=style).double()
    same.load_state_dict(model.state_dict())
    weights = random_weights(spec, (2,), dtype=torch.float64)
    torch.testing.assert_close(same(weights), model(parts[2]), rtol=0, atol=1e-12)


def test_pairs_and_their_statistics(monkeypatch):
    """Gradients by finite differences, and the same numbers in pieces of one network."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 4, 5, 3), (3, 2, 5, 6), (3, 2, 4, 6), (6, 3)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]

    def run(*tensors):
        h, out = _pool.pair_and_pool(*tensors, ("sum", "square", "max", "min"), 4)
        return h, *out

    assert torch.autograd.gradcheck(run, inputs)
    h, *out = run(*inputs)
    plain = inputs[0] @ inputs[3].t() + inputs[1].unsqueeze(2) + inputs[2].unsqueeze(3)
    torch.testing.assert_close(h, plain.relu())
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
