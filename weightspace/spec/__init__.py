"""What a weight space is: groups, cells, scalings, and the group that acts on weights."""

from weightspace.spec._arguments import check_element, check_weights
from weightspace.spec._builders import mlp_spec
from weightspace.spec._canonical import canonicalize
from weightspace.spec._cells import cell_view, source_index
from weightspace.spec._describe import describe
from weightspace.spec._draw import FIGURE_FORMATS, draw
from weightspace.spec._elements import act, compose, identity, invert, random_element
from weightspace.spec._flat import act_flat
from weightspace.spec._graphviz import to_graphviz
from weightspace.spec._types import (
    SYMMETRIES,
    Cell,
    Dim,
    Element,
    Exponent,
    Frozen,
    Group,
    Orientation,
    Provenance,
    Scaling,
    Symmetry,
    TensorSpec,
    Weights,
    WeightSpec,
)
from weightspace.spec._verify import VerifyReport, output_change, verify
from weightspace.spec.maximality import MissedSymmetry, Move, missed_symmetries
from weightspace.spec.tracing import NodeChange, Site, Watch, check_operators, rule, trace, unary_rule

__all__ = [
    "FIGURE_FORMATS",
    "SYMMETRIES",
    "Cell",
    "Dim",
    "Element",
    "Exponent",
    "Frozen",
    "Group",
    "MissedSymmetry",
    "Move",
    "NodeChange",
    "Orientation",
    "Provenance",
    "Scaling",
    "Site",
    "Symmetry",
    "TensorSpec",
    "VerifyReport",
    "Watch",
    "WeightSpec",
    "Weights",
    "act",
    "act_flat",
    "canonicalize",
    "cell_view",
    "check_element",
    "check_operators",
    "check_weights",
    "compose",
    "describe",
    "draw",
    "identity",
    "invert",
    "missed_symmetries",
    "mlp_spec",
    "output_change",
    "random_element",
    "rule",
    "source_index",
    "to_graphviz",
    "trace",
    "unary_rule",
    "verify",
]
