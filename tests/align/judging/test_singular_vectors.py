"""Singular vectors: hand-worked matrices, the definitions term by term, and what permutations leave."""

import io
import json
import math

import pytest
import torch

from weightspace.align import weight_matching
from weightspace.align.judging import singular_vectors
from weightspace.errors import ConfigError, SpecError
from weightspace.spec import WeightSpec
from weightspace.testing import networks

ENERGY = (0.3, 0.8, 1.0)


def one_matrix(rows=2, columns=2):
    return WeightSpec.mlp([columns, rows], activation="relu", bias=False)


def of(matrix):
    return {"layers.0.weight": torch.as_tensor(matrix)}


def test_a_matrix_with_exchanged_rows():
    a, b = of([[3.0, 0.0], [0.0, 1.0]]), of([[0.0, 1.0], [3.0, 0.0]])
    report = singular_vectors(one_matrix(), a, b, aligned=a, energy=(0.9, 1.0))
    (found,) = report.matrices.values()
    for values in (found.values_a, found.values_b, found.values_aligned):
        assert values.tolist() == pytest.approx([3.0, 1.0])
    assert found.before.joint == pytest.approx((0.0, 0.0))
    assert found.before.overlap.tolist() == pytest.approx([0.0, 0.0])
    # left vectors are exchanged: (9 * 1 + 1 * 9) / (81 + 1); right ones are the same
    assert found.before.left == pytest.approx((0.0, 18 / 82))
    assert found.before.right == pytest.approx((1.0, 1.0))
    assert found.before.distance == pytest.approx(math.sqrt(20))
    assert found.after.joint == found.after.directions == pytest.approx((1.0, 1.0))
    assert found.after.overlap.tolist() == pytest.approx([3.0, 1.0])
    assert found.after.distance == 0.0
    assert found.scale == pytest.approx(math.sqrt(20))


def leading(values, share):
    total = values.square().sum()
    return next(
        k for k in range(1, len(values) + 1) if values[:k].square().sum() >= share * total * (1 - 1e-9)
    )


def by_definition(a, b, share):
    """R, directions, left and right, one pair of singular vectors after the other."""
    (u, s, vh), (x, t, yh) = (torch.linalg.svd(matrix, full_matrices=False) for matrix in (a, b))
    k, m = leading(s, share), leading(t, share)
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(k):
        for j in range(m):
            left, right = u[:, i] @ x[:, j], vh[i] @ yh[j]
            weight = (s[i] * t[j]).square()
            sums += torch.stack(
                [s[i] * t[j] * left * right, left * right, weight * left**2, weight * right**2]
            )
    norms = [s[:k].norm() * t[:m].norm(), math.sqrt(k * m)] + 2 * [(s[:k] ** 2).norm() * (t[:m] ** 2).norm()]
    return [float(total / norm) for total, norm in zip(sums, norms, strict=True)]


def test_closeness_is_what_its_definition_says():
    generator = torch.Generator().manual_seed(0)
    a, b, aligned = torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)
    report = singular_vectors(one_matrix(6, 9), of(a), of(b), of(aligned), energy=ENERGY)
    (found,) = report.matrices.values()
    for side, other in ((found.before, b), (found.after, aligned)):
        for at, share in enumerate(ENERGY):
            rows = [getattr(side, what)[at] for what in ("joint", "directions", "left", "right")]
            assert rows == pytest.approx(by_definition(a, other, share), abs=1e-10)
        product = float((a * other).sum())
        assert side.joint[-1] == pytest.approx(product / float(a.norm() * other.norm()))
        assert float(found.values_a @ side.overlap) == pytest.approx(product)
        assert side.distance == pytest.approx(float((a - other).norm()))


@pytest.mark.parametrize("name", ["lenet", "norm_free_residual"])
def test_permutations_leave_singular_values_of_kernels_too(name):
    found = networks()[name]
    torch.manual_seed(0)
    module = found.build()
    spec = WeightSpec.trace(module, *found.inputs())
    a = {key: tensor for key, tensor in module.state_dict().items() if key in spec.tensors}
    b = spec.act(spec.random_element(symmetries=["permutation"]), a)
    report = singular_vectors(spec, a, a, b)
    assert max(each.value_change for each in report.matrices.values()) < 1e-12
    assert report.distance("before") == 0.0
    assert report.distance("after") > 1.0
    assert report.mean("joint", "before")[-1] == pytest.approx(1.0)


def test_matching_brings_leading_directions_together():
    """Two networks of one strong signal of rank 1 a layer, each with its own noise, in different orders."""
    spec = WeightSpec.mlp([6, 48, 48, 4], activation="relu", bias=False)
    generator = torch.Generator().manual_seed(3)
    signal, a, b = {}, {}, {}
    for name, tensor in spec.tensors.items():
        rows, columns = tensor.shape
        signal[name] = 10 * torch.outer(
            torch.randn(rows, generator=generator), torch.randn(columns, generator=generator)
        )
        for network in (a, b):
            network[name] = signal[name] + 5 * torch.randn(rows, columns, generator=generator)
    b = spec.act(spec.random_element(symmetries=["permutation"], generator=generator), b)
    aligned, _ = weight_matching(spec, a, b)
    report = singular_vectors(spec, a, b, aligned, energy=(0.5, 1.0))
    hidden = report.matrices["layers.1.weight"]
    assert hidden.value_change < 1e-12
    assert abs(hidden.before.joint[0]) < 0.4
    assert hidden.after.joint[0] > 0.9
    # the rest of the directions stay as far apart as they were
    assert hidden.after.overlap[5:].abs().mean() < 0.3 * hidden.values_b[5:].mean()


def test_the_report_in_json_and_in_pictures():
    a, b = of([[3.0, 0.0], [0.0, 0.0]]), of([[0.0, 0.0], [0.0, 0.0]])
    report = singular_vectors(one_matrix(), a, b, aligned=b)
    found = json.loads(report.to_json())
    assert found["joint_after"] == [0.0, 0.0, 0.0]
    assert found["matrices"][0]["values_a"] == pytest.approx([3.0, 0.0])
    assert found["matrices"][0]["before"]["overlap"] == [0.0, 0.0]
    report.draw(io.BytesIO())
    with pytest.raises(ConfigError, match=r"matrix: expected one of layers\.0\.weight, found 'head'"):
        report.draw(io.BytesIO(), matrix="head")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"energy": (1.0, 0.5)},
            ConfigError,
            r"energy: expected shares in \(0, 1\], ascending, found \[1.0, 0.5\]",
        ),
        ({"energy": (0.0,)}, ConfigError, "energy: expected shares"),
        ({"b": {}}, SpecError, "network B: parameter 'layers.0.weight' is missing"),
        (
            {"aligned": of(torch.ones(3, 2, 2))},
            SpecError,
            r"network aligned: 'layers.0.weight' should have shape \[2, 2\], found \[3, 2, 2\]",
        ),
        ({"a": of(torch.full((2, 2), math.nan))}, SpecError, "network A: expected finite values"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    given = dict.fromkeys(("a", "b", "aligned"), of(torch.eye(2))) | change
    with pytest.raises(error, match=message):
        singular_vectors(one_matrix(), **given)
