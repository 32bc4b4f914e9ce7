"""Public test kit: equivariance checks, random specs, weights and zoos, networks to trace and to align; for tests."""

from weightspace.testing._equivariance import EquivarianceError, assert_equivariant, assert_invariant
from weightspace.testing._matchers import PLANTED, Planted, planted
from weightspace.testing._merging import LazyNetwork, LiveTensors, MergeContract, merge_inputs
from weightspace.testing._networks import Case, networks
from weightspace.testing._specs import mixed_spec, random_spec, random_weights, sine_specs, tiny_specs
from weightspace.testing._zoos import tiny_zoo

__all__ = [
    "PLANTED",
    "Case",
    "EquivarianceError",
    "LazyNetwork",
    "LiveTensors",
    "MergeContract",
    "Planted",
    "assert_equivariant",
    "assert_invariant",
    "merge_inputs",
    "mixed_spec",
    "networks",
    "planted",
    "random_spec",
    "random_weights",
    "sine_specs",
    "tiny_specs",
    "tiny_zoo",
]
