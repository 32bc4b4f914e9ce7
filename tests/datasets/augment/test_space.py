"""Input and output space: the signal afterwards is the one that the augmentation says, at the mapped coordinates."""

import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from weightspace.datasets.augment import (
    Batch,
    Brightness,
    Contrast,
    CoordinateScaling,
    DeepTranslation,
    Draws,
    Negation,
    Reflection,
    Rotation,
    Signal,
    SpaceAugmentation,
    Translation,
)
from weightspace.datasets.augment._layers import entries, last_layer, layers_of
from weightspace.datasets.augment._space import map_coordinates
from weightspace.errors import ConfigError
from weightspace.nets import CNN, MLP, coordinate_grid, evaluate_batch
from weightspace.spec import Cell, Dim, TensorSpec, WeightSpec
from weightspace.testing import random_weights
from weightspace.zoo import spec_of

OFFSET = 0.5
COUNT = 20


class Concatenated(nn.Module):
    """Coordinates are read by every layer, also by the last one; behind the units or before them."""

    def __init__(self, dims, outputs=1):
        super().__init__()
        self.enter = nn.Linear(dims, 8)
        self.deeper = nn.Linear(8 + dims, 6)
        self.leave = nn.Linear(dims + 6, outputs)

    def forward(self, x):
        units = torch.sin(3.0 * self.enter(x))
        units = torch.sin(2.0 * self.deeper(torch.cat([units, x], -1)))
        return self.leave(torch.cat([x, units], -1)) + OFFSET


class Products(nn.Module):
    """``x @ w + b`` with names of its own, and weights that are stored the other way round."""

    def __init__(self, dims, outputs=1):
        super().__init__()
        self.w0, self.b0 = nn.Parameter(torch.randn(dims, 7)), nn.Parameter(torch.randn(7))
        self.w1, self.b1 = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(5))
        self.w2, self.b2 = nn.Parameter(torch.randn(5, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        units = torch.tanh(x @ self.w0 + self.b0)
        return torch.tanh(units @ self.w1 + self.b1) @ self.w2 + self.b2 + OFFSET


class Filters(nn.Module):
    """Two layers read the coordinates side by side, as in multiplicative filter networks."""

    def __init__(self, dims, outputs=1):
        super().__init__()
        self.first, self.second = nn.Linear(dims, 6), nn.Linear(dims, 6)
        self.mix, self.leave = nn.Linear(6, 6), nn.Linear(6, outputs)

    def forward(self, x):
        units = self.mix(torch.sin(self.first(x))) * torch.sin(self.second(x))
        return self.leave(units) + OFFSET


NETS = {
    "siren": lambda dims, outputs: MLP((dims, 12, 9, outputs), w0=4.0, output_offset=OFFSET),
    "relu": lambda dims, outputs: MLP((dims, 9, outputs), activation="relu", output_offset=OFFSET),
    "concatenated": Concatenated,
    "products": Products,
    "filters": Filters,
}
COORDINATES = [Rotation(60), CoordinateScaling(0.5), Reflection(), Translation(0.5)]
VALUES = [Brightness(0.4), Contrast(0.6), Negation()]


def case(kind, dims, outputs=1, signal=None, batch=(COUNT,)):
    """A network in float64, and a batch of such."""
    net = NETS[kind](dims, outputs).double()
    spec = spec_of(net) if isinstance(net, MLP) else WeightSpec.trace(net, torch.randn(4, dims).double())
    signal = signal or Signal(offset=OFFSET)
    return net, Batch(spec, random_weights(spec, batch, dtype=torch.float64), signal=signal)


def rendered(net, weights, points):
    """Each network at its own points, (batch, points, dims)."""
    return vmap(lambda own, x: functional_call(net, own, (x,)))(weights, points)


def points_of(dims, count=COUNT):
    grid = coordinate_grid((4,) * dims if dims > 1 else (16,)).double()
    return grid.expand(count, *grid.shape)


def mapped(points, matrix, shift):
    """``A x + t``, written out."""
    if matrix is not None:
        points = torch.einsum("bij,bpj->bpi", matrix.double(), points)
    return points if shift is None else points + shift.double()[:, None]


# -- the signal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("augmentation", "dims"),
    [pytest.param(one, dims, id=f"{one.name}-{dims}") for one in COORDINATES for dims in one.dims],
)
def test_the_signal_is_the_one_at_the_mapped_coordinates(kind, dims, augmentation):
    net, batch = case(kind, dims)
    after = rendered(net, augmentation(batch, seed=3).weights, points_of(dims))
    matrix, shift = augmentation.mapping(dims, Draws.of(3, COUNT))
    expected = rendered(net, batch.weights, mapped(points_of(dims), matrix, shift))
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)
    before = rendered(net, batch.weights, points_of(dims))
    assert (after - before).abs().amax((1, 2)).median() > 0.05


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("signal", [Signal(OFFSET, 0.5), Signal(OFFSET, 0.0)], ids=["middle", "centred"])
@pytest.mark.parametrize("augmentation", VALUES, ids=lambda a: a.name)
def test_the_values_are_mapped_about_the_middle_of_the_signal(kind, signal, augmentation):
    net, batch = case(kind, 2, outputs=3, signal=signal)
    before, after = (
        rendered(net, weights, points_of(2))
        for weights in (batch.weights, augmentation(batch, seed=3).weights)
    )
    factor, shift = (
        None if drawn is None else drawn.double()[:, None, None]
        for drawn in augmentation.mapping(Draws.of(3, COUNT))
    )
    expected = before if factor is None else factor * (before - signal.middle) + signal.middle
    expected = expected if shift is None else expected + shift
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)
    assert (after - before).abs().amax((1, 2)).max() > 0.05


