"""Public test kit: equivariance checks, random specs and weights, tiny zoos. Only tests import it."""

from weightspace.testing._equivariance import EquivarianceError, assert_equivariant, assert_invariant
from weightspace.testing._specs import mixed_spec, random_weights, tiny_specs
from weightspace.testing._zoos import tiny_zoo

__all__ = [
    "EquivarianceError",
    "assert_equivariant",
    "assert_invariant",
    "mixed_spec",
    "random_weights",
    "tiny_specs",
    "tiny_zoo",
]
