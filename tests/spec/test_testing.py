"""The test kit must fail on what is wrong."""

import pytest
import torch

from weightspace.testing import EquivarianceError, assert_equivariant, assert_invariant, tiny_specs

SPEC = tiny_specs()["2-4-4-1 tanh"]


def test_a_function_that_is_equivariant_passes():
    errors = assert_equivariant(lambda weights: {n: 2 * w for n, w in weights.items()}, SPEC)
    assert set(errors) == {torch.float32, torch.float64}
    assert_invariant(lambda weights: SPEC.flatten(weights).square().sum(-1), SPEC, symmetries=SPEC.symmetries)


def test_a_function_that_is_not_equivariant_fails():
    with pytest.raises(EquivarianceError, match="relative error"):
        assert_equivariant(lambda weights: {n: w.roll(1, -1) for n, w in weights.items()}, SPEC)
    with pytest.raises(EquivarianceError, match="relative error"):
        assert_invariant(lambda weights: SPEC.flatten(weights)[:, :3], SPEC)


def test_a_constant_function_is_vacuous():
    with pytest.raises(EquivarianceError, match="vacuous"):
        assert_invariant(lambda weights: torch.ones(3), SPEC)