def test_a_float32_siren_renders_the_same_to_single_precision():
    net = MLP((2, 32, 32, 1), w0=30.0, output_offset=OFFSET)
    spec = spec_of(net)
    weights = {name: 0.1 * w for name, w in random_weights(spec, (COUNT,)).items()}
    after = Rotation(30)(Batch(spec, weights), seed=1).weights
    matrix, _ = Rotation(30).mapping(2, Draws.of(1, COUNT))
    points = points_of(2).float()
    expected = rendered(net, weights, torch.einsum("bij,bpj->bpi", matrix, points))
    torch.testing.assert_close(rendered(net, after, points), expected, rtol=0, atol=2e-4)


def test_twice_the_negative_is_the_signal_and_the_negative_is_about_its_middle():
    net, batch = case("siren", 2)
    negative = Negation(1.0)(batch)
    grid = coordinate_grid((4, 4)).double()
    before, after = (evaluate_batch(net, w, grid) for w in (batch.weights, negative.weights))
    torch.testing.assert_close(after, 1.0 - before)
    twice = Negation(1.0)(negative).weights
    torch.testing.assert_close(batch.spec.flatten(twice), batch.spec.flatten(batch.weights))


# -- what is drawn -----------------------------------------------------------------------------------------


class Constant(Draws):
    """The same number each time."""

    def __init__(self, value, count=1):
        super().__init__(torch.arange(count))
        self.value = value

    def uniform(self, *shape):
        return torch.full((len(self), *shape), self.value)


