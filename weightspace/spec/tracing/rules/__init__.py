"""One rule per family of ATen operators: how labels, and powers, pass through it.

To add one: write a function of the trace and of the operator's arguments, in the order of its schema, from the
moves in ``_operations.py``; register it by name; and add a module that uses the operator to the tests.
"""

from weightspace.spec.tracing.rules import (  # noqa: F401  registers the rules
    _convolutions,
    _indexing,
    _norms,
    _pointwise,
    _products,
    _recurrence,
    _reductions,
    _shapes,
)
from weightspace.spec.tracing.rules._unary import unary_rule

__all__ = ["unary_rule"]
