"""The equivariant layer: equivariant, complete, and equal to the published counts."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.errors import ConfigError, SpecError
from weightspace.models import DWS, UNF, EquivariantLinear, Orbits, free_ends
from weightspace.models._pooling import _PoolAxes, _PoolAxesForward, _reduce
from weightspace.spec import Cell, Dim, Group, TensorSpec, WeightSpec, cell_view
from weightspace.testing import (
    assert_equivariant,
    mixed_spec,
    networks,
    random_spec,
    random_weights,
    tiny_specs,
)

SPECS = {**tiny_specs(), "mixed": mixed_spec()}


class OnWeights(torch.nn.Module):
    """Weights in, weights out, with one channel in and the mean over channels out."""

    def __init__(self, spec, channels=1, **options):
        super().__init__()
        self.orbits = Orbits(spec)
        self.layer = EquivariantLinear(self.orbits, 1, channels, **options)

    def forward(self, weights):
        out = self.orbits.scatter(self.layer(self.orbits.gather(weights)))
        return {name: tensor.mean(-1) for name, tensor in out.items()}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("pooling", [("mean",), ("max",), ("sum", "max"), ("mean", "max")])
def test_it_is_equivariant(name, pooling):
    torch.manual_seed(0)
    assert_equivariant(OnWeights(SPECS[name], 3, pooling=pooling), SPECS[name])


def residual(depth):
    """Blocks h = relu(up x), x += down h, on one stream."""
    groups = {"stream": 4, **{f"hidden{at}": 3 for at in range(depth)}}
    ups = {f"up{at}": [f"hidden{at}", "stream"] for at in range(depth)}
    downs = {f"down{at}": ["stream", f"hidden{at}"] for at in range(depth)}
    return dense(groups, **ups, **downs)


@pytest.mark.parametrize("mixing", ["full", "shared", "none"])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_mixing_is_equivariant(mixing, batch):
    torch.manual_seed(0)
    for spec in (mixed_spec(), WeightSpec.mlp([2, *[3] * 9, 1]), residual(12)):
        model = OnWeights(spec, 3, global_mixing=mixing)
        assert_equivariant(model, spec, batch=(batch,))
        assert bool(model.layer.hub) == (mixing == "shared" and len(spec.tensors) > 4)


@pytest.mark.parametrize("name", ["gru", "transformer_encoder", "resnet18", "lenet"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_is_equivariant_on_traced_networks(name, batch):
    case = networks("core")[name]
    spec = WeightSpec.trace(case.build(), case.inputs(), outputs=case.outputs, verify=False)
    spec, _ = free_ends(spec, units=False, wide=16)
    torch.manual_seed(0)
    assert_equivariant(OnWeights(spec, 2, global_mixing="shared"), spec, batch=(batch,))


@pytest.mark.parametrize("mixing", ["full", "shared", "none"])
def test_who_reaches_whom(mixing):
    """The first bias and the last weight share no group: they meet only where everything does."""
    spec = WeightSpec.mlp([2, *[3] * 9, 1])
    torch.manual_seed(0)
    model = OnWeights(spec, global_mixing=mixing, pooling=("mean",))
    assert bool(model.layer.hub) == (mixing == "shared")
    weights = {name: w.requires_grad_() for name, w in random_weights(spec, (2,)).items()}
    out = model(weights)
    (near, far) = torch.autograd.grad(
        out["layers.0.bias"].sum(),
        [weights["layers.0.weight"], weights["layers.9.weight"]],
        allow_unused=True,
    )
    assert near.abs().min() > 0
    if mixing == "none":
        assert far is None or not far.any()
    else:
        assert far.abs().min() > 0


@pytest.mark.parametrize("name", ["mixed", "stretched", "gru"])
def test_no_layout_in_memory_matters(name):
    """Networks innermost, as in ``spec.unflatten(array.T)``: cells that are part of a tensor are read through views."""
    spec = {"mixed": mixed_spec(), "stretched": concatenated(), "gru": COUNTS["GRU 2-4-1"][0]}[name]
    orbits, flat = Orbits(spec), torch.randn(spec.num_parameters, 5)
    expected = orbits.gather(spec.unflatten(flat.T.contiguous()))
    found = orbits.gather(spec.unflatten(flat.T))
    relaid = {k: w.movedim(0, -1).contiguous().movedim(-1, 0) for k, w in spec.unflatten(flat.T).items()}
    for t, x in expected.items():
        assert torch.equal(found[t], x)
        assert torch.equal(orbits.gather(relaid)[t], x)


def test_a_view_of_scattered_entries_is_refused():
    cell = concatenated().tensors["w"].cells[1]
    flat = torch.arange(30.0).view(2, 15)
    assert torch.equal(cell_view(flat, cell)[1], flat[1].view(3, 5)[:, 3:])
    assert torch.equal(cell_view(torch.cat([flat, flat])[2:], cell)[0], flat[0].view(3, 5)[:, 3:])
    with pytest.raises(SpecError, match=r"cell_view: expected entries next to each other .*, found stride 2"):
        cell_view(flat.T.contiguous().T, cell)


def test_the_batch_is_one_axis():
    spec = SPECS["2-4-1 sine"]
    for batch in ((), (2, 3)):
        with pytest.raises(SpecError, match=r"weights: expected one batch axis, found shape \[(2, 3)?\]"):
            Orbits(spec).gather(random_weights(spec, batch))
    out = OnWeights(mixed_spec())(random_weights(mixed_spec(), (0,)))
    assert {name: tuple(w.shape) for name, w in out.items()} == {
        name: (0, *tensor.shape) for name, tensor in mixed_spec().tensors.items()
    }


def test_a_bias_that_a_norm_takes_away_can_be_left_out():
    """That of a diagonal is not constant over positions, and stays."""
    spec = dense({"h": 4}, w=["h", "h"], b=["h"])
    every = EquivariantLinear(Orbits(spec), 1, 1)
    uneven = EquivariantLinear(Orbits(spec), 1, 1, even_bias=False)
    assert set(every.bias) == {"g0", "g0_g0", "g0_g0_eq01"}
    assert set(uneven.bias) == {"g0_g0_eq01"}
    torch.manual_seed(0)
    stack = UNF(spec, 3, hidden=4, layers=1).stack
    torch.nn.init.normal_(stack.blocks[0].bias["g0_g0_eq01"])
    found = next(
        x for t, x in stack({"w": torch.zeros(2, 4, 4), "b": torch.zeros(2, 4)}).items() if len(t) == 2
    )
    assert (found[:, 0, 0] - found[:, 0, 1]).abs().max() > 0.1
    assert (found[:, 0, 1] - found[:, 1, 0]).abs().max() == 0


# -- pooling -----------------------------------------------------------------------------------------------


CASES = [
    ((2, 3, 4, 2), (1, 2), ("sum", "mean", "max")),
    ((2, 3, 4, 2), (1, 2), ("max",)),
    ((2, 3, 2), (1,), ("mean",)),
    ((2, 1, 3, 2), (1, 2), ("sum", "max")),
    ((2, 1, 2), (1,), ("sum", "max")),
    ((1, 2, 1, 3, 1), (1, 2, 3), ("max", "mean")),
]


@pytest.mark.parametrize(("shape", "axes", "pooling"), CASES)
def test_gradients_of_pools(shape, axes, pooling):
    """First and second, backwards and forwards, against finite differences."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: _PoolAxesForward.apply(x, axes, pooling), x, check_forward_ad=True, check_batched_grad=True
    )
    torch.autograd.gradgradcheck(lambda x: _PoolAxes.apply(x, axes, pooling), x)