def test_a_positive_angle_turns_a_picture_clockwise():
    """A spot above the middle, at row -1, is afterwards to the right of it, at column 1."""
    spec = WeightSpec.mlp([2, 1, 1], activation="tanh")
    up = {
        "layers.0.weight": [[-1.0, 0.0]],
        "layers.0.bias": [0.0],
        "layers.1.weight": [[1.0]],
        "layers.1.bias": [0.0],
    }
    net = MLP((2, 1, 1), activation="tanh")
    matrix, _ = Rotation(90).mapping(2, Constant(1.0))
    turned = map_coordinates(spec, {name: torch.tensor([w]) for name, w in up.items()}, matrix)
    above, right, below, left = evaluate_batch(
        net, turned, torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
    )[0, :, 0].tolist()
    assert right == pytest.approx(math.tanh(1))
    assert left == pytest.approx(-math.tanh(1))
    assert above == pytest.approx(0, abs=1e-6)
    assert below == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_rotations_are_rotations_by_angles_up_to_the_largest(dims):
    matrix, shift = Rotation(40).mapping(dims, Draws.of(0, 4000))
    assert shift is None
    eye = torch.eye(dims).expand_as(matrix)
    torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(4000), rtol=0, atol=1e-6)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(-1)
    angle = torch.rad2deg(torch.arccos(((trace - (dims - 2)) / 2).clamp(-1, 1)))
    assert 39.5 < angle.max() <= 40.01
    assert angle.mean().item() == pytest.approx(20, abs=0.6)
    skew = matrix - matrix.mT
    if dims == 2:
        assert (skew[:, 1, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    else:
        axis = nn.functional.normalize(torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1), dim=-1)
        covariance = axis.T @ axis / 4000
        torch.testing.assert_close(covariance, torch.eye(3) / 3, rtol=0, atol=0.03)
        torch.testing.assert_close((matrix @ axis[..., None])[..., 0], axis, rtol=0, atol=1e-5)


def test_scaling_reflection_and_translation_draw_what_they_say():
    matrix, _ = CoordinateScaling(0.3).mapping(2, Draws.of(0, 4000))
    factor = matrix[:, 0, 0]
    assert torch.equal(matrix, factor[:, None, None] * torch.eye(2))
    assert 0.7 <= factor.min() < 0.705
    assert 1.295 < factor.max() <= 1.3
    assert factor.mean().item() == pytest.approx(1.0, abs=0.01)
    matrix, _ = Reflection(0.2).mapping(3, Draws.of(0, 4000))
    signs = matrix.diagonal(dim1=1, dim2=2)
    assert torch.equal(matrix, torch.diag_embed(signs))
    assert (signs < 0).float().mean(0).tolist() == pytest.approx([0.2] * 3, abs=0.025)
    assert torch.corrcoef(signs.T).fill_diagonal_(0).abs().max() < 0.05
    none, shift = Translation(0.25).mapping(2, Draws.of(0, 4000))
    assert none is None
    assert -0.25 <= shift.min() < -0.245
    assert 0.245 < shift.max() <= 0.25
    assert torch.corrcoef(shift.T)[0, 1].abs() < 0.05


def test_values_draw_what_they_say():
    none, shift = Brightness(0.2).mapping(Draws.of(0, 4000))
    assert none is None
    assert -0.2 <= shift.min() < -0.195
    assert 0.195 < shift.max() <= 0.2
    factor, none = Contrast(0.4).mapping(Draws.of(0, 4000))
    assert none is None
    assert 0.6 <= factor.min() < 0.605
    assert 1.395 < factor.max() <= 1.4
    factor, _ = Negation(0.3).mapping(Draws.of(0, 4000))
    assert set(factor.tolist()) == {-1.0, 1.0}
    assert (factor < 0).float().mean().item() == pytest.approx(0.3, abs=0.025)


@pytest.mark.parametrize(
    "nothing",
    [
        *(Rotation(0), CoordinateScaling(0), Reflection(0), Translation(0)),
        *(DeepTranslation(0), Brightness(0), Contrast(0), Negation(0)),
    ],
    ids=lambda a: a.name,
)
def test_nothing_to_do_changes_nothing(nothing):
    _, batch = case("siren", 2)
    after = nothing(batch, seed=1).weights
    torch.testing.assert_close(
        batch.spec.flatten(after), batch.spec.flatten(batch.weights), rtol=0, atol=1e-15
    )


# -- the published approximation ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siren", "products"])
def test_a_deep_translation_changes_the_second_bias_alone(kind):
    _, batch = case(kind, 2)
    after = DeepTranslation(0.25)(batch, seed=3).weights
    shift = (2 * Draws.of(3, COUNT).uniform(2) - 1).double() * 0.25
    names = list(batch.weights)
    first, second, bias = (
        ("layers.0.weight", "layers.1.weight", "layers.1.bias") if kind == "siren" else ("w0", "w1", "b1")
    )
    one, two = batch.weights[first], batch.weights[second]
    along = "boi,bi->bo" if kind == "siren" else "bio,bi->bo"
    pushed = torch.einsum(along, two, torch.einsum(along, one, shift))
    torch.testing.assert_close(after[bias], batch.weights[bias] + pushed)
    assert all(after[name] is batch.weights[name] for name in names if name != bias)


def test_a_deep_translation_is_exact_where_the_activation_is_the_identity():
    spec = WeightSpec.mlp([2, 6, 5, 1])
    weights = random_weights(spec, (COUNT,), dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 5), nn.Linear(5, 1)).double()

    def linear(w):
        return {name.removeprefix("layers."): values for name, values in w.items()}

    after = DeepTranslation()(Batch(spec, weights), seed=3).weights
    _, shift = Translation().mapping(2, Draws.of(3, COUNT))
    expected = rendered(net, linear(weights), mapped(points_of(2), None, shift))
    torch.testing.assert_close(rendered(net, linear(after), points_of(2)), expected)


