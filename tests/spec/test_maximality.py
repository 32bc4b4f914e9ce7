"""What is taken out of a spec must be found missing, and full specs must lack nothing."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from weightspace.errors import SpecError
from weightspace.spec import Cell, Frozen, MissedSymmetry, Move, TensorSpec, WeightSpec, missed_symmetries
from weightspace.testing import networks

CASES = networks("core")
MAXIMAL = (
    "mlp",
    "siren",
    "mlp_gaussian",
    "weight_norm_mlp",
    "rms_norm_residual",
    "tied_autoencoder",
    "mixture_of_experts",
    "deep_sets",
    "norm_free_residual",
    "mlp_tanh",
    "bilinear",
    "pixel_shuffle",
    "rnn_relu",
)


@cache
def traced(case):
    return WeightSpec.trace(case.build(), case.inputs(), outputs=case.outputs, verify=False)


def missed(case, spec, kind):
    return missed_symmetries(spec, case.build(), case.inputs(), outputs=case.outputs, symmetries=[kind])


def with_cells(spec, change, groups):
    """The spec with other cells and groups, and without scalings."""
    tensors = {
        name: replace(tensor, cells=tuple(new for cell in tensor.cells for new in change(cell)))
        for name, tensor in spec.tensors.items()
    }
    return WeightSpec.build(groups, tensors, constants=spec.constants)


def without_group(spec, name):
    """The spec in which the units of a group, and those nested in it, are fixed."""
    gone = {at for at, group in spec.groups.items() if name in (at, *group.within)}

    def fixed(cell):
        dims = (replace(dim, group=None, parents=()) if dim.group in gone else dim for dim in cell.dims)
        yield replace(cell, dims=tuple(dims))

    return with_cells(spec, fixed, [group for at, group in spec.groups.items() if at not in gone])


def with_group_split(spec, name, first):
    """The spec in which the first units of a group are exchanged among themselves, and so are the others."""
    group = spec.groups[name]
    parts = [replace(group, size=first), replace(group, name=f"{name}_rest", size=group.size - first)]

    def split(cell):
        at = next((at for at, dim in enumerate(cell.dims) if dim.group == name), None)
        if at is None:
            yield cell
            return
        dim, start = cell.dims[at], 0
        for part in parts:
            own = replace(dim, size=part.size, group=part.name)
            dims = (*cell.dims[:at], own, *cell.dims[at + 1 :])
            # a group that stands twice in a cell is split twice
            rest = Cell(dims, cell.offset + start * dim.stride)
            yield from split(rest) if part.name != name else split_other(rest, at)
            start += part.size

    def split_other(cell, done):
        """Split the later occurrence, where there is one."""
        hidden = replace(cell.dims[done], group="done")
        for new in split(Cell((*cell.dims[:done], hidden, *cell.dims[done + 1 :]), cell.offset)):
            dims = (replace(dim, group=name) if dim.group == "done" else dim for dim in new.dims)
            yield replace(new, dims=tuple(dims))

    others = [group for at, group in spec.groups.items() if at != name]
    return with_cells(spec, split, [*parts, *others])


def without_scaling(spec, name):
    return replace(spec, scalings=Frozen({at: s for at, s in spec.scalings.items() if at != name}))


def axes(symmetry):
    return {(move.tensor, move.axis) for move in symmetry.moves}


def group_axes(spec, name):
    return {
        (tensor, dim.axis)
        for tensor, entry in spec.tensors.items()
        for cell in entry.cells
        for dim in cell.dims
        if dim.group == name
    }


# -- permutations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "group"),
    [
        ("mlp", "hidden1"),
        ("norm_free_residual", "hidden0"),
        ("tied_autoencoder", "hidden0"),
        ("deep_sets", "hidden1"),  # concatenated with itself
        ("rnn_relu", "hidden0"),
        ("gru_cell", "hidden0"),  # three gates each
        ("multihead_attention", "heads0"),
        ("mixture_of_experts", "blocks0"),
    ],
)
def test_a_group_that_is_left_out_is_found(network, group):
    case = CASES[network]
    spec = traced(case)
    found = missed(case, without_group(spec, group), "permutation")
    assert any(axes(symmetry) == group_axes(spec, group) for symmetry in found)
    assert all(symmetry.change < 1e-9 for symmetry in found)


@pytest.mark.parametrize(
    ("network", "group"), [("multihead_attention", "features0"), ("mixture_of_experts", "features0")]
)
def test_a_nested_group_that_is_fixed_is_found(network, group):
    case = CASES[network]
    spec = traced(case)
    found = missed(case, without_group(spec, group), "permutation")
    assert group_axes(spec, group) in map(axes, found)


@pytest.mark.parametrize(
    ("network", "group", "first"),
    [("mlp", "hidden0", 3), ("tied_autoencoder", "hidden1", 2), ("rnn_relu", "hidden0", 2)],
)  # fmt: skip
def test_a_group_that_is_split_in_two_is_found(network, group, first):
    """The first unit and the last are exchanged, which no element of the split group does."""
    case = CASES[network]
    spec = traced(case)
    found = missed(case, with_group_split(spec, group, first), "permutation")
    ends = (0, spec.groups[group].size - 1)
    assert group_axes(spec, group) in [
        axes(symmetry) for symmetry in found if all(move.units == ends for move in symmetry.moves)
    ]


def test_batch_norm_moves_with_its_channels():
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 2, 3)
    ).eval()
    inputs = torch.randn(3, 2, 3, 4)
    spec = WeightSpec.trace(net, inputs)
    poorer = without_group(spec, "hidden0")
    found = missed_symmetries(poorer, net, inputs, symmetries=["permutation"])
    single = next(symmetry for symmetry in found if symmetry.moves[0].stride == 1)
    assert axes(single) == {
        ("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0),
        ("1.running_mean", 0), ("1.running_var", 0), ("4.weight", 1),
    }  # fmt: skip
    assert {move.stride for move in single.moves if move.tensor == "4.weight"} == {2}


def test_units_that_a_wrong_architecture_would_free_are_not_found():
    """The last layer's outputs are told apart, and so are the inputs."""
    net = nn.Linear(4, 4)
    spec = WeightSpec.build(
        [], {name: TensorSpec.dense(t.shape, [None] * t.ndim) for name, t in net.named_parameters()}
    )
    assert missed_symmetries(spec, net, torch.randn(5, 4)) == []


