"""Which rows of a population an expression selects, such as ``test_accuracy > 0.3 and epoch == last``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from weightspace.errors import ConfigError
from weightspace.zoo._zoo import SPLITS, Population

TABLES = ("metrics", "hyperparameters", "labels")
COLUMNS = ("step", "network", "source", "view", "split")
OWN = ("last", "first", "max", "min")

_COMPARISONS: dict[type[ast.cmpop], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class _Value:
    """One side of a comparison."""


@dataclass(frozen=True)
class _Text(_Value):
    """A name in quotes."""

    text: str


@dataclass(frozen=True)
class _Numbers(_Value):
    """One number per row, or one for all of them; ``names`` are what its codes stand for, if they do."""

    values: Any
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Truth:
    """For which rows something holds and for which it does not; for neither where a number is missing."""

    yes: np.ndarray
    no: np.ndarray


NOTHING = _Value()  # that a network's own value could be of


def rows_where(population: Population, expression: str, *, required: bool = True) -> np.ndarray:
    """The rows of a population for which an expression holds.

    The expression is read as Python's, and never run as such: comparisons (also chained), ``and``, ``or``, ``not``,
    ``in [...]``, ``+ - * /``, numbers, strings and names. Names are those of metrics, hyperparameters and labels, and
    ``step``, ``network``, ``source``, ``view`` and ``split``. Where two tables have a name, and for those that are no
    names in Python, say which: ``labels.x``, ``metrics['top 5']``. Codes with names, which the protocol lists under
    ``choices``, are compared with them: ``optimizer == 'adam'``, ``split == 'train'``.

    In a comparison ``last``, ``first``, ``max`` and ``min`` are the network's own value of what they are compared with:
    ``epoch == last`` keeps the last checkpoint of each network (that with the most steps), ``test_accuracy == max`` the
    best. A number by itself holds unless it is 0: ``not diverged``. What is missing (NaN) never holds, nor does its
    opposite. Literals are compared in the precision of the column, so that ``learning_rate == 0.1`` finds the float32.

    Args:
        population: of a zoo.
        expression: what has to hold.
        required: whether it is an error if it holds for no row.

    Returns:
        Sorted numbers of rows, (matches,) int64.

    Raises:
        ConfigError: not an expression of this kind, an unknown name, text where a number is needed, or no row left.

    Example:
        >>> from weightspace.testing import tiny_zoo
        >>> inr = tiny_zoo(networks=8)["inr"]
        >>> rows_where(inr, "psnr > 30 and label in [0, 1] and step == last").tolist()
        [6, 7]
    """
    reader = _Reader(population, expression)
    try:
        with np.errstate(all="ignore"):
            rows = np.flatnonzero(reader.truth(_parsed(expression)).yes)
    except RecursionError:
        raise _too_deep(expression) from None
    if required and len(rows) == 0:
        raise ConfigError(
            f"where: {expression!r} holds for none of {population.rows:,} rows of {population.networks:,} networks"
        )
    return rows


def _parsed(expression: str) -> ast.expr:
    """The syntax tree.

    Raises:
        ConfigError: not Python, or nested too deeply for it.
    """
    try:
        tree = ast.parse(_one_line(expression), mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"where: {expression!r} is no expression: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError):
        raise _too_deep(expression) from None
    return tree.body


def _one_line(expression: str) -> str:
    return " ".join(expression.splitlines()).strip()


def _too_deep(expression: str) -> ConfigError:
    return ConfigError(f"where: no expression, or nested too deeply: {expression[:80]!r}")


class _Reader:
    """Values of the parts of one expression for all rows of a population."""

    def __init__(self, population: Population, expression: str) -> None:
        self.population, self.expression = population, _one_line(expression)
        self._order: np.ndarray | None = None

    def truth(self, node: ast.expr) -> _Truth:
        """For which rows a condition holds."""
        if isinstance(node, ast.BoolOp):
            parts = [self.truth(value) for value in node.values]
            return reduce(_and if isinstance(node.op, ast.And) else _or, parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _not(self.truth(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return reduce(_and, [self._compared(left, how, right) for left, how, right in pairs])
        value = self._whole(np.asarray(self.number(node, NOTHING).values))
        return self._known(value != 0, value)

    def _compared(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> _Truth:
        if isinstance(how, ast.In | ast.NotIn):
            if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
                raise self._error("expected a list such as [1, 2] after `in`", right)
            found = reduce(_or, [self._compared(left, ast.Eq(), entry) for entry in right.elts])
            return found if isinstance(how, ast.In) else _not(found)
        if type(how) not in _COMPARISONS:
            raise self._error("expected == and not `is`", left)
        a, b = self._sides(left, right)
        sign, compare = _COMPARISONS[type(how)]
        if isinstance(a, _Text) or isinstance(b, _Text):
            if sign not in ("==", "!="):
                raise self._error(f"names have no order, expected == or != and not {sign}", left)
            a, b = self._decoded(left, a, b), self._decoded(right, b, a)
        assert isinstance(a, _Numbers)
        assert isinstance(b, _Numbers)
        return self._known(self._whole(compare(a.values, b.values)), a.values, b.values)

    def _sides(self, left: ast.expr, right: ast.expr) -> tuple[_Value, _Value]:
        """Both sides of a comparison; the network's own value is of what the other side is."""
        own = [_mentions(node) for node in (left, right)]
        if all(own):
            raise self._error(f"cannot tell of what {' and '.join(dict.fromkeys(own))} are", left)
        b = NOTHING if own[1] else self._side(right, NOTHING)
        a = self._side(left, b)
        return a, self._side(right, a) if own[1] else b

    def _side(self, node: ast.expr, of: _Value) -> _Value:
        return _Text(_quoted(node)) if _is_text(node) else self.number(node, of)

    def _decoded(self, node: ast.expr, value: _Value, other: _Value) -> _Numbers:
        """The code that a name stands for in what it is compared with."""
        if isinstance(value, _Numbers):
            return value
        assert isinstance(value, _Text)
        if not isinstance(other, _Numbers):
            raise self._error("expected the name of a column on one side", node)
        if other.names is None:
            raise self._error("compared with numbers, expected one", node)
        if value.text not in other.names:
            raise ConfigError(f"where: expected one of {', '.join(other.names)}, found {value.text!r}")
        return _Numbers(other.names.index(value.text))

    def number(self, node: ast.expr, of: _Value) -> _Numbers:
        """One number per row, or one for all; ``of`` is what a network's own value is to be of."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            if abs(node.value) >= 2**63:
                raise self._error("expected a number below 2**63", node)
            return _Numbers(node.value)
        if isinstance(node, ast.Name) and node.id in OWN:
            return self._own(node, of)
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript):
            return self._column(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self.number(node.operand, of).values
            return _Numbers(-value if isinstance(node.op, ast.USub) else value)
        if isinstance(node, ast.BinOp):
            return self._calculated(node, of)
        raise self._error(_advice(node), node)

    def _calculated(self, node: ast.BinOp, of: _Value) -> _Numbers:
        if type(node.op) not in _ARITHMETIC:
            raise self._error(_advice(node), node)
        values = self.number(node.left, of).values, self.number(node.right, of).values
        try:
            return _Numbers(_ARITHMETIC[type(node.op)](*values))
        except (ZeroDivisionError, OverflowError) as error:
            raise self._error(str(error), node) from None

    def _own(self, node: ast.Name, of: _Value) -> _Numbers:
        """The last, first, largest or smallest number of each network, for each of its rows."""
        if not isinstance(of, _Numbers) or np.ndim(of.values) == 0:
            raise self._error(
                f"{node.id} is the network's own value of what it is compared with, as in `epoch == {node.id}`",
                node,
            )
        if self._order is None:
            self._order = np.lexsort((self.population.step, self.population.network))
        network = self.population.network[self._order]
        starts = np.flatnonzero(np.r_[True, network[1:] != network[:-1]])
        ends = np.r_[starts[1:], len(network)] - 1
        ordered = of.values[self._order]
        own = {
            "first": lambda: ordered[starts],
            "last": lambda: ordered[ends],
            "max": lambda: np.fmax.reduceat(ordered, starts),
            "min": lambda: np.fmin.reduceat(ordered, starts),
        }[node.id]()
        values = np.empty_like(ordered)
        values[self._order] = np.repeat(own, ends - starts + 1)
        return _Numbers(values)

    def _column(self, node: ast.expr) -> _Numbers:
        table, name = self._named(node)
        population = self.population
        if table is None and name in COLUMNS:
            values = np.asarray(getattr(population, name))
            values = values.astype(np.int64) if name == "split" else values
            per_row = name in ("step", "network")
            return _Numbers(
                values if per_row else values[population.network], SPLITS if name == "split" else None
            )
        tables = [table] if table else [table for table in TABLES if name in getattr(population, table)]
        if len(tables) > 1:
            raise ConfigError(
                f"where: {' and '.join(tables)} both have {name!r}, write {' or '.join(f'{t}.{name}' for t in tables)}"
            )
        if not tables or name not in getattr(population, tables[0]):
            raise ConfigError(f"where: expected one of {', '.join(self._known_names(table))}, found {name!r}")
        values = np.asarray(getattr(population, tables[0])[name])
        if tables[0] == "metrics":
            return _Numbers(values)
        return _Numbers(values[population.network], _choices(population.protocol, name))

    def _named(self, node: ast.expr) -> tuple[str | None, str]:
        """The table, if it is said, and the name within."""
        if isinstance(node, ast.Name):
            return None, node.id
        assert isinstance(node, ast.Attribute | ast.Subscript)
        if not isinstance(node.value, ast.Name) or node.value.id not in TABLES:
            raise self._error(f"expected one of {', '.join(TABLES)} before the name", node)
        if isinstance(node, ast.Attribute):
            return node.value.id, node.attr
        if not _is_text(node.slice):
            raise self._error("expected a name in quotes between the brackets", node)
        return node.value.id, _quoted(node.slice)

    def _known_names(self, table: str | None) -> list[str]:
        tables = [table] if table else TABLES
        names = [name for each in tables for name in getattr(self.population, each)]
        return [*dict.fromkeys([*names, *([] if table else COLUMNS)])] or ["none"]

    def _whole(self, values: Any) -> np.ndarray:
        return np.broadcast_to(values, (self.population.rows,))

    def _known(self, holds: np.ndarray, *values: Any) -> _Truth:
        known = ~reduce(np.logical_or, [np.isnan(np.asarray(value, dtype=float)) for value in values])
        return _Truth(holds & known, ~holds & known)

    def _error(self, what: str, node: ast.expr) -> ConfigError:
        part = ast.get_source_segment(self.expression, node) or self.expression
        return ConfigError(f"where: {what}, found {part!r} in {self.expression!r}")


def _and(a: _Truth, b: _Truth) -> _Truth:
    return _Truth(a.yes & b.yes, a.no | b.no)


def _or(a: _Truth, b: _Truth) -> _Truth:
    return _Truth(a.yes | b.yes, a.no & b.no)


def _not(a: _Truth) -> _Truth:
    return _Truth(a.no, a.yes)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _quoted(node: ast.expr) -> str:
    assert isinstance(node, ast.Constant)
    return str(node.value)


def _mentions(node: ast.expr) -> str:
    """The first name of a network's own value in an expression; empty if there is none."""
    names = (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
    return next((name for name in names if name in OWN), "")


def _choices(protocol: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    """What the codes of a column stand for."""
    choices = protocol.get("choices")
    found = choices.get(name) if isinstance(choices, Mapping) else None
    return tuple(map(str, found)) if isinstance(found, list | tuple) else None


def _advice(node: ast.expr) -> str:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        return "expected `and` and `or` for conditions, and + - * / for numbers"
    if isinstance(node, ast.Compare | ast.BoolOp) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    ):
        return "expected a number"
    if _is_text(node):
        return "expected a condition or a number"
    return "expected names, numbers, comparisons, and, or, not, in, + - * /"
