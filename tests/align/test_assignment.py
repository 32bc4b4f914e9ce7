"""Batched linear assignment: the same optimum as SciPy's, whatever the numbers are like."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from weightspace.align._assignment import assign

SIZES = [1, 2, 3, 5, 8, 16, 17, 32, 33, 64]


def random_scores(kind, rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, size, size, generator=generator, dtype=torch.float64)
    rank_one = normal[:, :, :1] @ normal[:, :1, :]
    return {
        "random": normal,
        "negative": -normal.abs() - 1,
        "whole numbers": (3 * normal).round(),
        "two values": (normal > 0).double(),
        "all equal": torch.full_like(normal, -2.5),
        "rank 1": rank_one,
        "rank 3": normal[:, :, :3] @ normal[:, :3, :] if size >= 3 else rank_one,
        "huge": normal * 1e150,
        "tiny": normal * 1e-150,
        "one large": normal + 1e6 * (normal == normal.amax((1, 2), keepdim=True)),
        "nearly equal": 1 + 1e-9 * normal,
    }[kind]


KINDS = [
    "random",
    "negative",
    "whole numbers",
    "two values",
    "all equal",
    "rank 1",
    "rank 3",
    "huge",
    "tiny",
    "one large",
    "nearly equal",
]


def best(scores):
    """SciPy's optimum of each matrix, from the same numbers in float64."""
    found = []
    for matrix in scores.double().numpy():
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        found.append(matrix[rows, columns].sum())
    return np.array(found)


def reached(scores, source):
    return scores.double().gather(2, source.unsqueeze(2)).sum((1, 2)).numpy()


def assert_optimal(scores):
    source = assign(scores)
    assert source.dtype == torch.long
    assert torch.equal(source.sort(-1).values, torch.arange(scores.shape[-1]).expand(source.shape))
    scale = float(scores.abs().max()) * scores.shape[-1]
    np.testing.assert_allclose(reached(scores, source), best(scores), rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_that_of_scipy(kind, size):
    assert_optimal(random_scores(kind, 12, size))


@pytest.mark.parametrize("kind", ["random", "whole numbers", "rank 1", "all equal"])
def test_float32_is_taken_as_it_is(kind):
    assert_optimal(random_scores(kind, 20, 32).float())


@pytest.mark.parametrize("kind", ["random", "rank 3"])
def test_wide_layers(kind):
    assert_optimal(random_scores(kind, 1, 512).float())


@settings(max_examples=200)
@given(
    numbers=st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(-3, 3), min_size=n * n, max_size=n * n))
)
def test_small_matrices_against_every_permutation(numbers):
    """Ties everywhere: small whole numbers."""
    size = int(len(numbers) ** 0.5)
    score = torch.tensor(numbers, dtype=torch.float64).view(1, size, size)
    every = [sum(score[0, i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(size))]
    assert reached(score, assign(score)).item() == max(every)


def test_two_units_by_hand():
    """1 + 7 is more than 5 + 2, though 5 is the best of its row."""
    assert assign(torch.tensor([[[1.0, 5.0], [2.0, 7.0]]])).tolist() == [[0, 1]]
    assert assign(torch.tensor([[[1.0, 5.0], [4.0, 7.0]]])).tolist() == [[1, 0]]


def test_on_ties_units_stay():
    assert assign(torch.zeros(2, 9, 9)).tolist() == [list(range(9))] * 2


def test_a_matrix_does_not_depend_on_its_neighbours():
    scores = random_scores("rank 3", 40, 24)
    together = assign(scores)
    for row in range(40):
        assert torch.equal(assign(scores[row : row + 1])[0], together[row])


def test_strides_and_gradients_do_not_matter():
    scores = random_scores("random", 6, 7)
    expected = assign(scores)
    turned = scores.mT.contiguous().mT.requires_grad_()
    assert torch.equal(assign(turned), expected)
    assert assign(scores[:0]).shape == (0, 7)