# -- batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [*COORDINATES, *VALUES, DeepTranslation()], ids=lambda a: a.name)
def test_all_checkpoints_of_a_trajectory_get_the_same_draw(augmentation):
    _, batch = case("siren", 2, batch=(COUNT, 3))
    after = augmentation(batch, seed=3).weights
    for at in range(3):
        alone = batch.with_(weights={name: w[:, at] for name, w in batch.weights.items()})
        expected = augmentation(alone, seed=3).weights
        for name, w in expected.items():
            torch.testing.assert_close(after[name][:, at], w, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("augmentation", [*COORDINATES, *VALUES, DeepTranslation()], ids=lambda a: a.name)
def test_targets_that_are_weights_move_along(augmentation):
    assert isinstance(augmentation, SpaceAugmentation)
    assert augmentation.changes_signal
    _, batch = case("siren", 2)
    targets = random_weights(batch.spec, (COUNT,), seed=9, dtype=torch.float64)
    after = augmentation(batch.with_(targets=targets), seed=3).targets
    expected = augmentation(batch.with_(weights=targets), seed=3).weights
    assert torch.equal(batch.spec.flatten(after), batch.spec.flatten(expected))
    labels = torch.arange(COUNT)
    assert augmentation(batch.with_(targets=labels, classes=COUNT)).targets is labels


# -- where coordinates enter -------------------------------------------------------------------------------


def test_coordinates_are_found_wherever_they_are_read():
    _, batch = case("concatenated", 2)
    found = entries(batch.spec, "rotation")
    assert [(at.weight, at.start, at.bias) for at in found] == [
        ("enter.weight", 0, "enter.bias"),
        ("deeper.weight", 8, "deeper.bias"),
        ("leave.weight", 0, "leave.bias"),
    ]
    assert last_layer(batch.spec, "contrast") == ("leave.weight", "leave.bias")
    _, batch = case("concatenated", 1)
    assert [(at.weight, at.start, at.size) for at in entries(batch.spec, "rotation")] == [
        ("enter.weight", 0, 1),
        ("deeper.weight", 8, 1),
        ("leave.weight", 0, 1),
    ]
    _, batch = case("products", 3)
    assert [(at.weight, at.bias, at.output) for at in layers_of(batch.spec)] == [
        ("w0", "b0", 1),
        ("w1", "b1", 1),
        ("w2", "b2", 1),
    ]


def test_a_table_and_kernels_are_no_layers():
    table = nn.Sequential(nn.Embedding(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    spec = WeightSpec.trace(table, torch.zeros(3, dtype=torch.long))
    assert [layer.weight for layer in layers_of(spec)] == ["2.weight", "4.weight"]
    assert [layer.weight for layer in layers_of(spec_of(CNN((1, 8, 8), [4], 2)))] == ["classifier.weight"]


def heads():
    """Two layers write outputs."""
    tensors = dict(WeightSpec.mlp([2, 4, 1]).tensors)
    tensors["second.weight"] = TensorSpec.dense((1, 4), [None, "hidden0"])
    return WeightSpec.build(WeightSpec.mlp([2, 4, 1]).groups.values(), tensors)


def straight():
    """The coordinates also go straight to the outputs."""
    tensors = dict(WeightSpec.mlp([2, 4, 1]).tensors)
    tensors["straight.weight"] = TensorSpec.dense((1, 2), [None, None])
    return WeightSpec.build(WeightSpec.mlp([2, 4, 1]).groups.values(), tensors)


def tied(name):
    tensors = dict(WeightSpec.mlp([2, 4, 1]).tensors)
    cells, shape = tensors[name].cells, tensors[name].shape
    tensors[name] = TensorSpec(shape, cells, aliases=("elsewhere",))
    return WeightSpec.build(WeightSpec.mlp([2, 4, 1]).groups.values(), tensors)


def two_inputs():
    """A direction of two numbers enters beside a position of three."""
    spec = WeightSpec.mlp([3, 4, 4, 1])
    tensors = dict(spec.tensors)
    tensors["direction.weight"] = TensorSpec.dense((4, 2), ["hidden1", None])
    return WeightSpec.build(spec.groups.values(), tensors)


def interleaved():
    """Columns take turns: coordinates and units of another layer."""
    spec = WeightSpec.mlp([2, 4, 2, 1])
    tensors = dict(spec.tensors)
    rows = Dim(0, 4, 4, "hidden0")
    cells = (Cell((rows, Dim(1, 2, 2))), Cell((rows, Dim(1, 2, 2, "hidden1")), 1))
    tensors["mixed.weight"] = TensorSpec((4, 4), cells)
    return WeightSpec.build(spec.groups.values(), tensors)


SPECS = {
    "interleaved": interleaved,
    "line": lambda: WeightSpec.mlp([1, 32, 1], activation="sine"),
    "pixels": lambda: WeightSpec.mlp([784, 64, 10]),
    "linear": lambda: WeightSpec.mlp([2, 1]),
    "cnn": lambda: spec_of(CNN((1, 8, 8), [4], 2)),
    "recurrent": lambda: WeightSpec.trace(nn.LSTM(2, 4), torch.randn(5, 3, 2)),
    "concatenated": lambda: case("concatenated", 2)[1].spec,
    "filters": lambda: case("filters", 2)[1].spec,
    "no bias": lambda: WeightSpec.mlp([2, 4, 1], bias=False),
    "heads": heads,
    "straight": straight,
    "tied": lambda: tied("layers.0.weight"),
    "tied last": lambda: tied("layers.1.weight"),
    "two inputs": two_inputs,
}
FEW = "found no layer of units that reads so few inputs"


@pytest.mark.parametrize(
    ("kind", "augmentation", "message"),
    [
        (
            "line",
            Rotation(),
            "rotation: expected a network of 2 or 3 coordinates, found 1 that layers.0.weight reads",
        ),
        (
            "pixels",
            Rotation(),
            f"rotation: expected a network of 2 or 3 coordinates, {FEW} (layers.0.weight has shape [64, 784])",
        ),
        ("linear", Rotation(), FEW),
        ("cnn", Rotation(), f"{FEW} (convolutions.0.weight has shape [4, 1, 3, 3])"),
        ("cnn", Brightness(), "brightness: expected a network of 1, 2 or 3 coordinates, found no layer"),
        ("recurrent", CoordinateScaling(), f"scaling: expected a network of 1, 2 or 3 coordinates, {FEW}"),
        ("two inputs", Reflection(), "found 2 and 3 that layers.0.weight, direction.weight reads"),
        ("no bias", Translation(), "translation: expected a bias beside layers.0.weight, found none"),
        ("no bias", Contrast(), "contrast: expected a bias beside layers.1.weight, found none"),
        (
            "no bias",
            DeepTranslation(),
            "deep_translation: expected a bias beside layers.1.weight, found none",
        ),
        (
            "heads",
            Negation(),
            "negation: expected one layer that writes the outputs, found layers.1.weight, second.weight",
        ),
        ("straight", Rotation(), "found straight.weight, which leads from fixed inputs to fixed outputs"),
        ("straight", Brightness(), "found straight.weight, which leads from fixed inputs to fixed outputs"),
        ("tied", Reflection(), "found columns of layers.0.weight that are tied, split or interleaved"),
        (
            "tied last",
            Contrast(),
            "contrast: expected a last layer of its own, found layers.1.weight, which is tied",
        ),
        (
            "concatenated",
            DeepTranslation(),
            "deep_translation: expected one layer that reads the coordinates and one that reads its units, found "
            "enter.weight, deeper.weight, leave.weight",
        ),
        ("filters", DeepTranslation(), "found first.weight, second.weight, mix.weight"),
    ],
)
def test_what_does_not_suit_is_refused_in_one_sentence(kind, augmentation, message):
    spec = SPECS[kind]()
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        augmentation(Batch(spec, random_weights(spec, (2,))))
    assert "\n" not in str(caught.value)


def test_networks_without_biases_still_rotate_and_reflect():
    spec = SPECS["no bias"]()
    batch = Batch(spec, random_weights(spec, (3,)))
    for augmentation in (Rotation(), CoordinateScaling(), Reflection(1.0)):
        assert not torch.equal(
            augmentation(batch).weights["layers.0.weight"], batch.weights["layers.0.weight"]
        )