@pytest.mark.parametrize(("shape", "axes", "pooling"), CASES)
@pytest.mark.parametrize("used", ["all", "last"])
def test_gradients_of_pools_are_those_of_autograd(shape, axes, pooling, used):
    """Also of ties, of some of the outputs alone; and the gradients that come in are left as they were."""
    torch.manual_seed(0)
    x = torch.randint(3, shape).double().requires_grad_()
    plain = [_reduce(x, how, axis) for axis in axes for how in pooling]
    ours = list(_PoolAxes.apply(x, axes, pooling))
    if used == "last":
        plain, ours = plain[-1:], ours[-1:]
    gradients = [torch.randn_like(part) for part in plain]
    before = [gradient.clone() for gradient in gradients]
    (expected,) = torch.autograd.grad(plain, x, gradients)
    (found,) = torch.autograd.grad(ours, x, gradients)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("pooling", [("mean", "max"), ("max",)])
@pytest.mark.parametrize("out", [2, None])
def test_derivatives_of_a_network_forwards_and_backwards_agree(out, pooling):
    spec = WeightSpec.mlp([1, 3, 2, 1])
    torch.manual_seed(0)
    model = DWS(spec, out, hidden=3, layers=2, head=4, pooling=pooling).double().eval()

    def read(flat):
        found = model(spec.unflatten(flat[None]))
        return found if out else spec.flatten(found)

    flat = torch.randn(spec.num_parameters, dtype=torch.float64)
    forwards = torch.func.jacfwd(read)(flat)
    backwards = torch.autograd.functional.jacobian(read, flat)
    assert forwards.abs().max() > 1e-3
    torch.testing.assert_close(forwards, backwards)
    _, tangent = torch.func.jvp(read, (flat,), (torch.ones_like(flat),))
    torch.testing.assert_close(tangent, forwards.sum(-1))


