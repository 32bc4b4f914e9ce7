"""Public test kit: equivariance checks, random specs and weights, real networks, tiny zoos. Only tests import it."""

from weightspace.testing._equivariance import EquivarianceError, assert_equivariant, assert_invariant
from weightspace.testing._networks import Case, networks
from weightspace.testing._specs import mixed_spec, random_spec, random_weights, sine_specs, tiny_specs
from weightspace.testing._zoos import tiny_zoo

__all__ = [
    "Case",
    "EquivarianceError",
    "assert_equivariant",
    "assert_invariant",
    "mixed_spec",
    "networks",
    "random_spec",
    "random_weights",
    "sine_specs",
    "tiny_specs",
    "tiny_zoo",
]