# -- scalings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "scaling"),
    [
        ("mlp", "positive(hidden1)"),
        ("tied_autoencoder", None),
        ("rnn_relu", "positive(hidden0)"),
        ("multihead_attention", "positive(features1)"),
        ("mlp_tanh", "sign(hidden0)"),
        ("mlp_gaussian", "sign(hidden1)"),
    ],
)
def test_a_scaling_that_is_left_out_is_found(network, scaling):
    case = CASES[network]
    spec = traced(case)
    name = scaling or next(iter(spec.scalings))
    lost = spec.scalings[name]
    found = missed(case, without_scaling(spec, name), lost.kind)
    cells = {
        (place.tensor, spec.tensors[place.tensor].cells[place.cell].dims[place.dim].axis)
        for place in lost.exponents
    }
    assert any(axes(symmetry) == cells for symmetry in found)


def test_the_power_of_a_factor_is_found():
    """A ReLU squared: what multiplies the first layer by 2 divides the second by 4."""

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.second(self.first(x).relu().square())

    net, inputs = Squared(), torch.randn(5, 2)
    spec = WeightSpec.trace(net, inputs)
    poorer = replace(spec, scalings=Frozen())
    found = missed_symmetries(poorer, net, inputs, symmetries=["positive"])
    ratios = {
        move.power / next(m.power for m in symmetry.moves if m.tensor == "second.weight")
        for symmetry in found
        for move in symmetry.moves
        if move.tensor == "first.bias"
    }
    assert ratios == {-0.5}


def test_a_bounded_activation_does_not_scale():
    """Random weights must be large enough that a ReLU6 is told from a ReLU."""
    torch.manual_seed(0)
    net, inputs = nn.Sequential(nn.Linear(2, 4), nn.ReLU6(), nn.Linear(4, 3)), torch.randn(50, 2)
    spec = WeightSpec.trace(net, inputs)
    assert not spec.scalings
    assert missed_symmetries(spec, net, inputs, symmetries=["positive"]) == []


# -- full specs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", MAXIMAL)
def test_a_traced_spec_lacks_nothing(network):
    case = CASES[network]
    assert missed_symmetries(traced(case), case.build(), case.inputs(), outputs=case.outputs) == []


def test_what_no_output_depends_on_is_no_symmetry():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.side = nn.Linear(3, 5), nn.Linear(3, 4)

        def forward(self, x):
            return self.body(x), self.side(x)

    spec = WeightSpec.trace(Cut(), torch.zeros(2, 3), outputs=("0",))
    assert missed_symmetries(spec, Cut(), torch.randn(4, 3), outputs=("0",)) == []


def test_a_symmetry_prints_as_what_moves():
    swap = MissedSymmetry(
        "permutation", (Move("0.weight", 0, (0,), 1, (0, 1)), Move("4.weight", 1, (0, 8), 4, (0, 1))), 0.0
    )
    assert str(swap) == "permutation: 0.weight axis 0 units 0<->1, 4.weight axis 1 units 0<->1 of 4 from 0, 8"
    scaled = MissedSymmetry("positive", (Move("0.bias", 0, (0,), 1, (2, 3), -0.5),), 0.0)
    assert str(scaled) == "positive: 0.bias axis 0 units 2 3 ^-0.5"


# -- bad arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (WeightSpec.mlp([2, 4, 1]), {"symmetries": ["phase"]}, "symmetries: expected some of permut.*, found 'phase'"),
        (WeightSpec.mlp([2, 4, 1], layers=["0", "2"]), {"outputs": ["logits"]}, "outputs: the module returns 0"),
        (WeightSpec.mlp([2, 4, 1]), {}, "spec: the module has no tensor 'layers.0.weight'"),
        (WeightSpec.mlp([2, 5, 1], layers=["0", "2"]), {}, r"'0.weight' should end in shape \[5, 2\], found \[4, 2\]"),
        (WeightSpec.mlp([2, 4, 1], layers=["0", "2"]), {"inputs": torch.zeros(5, 3)}, "Sequential cannot be exported"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(spec, options, message):
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(SpecError, match=message):
        missed_symmetries(spec, net, **{"inputs": torch.zeros(5, 2), **options})
