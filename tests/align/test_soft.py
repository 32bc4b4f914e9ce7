"""Matrices in place of permutations: exact on permutations, linear, differentiable, and rounded back."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.align._soft import act_soft, matrices_of, round_matrices
from weightspace.errors import SpecError
from weightspace.spec import Cell, Dim, Group, TensorSpec, WeightSpec
from weightspace.spec._types import cell_index
from weightspace.testing import mixed_spec, random_spec, random_weights

DOUBLE = torch.float64
seeds = st.integers(0, 2**31)


def element_of(spec, batch=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spec.random_element(batch, symmetries=["permutation"], generator=generator)


def matrices_for(spec, seed=0, batch=(), dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(
            *batch, *spec.unit_shape(name), spec.unit_shape(name)[-1], generator=generator, dtype=dtype
        )
        for name in spec.groups
    }


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@settings(max_examples=40)
@given(seeds)
def test_matrices_of_permutations_act_as_the_permutations(seed):
    """Also on cells in which groups nest, repeat and meet fixed indices; bit for bit."""
    spec = random_spec(seed)
    weights, element = random_weights(spec, (3,), seed), element_of(spec, (3,), seed)
    assert_equal(act_soft(spec, matrices_of(spec, element), weights), spec.act(element, weights))


def test_statistics_move_and_constants_stay():
    units = Group("units", 4)
    tensors = {
        "scale": TensorSpec.dense((4,), ["units"]),
        "mean": TensorSpec.dense((4,), ["units"], kind="statistic"),
    }
    spec = WeightSpec.build([units], tensors, constants={"count": ()})
    weights = {**random_weights(spec), "count": torch.tensor(3)}
    moved = act_soft(spec, {"units": torch.full((4, 4), 0.25)}, weights)
    for name in tensors:
        torch.testing.assert_close(moved[name], weights[name].mean().expand(4))
    assert moved["count"] == 3
    assert moved["count"].dtype == torch.int64


def slowly(spec, matrices, weights):
    """Element by element, the sum over all source indices of the product of matrix entries."""
    result = {}
    for name, tensor in spec.tensors.items():
        flat, out = weights[name].flatten(), torch.zeros(tensor.numel, dtype=DOUBLE)
        for cell in tensor.cells:
            index = torch.from_numpy(cell_index(cell))
            places = list(product(*map(range, cell.sizes)))
            for to in places:
                for source in places:
                    out[index[to]] += flat[index[source]] * factor(cell, matrices, to, source)
        result[name] = out.view(tensor.shape)
    return result


def factor(cell, matrices, to, source):
    found = 1.0
    for at, dim in enumerate(cell.dims):
        if dim.group is None:
            found *= float(to[at] == source[at])
        else:
            outer = tuple(to[parent] for parent in dim.parents)
            found *= matrices[dim.group][(*outer, to[at], source[at])].item()
    return found


@pytest.mark.parametrize("spec", [mixed_spec(), WeightSpec.mlp([2, 3, 4, 1])], ids=["mixed", "mlp"])
def test_any_matrices_act_linearly_along_every_dim(spec):
    matrices, weights = matrices_for(spec), random_weights(spec, dtype=DOUBLE)
    found, expected = act_soft(spec, matrices, weights), slowly(spec, matrices, weights)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_batch_axes_broadcast():
    spec = mixed_spec()
    matrices = matrices_for(spec, batch=(3, 1))
    matrices["stream"] = matrices["stream"][:1]
    weights = random_weights(spec, (2,), dtype=DOUBLE)
    moved = act_soft(spec, matrices, weights)
    for row in range(3):
        for column in range(2):
            some = {name: value[min(row, len(value) - 1), 0] for name, value in matrices.items()}
            expected = act_soft(spec, some, {name: value[column] for name, value in weights.items()})
            for name in expected:
                torch.testing.assert_close(moved[name][row, column], expected[name])


def test_gradients_reach_matrices_and_weights():
    spec = mixed_spec()
    matrices, weights = matrices_for(spec), random_weights(spec, dtype=DOUBLE)
    names, inputs = [*matrices, *weights], [*matrices.values(), *weights.values()]

    def moved(*tensors):
        given_ = dict(zip(names, tensors, strict=True))
        found = act_soft(spec, {n: given_[n] for n in matrices}, {n: given_[n] for n in weights})
        return tuple(found[n] for n in weights if n != "running_mean")

    assert torch.autograd.gradcheck(moved, [tensor.requires_grad_() for tensor in inputs])


def test_orders_that_inference_mode_cached_serve_training():
    rows = Cell((Dim(0, 1, 5, "units"),), 0), Cell((Dim(0, 1, 2),), 5)
    spec = WeightSpec.build([Group("units", 5)], {"w": TensorSpec((7,), rows)})
    with torch.inference_mode():
        act_soft(spec, {"units": torch.eye(5)}, {"w": torch.ones(7)})
    matrix = torch.eye(5, requires_grad=True)
    act_soft(spec, {"units": matrix}, {"w": torch.arange(7.0)})["w"].sum().backward()
    assert torch.equal(matrix.grad, torch.arange(5.0).expand(5, 5))


def test_half_precision_is_summed_in_float32():
    spec = WeightSpec.mlp([1, 4096, 1], bias=False)
    weights = {name: torch.ones(spec.shape_of(name), dtype=torch.bfloat16) for name in spec.tensors}
    matrix = torch.full((4096, 4096), 1 / 4096, dtype=torch.bfloat16)
    moved = act_soft(spec, {"hidden0": matrix}, weights)
    assert moved["layers.0.weight"].dtype == torch.bfloat16
    assert (moved["layers.0.weight"] == 1).all()


def test_what_no_matrix_moves_is_copied():
    spec = WeightSpec.mlp([1, 2, 1])
    weights = random_weights(spec)
    moved = act_soft(spec, {}, weights)
    assert_equal(moved, weights)
    assert all(moved[name].data_ptr() != weights[name].data_ptr() for name in weights)


@settings(max_examples=20)
@given(seeds)
def test_rounding_undoes_small_disturbances(seed):
    spec = mixed_spec()
    element = element_of(spec, (2,), seed)
    noise = matrices_for(spec, seed, (2,), torch.float32)
    blurred = {name: matrix + 0.49 * noise[name] for name, matrix in matrices_of(spec, element).items()}
    assert_equal(round_matrices(spec, blurred), element)


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        ({"hidden1": torch.eye(3)}, "matrices: 'hidden1' is no group of this spec"),
        ({"hidden0": torch.eye(2)}, r"matrices: 'hidden0' should end in shape \[3, 3\], found \[2, 2\]"),
        (
            {"hidden0": torch.ones(3, 3).long()},
            "matrices: 'hidden0' should hold numbers of a floating type, found int64",
        ),
        (
            {"hidden0": torch.eye(3).expand(4, 3, 3)},
            r"matrices: batch shape \[4\] does not broadcast against .* \[2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(matrices, message):
    spec = WeightSpec.mlp([1, 3, 1])
    with pytest.raises(SpecError, match=message):
        act_soft(spec, matrices, random_weights(spec, (2,)))