COMPILED = """
import torch
from weightspace.models import DWS, UNF
from weightspace.spec import WeightSpec
from weightspace.testing import mixed_spec, random_weights

for spec, kind in ((WeightSpec.mlp([2, 4, 3, 1]), DWS), (mixed_spec(), UNF)):
    for out in (2, None):
        torch.manual_seed(0)
        model = kind(spec, out, hidden=4, layers=1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        gradients = []
        for run in (compiled, model):
            found = run(random_weights(spec, (3,)))
            found = found if out else spec.flatten(found)
            model.zero_grad()
            found.square().sum().backward()
            gradients.append([found, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*gradients)
"""


def test_it_compiles_without_a_break():
    """In a process of its own: the checks of annotations that tests run under cannot be compiled."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)


# -- complete: every linear map that commutes with the group, and each of them once ------------------------


def dense(groups, **tensors):
    """A spec from names of axes; ``"features<heads"`` is within the dim of ``heads`` on the same tensor."""
    built = []
    for name, size in groups.items():
        inner, _, outer = name.partition("<")
        built.append(Group(inner, size, (outer,) if outer else ()))
    sizes = {group.name: group.size for group in built}
    nested = {group.name: group.within[0] for group in built if group.within}
    found = {}
    for tensor, axes in tensors.items():
        shape = tuple(sizes.get(axis, axis) for axis in axes)
        dims = TensorSpec.dense(shape, [axis if axis in sizes else None for axis in axes]).cells[0].dims
        at = {dim.group: place for place, dim in enumerate(dims)}
        bound = [
            Dim(
                dim.axis,
                dim.stride,
                dim.size,
                dim.group,
                (at[nested[dim.group]],) if dim.group in nested else (),
            )
            for dim in dims
        ]
        found[tensor] = TensorSpec(shape, (Cell(tuple(bound)),))
    return WeightSpec.build(built, found)


def concatenated():
    """W[o, a + b]: two cells side by side."""
    left = Cell((Dim(0, 5, 3, "o"), Dim(1, 1, 3, "a")))
    right = Cell((Dim(0, 5, 3, "o"), Dim(1, 1, 2, "b")), 3)
    groups = [Group("o", 3), Group("a", 3), Group("b", 2)]
    return WeightSpec.build(groups, {"w": TensorSpec((3, 5), (left, right))})


heads = {"H": 4, "d<H": 4, "e<H": 4, "D": 4}
projections = {"q": ["H", "d", "D"], "k": ["H", "d", "D"], "v": ["H", "e", "D"], "o": ["D", "H", "e"]}
COUNTS = {
    "MLP 2-4-1": (WeightSpec.mlp([2, 4, 1]), 41, 5),
    "MLP 2-4-4-1": (WeightSpec.mlp([2, 4, 4, 1]), 75, 7),
    "MLP 2-4-4-4-1": (WeightSpec.mlp([2, 4, 4, 4, 1]), 117, 9),
    "W_hh alone": (dense({"h": 4}, w=["h", "h"]), 15, 2),
    "RNN 2-4-1": (dense({"h": 4}, i=["h", 2], h=["h", "h"], b=["h"], o=[1, "h"], c=[1]), 100, 7),
    "GRU 2-4-1": (
        dense({"h": 4}, i=[3, "h", 2], h=[3, "h", "h"], b=[3, "h"], d=[3, "h"], o=[1, "h"], c=[1]),
        902,
        20,
    ),
    "A[h, r] + B[r, h]": (dense({"h": 4, "r": 4}, a=["h", "r"], b=["r", "h"]), 16, 2),
    "[H, d within H]": (dense({"H": 3, "d<H": 3}, w=["H", "d"]), 3, 1),
    "H x d without nesting": (dense({"H": 3, "d": 3}, w=["H", "d"]), 4, 1),
    "attention with D = 1": (
        dense(heads, q=["H", "d"], k=["H", "d"], v=["H", "e"], o=["H", "e"]),
        40,
        4,
    ),
    "attention with biases": (
        dense(heads, **projections, qb=["H", "d"], kb=["H", "d"], vb=["H", "e"], ob=["D"]),
        187,
        8,
    ),
    "grouped queries with D = 1": (
        dense(
            {"K": 4, "r<K": 4, "d<K": 4, "e<K": 4},
            q=["K", "r", "d"],
            k=["K", "d"],
            v=["K", "e"],
            o=["K", "r", "e"],
        ),
        46,
        4,
    ),
    "grouped convolution": (
        dense({"g": 4, "o<g": 4, "i<g": 4}, w=["g", "o", "i"], b=["g", "o"]),
        14,
        2,
    ),
    "W[o, a + b]": (concatenated(), 12, 2),
    "convolution, flatten, linear": (
        dense({"h": 3}, w=["h", 1, 3, 3], b=["h"], l=[2, "h", 4], c=[2]),
        724,
        20,
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_its_size_is_the_number_of_equivariant_maps(name):
    """The counts were confirmed by enumerating orbits by brute force."""
    spec, maps, biases = COUNTS[name]
    layer = EquivariantLinear(Orbits(spec), 1, 1, pooling=("mean",))
    assert sum(p.numel() for p in layer.weight.parameters()) == maps
    assert sum(p.numel() for p in layer.bias.parameters()) == biases


def swaps(spec):
    """Elements that generate the group: two neighbours change places, within one outer unit at a time."""
    for name, group in spec.groups.items():
        outer = [spec.groups[at].size for at in group.within]
        for at in itertools.product(*map(range, outer)):
            for i in range(group.size - 1):
                order = torch.arange(group.size).repeat(*outer, 1)
                order[(*at, i)], order[(*at, i + 1)] = i + 1, i
                yield {name: order}


def null_space_dimensions(spec):
    """Dimensions of {A : A g = g A} and of {b : g b = b}, for all g, from generators of the group."""
    size = spec.num_parameters
    identity = torch.eye(size, dtype=torch.float64)
    maps, constants = np.zeros((size**2, size**2)), np.zeros((size, size))
    for element in swaps(spec):
        g = spec.flatten(spec.act(element, spec.unflatten(identity))).numpy()
        # the commutant's dimension is that of the fixed points of G x G^-T on vec(A)
        rows = np.kron(g, g) - np.eye(size**2)
        maps += rows.T @ rows
        constants += (g - np.eye(size)).T @ (g - np.eye(size))
    return int((np.linalg.eigvalsh(maps) < 1e-9).sum()), int((np.linalg.eigvalsh(constants) < 1e-9).sum())


def span(spec):
    """Dimension of the affine maps that a layer can be, and the number of its parameters."""
    model = OnWeights(spec, pooling=("mean",)).double()
    inputs = random_weights(spec, (4 * spec.num_parameters,), dtype=torch.float64)
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    columns = []
    for name, p in zero.items():
        for at in range(p.numel()):
            one = p.clone()
            one.view(-1)[at] = 1.0
            out = torch.func.functional_call(model, {**zero, name: one}, (inputs,))
            columns.append(spec.flatten(out).flatten())
    return int(np.linalg.matrix_rank(torch.stack(columns).numpy())), len(columns)


@pytest.mark.parametrize("widths", [[2, 3, 1], [1, 3, 3, 1]])
def test_it_is_complete(widths):
    """Its span is the whole null space of the symmetry constraints: equal dimensions, no parameter idle."""
    spec = WeightSpec.mlp(widths)
    maps, constants = null_space_dimensions(spec)
    assert span(spec) == (maps + constants, maps + constants)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_it_is_complete_for_any_spec(seed):
    """Nested and repeated groups, groups of one unit, concatenations. Few units make some maps coincide."""
    spec = random_spec(seed)
    if not spec.tensors:
        return
    torch.manual_seed(seed)
    assert_equivariant(OnWeights(spec, 2), spec)
    with torch.no_grad():
        dimension, parameters = span(spec)
    assert dimension == sum(null_space_dimensions(spec))
    assert parameters >= dimension


def test_a_value_by_hand():
    """2-2-1 without biases, mean pooling: W1 -> W1 is a x + b mean(x), with the weights that we set."""
    spec = WeightSpec.mlp([1, 2, 1], bias=False)
    model = OnWeights(spec, pooling=("mean",))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        # the type (hidden0,) holds W0 and W1: rows are targets, columns sources
        model.layer.weight["g0"][1, 1] = 2.0
        model.layer.weight["all"][1, 0] = 10.0
        model.layer.bias["g0"][1] = 0.5
    weights = {
        "layers.0.weight": torch.tensor([[[1.0], [3.0]]]),
        "layers.1.weight": torch.tensor([[[5.0, 7.0]]]),
    }
    out = model(weights)
    assert out["layers.0.weight"].flatten().tolist() == [0.0, 0.0]
    assert out["layers.1.weight"].flatten().tolist() == [2 * 5 + 10 * 2 + 0.5, 2 * 7 + 10 * 2 + 0.5]


@pytest.mark.parametrize("name", SPECS)
def test_gather_and_scatter_are_inverse(name):
    spec = SPECS[name]
    weights = random_weights(spec, (3,))
    orbits = Orbits(spec)
    again = orbits.scatter(orbits.gather(weights))
    for key, tensor in weights.items():
        assert torch.equal(again[key][..., 0], tensor)


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(
        SpecError, match=r"tensor 'layers.0.weight': axis 1 has 784 fixed indices; .* up to 16"
    ):
        Orbits(WeightSpec.mlp([784, 4, 10]))
    with pytest.raises(ConfigError, match="expected some of mean, max, sum, found \\['median'\\]"):
        EquivariantLinear(Orbits(SPECS["2-4-1 sine"]), 1, 1, pooling=("median",))
    for widths, found in (((3, 16, 16), "3 x 16 x 16"), ((2, 8, 17), "axis 3 has 17")):
        spec = dense({"h": 4}, patches=["h", *widths])
        with pytest.raises(SpecError, match=f"tensor 'patches': .*{found} fixed indices"):
            Orbits(spec)
    assert Orbits(WeightSpec.mlp([16, 16])).entries[()] == 272, "256 of them in each cell"
    with pytest.raises(ConfigError, match=r"pooling: expected a sequence of names such as \('mean',\)"):
        EquivariantLinear(Orbits(SPECS["2-4-1 sine"]), 1, 1, pooling="mean")
    with pytest.raises(ConfigError, match="channels: expected at least one, found 0 -> 4"):
        EquivariantLinear(Orbits(SPECS["2-4-1 sine"]), 0, 4)
    with pytest.raises(ConfigError, match="global_mixing: expected full, shared, none, found 'some'"):
        EquivariantLinear(Orbits(SPECS["2-4-1 sine"]), 1, 1, global_mixing="some")


def sizes(spec_of, mixing):
    layers = [EquivariantLinear(Orbits(spec_of(depth)), 8, 8, global_mixing=mixing) for depth in (10, 20, 40)]
    assert all(bool(layer.hub) == (mixing == "shared") for layer in layers)
    return [sum(p.numel() for p in layer.parameters()) for layer in layers]


@pytest.mark.parametrize("mixing", ["shared", "none"])
def test_parameters_grow_linearly_with_depth(mixing):
    ten, twenty, forty = sizes(lambda depth: WeightSpec.mlp([2, *[4] * depth, 1]), mixing)
    assert forty - twenty == 2 * (twenty - ten)


def test_on_a_residual_stream_they_do_if_all_of_them_meet_in_a_vector():
    ten, twenty, forty = sizes(residual, "shared")
    assert forty - twenty == 2 * (twenty - ten)
    ten, twenty, forty = sizes(residual, "none")
    assert forty - twenty > 3 * (twenty - ten), "the tensors of a stream share its group"
