"""What a weight space is: groups, cells, scalings, and the group that acts on weights."""

from weightspace.spec._builders import mlp_spec
from weightspace.spec._elements import (
    act,
    cell_view,
    check_element,
    compose,
    identity,
    invert,
    random_element,
    source_index,
)
from weightspace.spec._types import (
    SYMMETRIES,
    Cell,
    Dim,
    Element,
    Exponent,
    Frozen,
    Group,
    Provenance,
    Scaling,
    Symmetry,
    TensorSpec,
    Weights,
    WeightSpec,
)
from weightspace.spec._verify import VerifyReport, output_change, verify

__all__ = [
    "SYMMETRIES",
    "Cell",
    "Dim",
    "Element",
    "Exponent",
    "Frozen",
    "Group",
    "Provenance",
    "Scaling",
    "Symmetry",
    "TensorSpec",
    "VerifyReport",
    "WeightSpec",
    "Weights",
    "act",
    "cell_view",
    "check_element",
    "compose",
    "identity",
    "invert",
    "mlp_spec",
    "output_change",
    "random_element",
    "source_index",
    "verify",
]
