"""Derive the spec of any module: export it, carry labels through its graph, read off what may move."""

from weightspace.spec.tracing._check import NodeChange, check_operators
from weightspace.spec.tracing._derive import trace
from weightspace.spec.tracing._program import Inputs, Program, as_call, export
from weightspace.spec.tracing._sites import Site
from weightspace.spec.tracing._trace import RULES, rule
from weightspace.spec.tracing._watch import Watch
from weightspace.spec.tracing.rules import unary_rule

__all__ = [
    "RULES",
    "Inputs",
    "NodeChange",
    "Program",
    "Site",
    "Watch",
    "as_call",
    "check_operators",
    "export",
    "rule",
    "trace",
    "unary_rule",
]
